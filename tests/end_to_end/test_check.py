"""What `check` says before a training is what the training then does, and what it says afterwards is what is there."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_train.check import run_check

PLUGINS = """
import json
from sdxl_train import hookimpl

def repeats(img_key, img_md, **kwargs): return {"square0": 3, "wide1": 2, "square5": 0}.get(img_key, 1)

class Probe:
    def __init__(self): self.batches = []

    @hookimpl(wrapper=True)
    def sample_timesteps(self, batch):
        height, width = batch.target_sizes[0]
        self.batches.append([width, height, len(batch)])
        return (yield)

    @hookimpl
    def on_train_end(self, run):
        seen = {"batches": self.batches, "num_train_steps": run.num_train_steps, "steps_per_epoch": run.steps_per_epoch, "done": run.step}
        json.dump(seen, open(FOLDER + "/seen.json", "w"))
"""


@pytest.fixture
def check(capsys):
    """Checks a file and gives back its exit code and the JSON object."""

    def checking(file: Path, decode: bool = False) -> tuple[int, dict[str, Any]]:
        code = run_check(file, (), as_json=True, decode=decode)
        return code, json.loads(capsys.readouterr().out)

    return checking


@pytest.fixture
def keys(tmp_path: Path, pictures: Path) -> dict[str, Any]:
    """A data set with repeats, texts that are too long, a cache without a picture, two bad pictures and a missing one."""
    (tmp_path / "own.py").write_text(PLUGINS.replace("FOLDER", repr(str(tmp_path))))
    (pictures / "square1.txt").write_text("cat " * 80)
    (pictures / "square2.png").write_bytes((pictures / "square2.png").read_bytes()[:70])  # its header tells
    damaged = bytearray((pictures / "wide3.png").read_bytes())
    damaged[len(damaged) // 2] ^= 1  # only a decode tells
    (pictures / "wide3.png").write_bytes(damaged)
    Image.new("RGB", (300, 90), "red").save(pictures / "long.png")
    entries: dict[str, Any] = {path.stem: {"caption": path.with_suffix(".txt").read_text()} for path in pictures.glob("*[0-9].png")}
    entries |= {"long": {}, "gone": {"caption": "x"}}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    return {
        "metadata_files": [str(tmp_path / "meta.json")],
        "num_repeats_getter": f"{tmp_path}/own.py:repeats",
        "plugins": [f"{tmp_path}/own.py:Probe"],
        "bad_images": "skip",
        "batch_size": 3,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "save_every_n_steps": 2,
        "save_every_n_epochs": 1,
        "output_dir": str(tmp_path / "run%index%"),
    }


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_train_steps": 3, "cache_latents_to_disk": False},
        {"cache_latents": False, "batch_size": 2, "gradient_accumulation_steps": 1, "num_train_epochs": 1},
    ],
)
def test_a_training_does_what_the_check_said(check, config, cli, tmp_path: Path, keys: dict[str, Any], more: dict[str, Any]) -> None:
    file = config(**{**keys, **more})
    code, plan = check(file, decode=True)
    assert (code, plan["problems"]) == (0, [])
    assert not list(tmp_path.glob("run*"))
    ended = cli(file)
    assert ended.code == 0, ended.err

    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (plan["num_train_steps"], plan["steps_per_epoch"]) == (seen["num_train_steps"], seen["steps_per_epoch"])
    assert plan["num_train_steps"] == seen["done"]
    epoch = seen["batches"][: plan["batches_per_epoch"]]
    of_bucket = Counter((width, height) for width, height, _ in epoch)
    assert {tuple(bucket["size"]): bucket["batches"] for bucket in plan["buckets"]} == of_bucket
    assert plan["samples_per_epoch"] == sum(size for *_, size in epoch)

    line = f"data: {plan['images']} pictures, {plan['captioned']} captioned, {plan['described']} described, {plan['without_text']} without text, "
    line += f"{plan['missing']} missing, {plan['dropped']} dropped by num_repeats, {plan['bad']} bad"
    assert line in ended.err
    assert (plan["missing"], plan["dropped"], plan["bad"], plan["without_text"]) == (1, 1, 2, 1)
    assert f"{plan['tokens']['over']} pictures with a text over" in ended.err and plan["tokens"]["over"] == 1

    models = sorted((tmp_path / "run0" / "models").iterdir(), key=lambda path: int(path.stem.rpartition("step")[2]))
    assert [int(path.stem.rpartition("step")[2]) for path in models] == plan["saves"]["steps"]
    assert [str(models[0]), str(models[-1])] == [plan["saves"]["first"], plan["saves"]["last"]]
    assert sum(path.stat().st_size for path in models) == pytest.approx(plan["saves"]["bytes"], rel=0.02)


def test_caches_are_counted_as_the_training_finds_them(check, config, cli, tmp_path: Path, keys: dict[str, Any], pictures: Path) -> None:
    file = config(**keys)
    _, before = check(file, decode=True)
    assert (before["caches"]["usable"], before["caches"]["to_encode"]) == (0, 8)
    assert cli(file).code == 0
    written = sum(path.stat().st_size for path in pictures.glob("*.npz"))
    assert written == pytest.approx(before["caches"]["bytes_to_write"], rel=0.1)

    _, after = check(file)
    assert after["caches"] == {
        "usable": 8,
        "to_encode": 1,
        "invalid": [],
        "bytes_to_write": after["caches"]["bytes_to_write"],
        "were_read": False,
    }
    assert (after["undecoded"], after["saves"]["output_dir"]) == (1, str(tmp_path / "run1"))  # wide3, which proved bad, is looked at again

    cut = pictures / "square1.npz"
    cut.write_bytes(cut.read_bytes()[:100])
    shutil.move(pictures / "long.png", tmp_path / "long.png")  # its cache alone is left
    _, later = check(file)
    assert (later["caches"]["usable"], later["caches"]["to_encode"], later["images"]) == (7, 2, 9)
    (reason,) = later["caches"]["invalid"]
    assert str(cut) in reason


def test_a_cache_that_cannot_be_used_is_a_problem_where_there_is_no_picture(
    check, config, cli, keys: dict[str, Any], pictures: Path
) -> None:
    file = config(**keys)
    assert cli(file).code == 0
    (pictures / "long.png").unlink()
    with np.load(pictures / "long.npz") as cache:
        arrays = dict(cache)
    arrays["latents"][0, 0, 0] = np.nan  # only reading the values tells
    np.savez(pictures / "long.npz", **arrays)
    assert check(file)[1]["problems"] == []
    code, plan = check(file, decode=True)
    assert code == 2
    assert [(problem["kind"], problem["path"]) for problem in plan["problems"]] == [("cache", str(pictures / "long.npz"))]


def test_a_picture_under_two_keys_is_to_be_encoded_once(check, cli, config, pictures: Path, tmp_path: Path) -> None:
    picture = str(pictures / "square0.png")
    (tmp_path / "two.json").write_text(json.dumps({key: {"image_path": picture, "caption": key} for key in ("first", "second")}))
    file = config(metadata_files=[str(tmp_path / "two.json")])
    code, plan = check(file)
    assert (code, plan["images"], plan["caches"]["to_encode"]) == (0, 2, 1)
    ended = cli(file, "--set", "max_train_steps=1")
    assert ended.code == 0 and "1 encoded now" in ended.err


@pytest.mark.parametrize("optimizer", ["AdaFactor", "AdamW"])
def test_the_size_of_a_train_state_is_predicted(check, cli, config, tmp_path: Path, optimizer) -> None:
    file = config(optimizer_type=optimizer, max_train_steps=2, train_text_encoder=True)
    _, plan = check(file)
    assert cli(file).code == 0
    (state,) = (tmp_path / "out" / "train_state").iterdir()
    written = sum((state / name).stat().st_size for name in ("weights.safetensors", "optimizer.safetensors"))
    assert plan["saves"]["state_bytes"] == pytest.approx(written, rel=0.05)
    assert plan["saves"]["states_bytes"] == plan["saves"]["state_bytes"]  # one save, at the end


def test_a_disk_without_room_for_a_save_is_refused_before_the_first_step(cli, config, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    ended = cli(config())
    assert ended.code == 2 and "1000 bytes free" in ended.err and "keep_train_states" in ended.err
    assert list((tmp_path / "out" / "models").iterdir()) == []
    assert cli(config(save_on_train_end=False, save_on_keyboard_interrupt=False, save_on_exception=False, max_train_steps=1)).code == 0
