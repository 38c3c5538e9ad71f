"""The demo from the command line: that it learns, what it leaves in its folder, what it says at the end, and that it can be stopped."""

import signal
import time
from pathlib import Path

from PIL import Image


def shortened(folder: Path, cli, num_epochs: int) -> Path:
    """A prepared demo whose training takes seconds; the demo keeps a configuration that is there."""
    assert cli("demo", folder, "--prepare-only").code == 0
    config = folder / "sdxl.toml"
    text = config.read_text("utf-8")
    config.write_text(text.replace("epochs = 70", f"epochs = {num_epochs}").replace("steps = 30", "steps = 5"), "utf-8")
    return folder


def test_the_demo_learns_and_shows_before_and_after(cli, process, tmp_path: Path, metrics) -> None:
    folder = shortened(tmp_path / "demo", cli, 8)
    child = process("demo", folder)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    losses = [line["loss/step"] for line in metrics(folder / "output")]
    assert len(losses) == 48
    assert 0.7 < losses[0] < 1.1  # a U-Net that predicts 0 has the loss 1, less what min_snr_gamma takes
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    (model,) = (folder / "output" / "models").iterdir()
    assert f"{sum(losses[:20]) / 20:.3f} at first, {sum(losses[-20:]) / 20:.3f} at the end (means of 20 steps)" in out
    sheet = folder / "before_and_after.png"
    for said in (str(model), str(sheet), str(folder / "output" / "logs"), "Try next"):
        assert said in out
    with Image.open(sheet) as drawn:
        assert drawn.width > 3 * 128 and drawn.height > 6 * 128
    assert {path.name for path in tmp_path.iterdir()} == {"demo"}


def test_a_demo_without_samples_says_what_else_it_made(cli, tmp_path: Path) -> None:
    folder = shortened(tmp_path / "demo", cli, 1)
    config = folder / "sdxl.toml"
    config.write_text(config.read_text("utf-8").replace("sample_every_n_epochs = 1", "sample_every_n_epochs = 0"), "utf-8")
    ended = cli("demo", folder)
    assert ended.code == 0, ended.err
    assert "model_ep1_step6.safetensors" in ended.out and "before and after" not in ended.out
    assert not (folder / "before_and_after.png").exists()


def test_ctrl_c_stops_the_demo_with_130_and_saves(cli, process, tmp_path: Path) -> None:
    folder = shortened(tmp_path / "demo", cli, 70)
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
