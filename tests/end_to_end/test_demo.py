"""The demo: what it writes, that it learns, and what it says at the end."""

import hashlib
from pathlib import Path

import pytest

from sdxl_train import demo
from sdxl_train.config import load_settings


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_preparing_writes_the_same_files_each_time_and_a_configuration_that_is_right(cli, tmp_path: Path) -> None:
    first, second = tmp_path / "a demo", tmp_path / "b"
    for folder in (first, second):
        assert cli("demo", folder, "--prepare-only").code == 0
    written, again = hashes(first), hashes(second)
    assert {"base.safetensors", "metadata.json", "benchmark.json", "sdxl.toml", "NOTICE.md"} <= written.keys()
    assert sum(name.startswith("images") for name in written) == 96
    assert {name for name in written if written[name] != again[name]} == {"sdxl.toml"}
    settings = load_settings(first / "sdxl.toml")
    assert Path(settings.config.output_dir).is_absolute() and Path(settings.config.output_dir).parent == first


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(cli, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ended = cli("demo", tmp_path, "--prepare-only")
    assert ended.code == 2 and "not empty" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_demo_learns_and_shows_before_and_after(cli, tmp_path: Path, metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    text = demo.TOML.replace("num_train_epochs = 10 ", "num_train_epochs = 4 ").replace("n_epochs = 10 ", "n_epochs = 4 ")
    monkeypatch.setattr(demo, "TOML", text)
    ended = cli("demo", tmp_path / "demo")
    assert ended.code == 0, ended.err
    losses = [line["loss/step"] for line in metrics(tmp_path / "demo" / "output")]
    assert len(losses) >= 45
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    (model,) = (tmp_path / "demo" / "output" / "models").iterdir()
    for said in (str(model), demo.SHEET, "Try next"):
        assert said in ended.out
    assert (tmp_path / "demo" / demo.SHEET).stat().st_size > 1000
