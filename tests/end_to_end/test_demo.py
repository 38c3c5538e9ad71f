"""The demo from the command line, shortened: what it leaves in its folder, what it says at the end, and that it can be stopped."""

import json
import re
import signal
import time
from pathlib import Path

from PIL import Image


def shortened(folder: Path, cli, num_epochs: int) -> Path:
    """A prepared demo of seconds, with two prompts of new pictures and two of old ones; the demo keeps files that are there."""
    assert cli("demo", folder, "--prepare-only").code == 0
    config, benchmark = folder / "sdxl.toml", folder / "benchmark.json"
    text = config.read_text("utf-8")
    config.write_text(text.replace("epochs = 60", f"epochs = {num_epochs}").replace("steps = 20\n", "steps = 3\n"), "utf-8")
    entries = json.loads(benchmark.read_text("utf-8"))
    benchmark.write_text(json.dumps([*entries[:2], *entries[-2:]]), "utf-8")
    return folder


def test_the_demo_measures_and_shows_before_and_after(cli, process, tmp_path: Path, metrics) -> None:
    folder = shortened(tmp_path / "demo", cli, 2)
    child = process("demo", folder)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    losses = [line["loss/step"] for line in metrics(folder / "output")]
    assert len(losses) == 10
    (model,) = (folder / "output" / "models").iterdir()
    mean = f"{sum(losses) / 10:.3f}"
    assert f"{mean} at first, {mean} at the end (means of 10 steps)" in out
    sheet = folder / "demo.png"
    for said in (str(model), str(sheet), str(folder / "output" / "logs"), "Try next"):
        assert said in out
    for moment in ("before", "after"):
        assert re.search(rf"new pictures, {moment}: \d of 2 samples recognised among 24 pictures: [\d.]+% \(chance 4.2%\)", out)
        assert re.search(rf"pictures that the base knew, {moment}: \d of 2 samples recognised among 200 pictures", out)
    with Image.open(sheet) as drawn:
        assert drawn.width >= 600 and drawn.height > 260 + 128
    assert {path.name for path in tmp_path.iterdir()} == {"demo"}


def test_a_demo_without_samples_says_what_else_it_made(cli, tmp_path: Path) -> None:
    folder = shortened(tmp_path / "demo", cli, 1)
    config = folder / "sdxl.toml"
    config.write_text(config.read_text("utf-8").replace("sample_every_n_epochs = 1", "sample_every_n_epochs = 0"), "utf-8")
    ended = cli("demo", folder)
    assert ended.code == 0, ended.err
    assert "model_ep1_step5.safetensors" in ended.out and "before and after" not in ended.out
    assert "recognised" not in ended.out
    assert not (folder / "demo.png").exists()


def test_ctrl_c_stops_the_demo_with_130_and_saves(cli, process, tmp_path: Path) -> None:
    folder = shortened(tmp_path / "demo", cli, 60)
    child = process("demo", folder)
    for line in child.stderr:
        if line.startswith("sampled"):
            break
    metrics_file = next((folder / "output" / "logs").glob("*/metrics.jsonl"))
    while not metrics_file.read_text() and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "saved" in err and "The demo is done" not in out
