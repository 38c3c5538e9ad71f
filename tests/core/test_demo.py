"""What `sdxl-train demo --prepare-only` writes, and that it takes nothing of a user's; what comes packaged; the curve of the losses."""

import hashlib
import json
import socket
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_train.config import load_settings
from sdxl_train.demo_pictures import on_canvas, packaged_captions, packaged_picture, split_pictures
from sdxl_train.demo_report import loss_curve

WRITTEN = {"base.safetensors", "metadata.json", "benchmark.json", "sdxl.toml", "NOTICE.md"}


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_preparing_writes_the_same_files_each_time_and_only_the_paths_differ(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)  # offline
    monkeypatch.chdir(tmp_path)
    for folder in ("a demo", "b"):
        assert cli("demo", folder, "--prepare-only").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a demo", "b"}
    written, again = hashes(tmp_path / "a demo"), hashes(tmp_path / "b")
    assert {name for name in written if not name.startswith("images/")} == WRITTEN
    assert sum(name.startswith("images/") for name in written) == 24
    assert {name for name in written if written[name] != again[name]} == {"sdxl.toml"}
    text = (tmp_path / "a demo" / "sdxl.toml").read_text("utf-8").replace(str(tmp_path / "a demo"), str(tmp_path / "b"))
    assert text == (tmp_path / "b" / "sdxl.toml").read_text("utf-8")


@pytest.mark.parametrize("name", ["plain", 'a "quoted" $base name', "图像"])
def test_the_configuration_is_valid_with_absolute_paths_inside_the_folder(cli, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    assert cli("demo", folder, "--prepare-only").code == 0
    settings = load_settings(folder / "sdxl.toml")
    keys = settings.config
    paths = [keys.pretrained_model_name_or_path, *keys.image_dirs, *keys.metadata_files, keys.tokenizer_cache_dir, keys.sample_benchmark]
    assert [Path(str(path)).parent for path in (*paths, keys.output_dir)] == [folder] * 6
    assert settings.warnings == ()
    assert keys.num_train_epochs == settings.values["sample_every_n_epochs"]  # drawn before the first step and after the last


def test_the_demo_trains_on_what_the_base_has_not_seen_and_draws_that_and_what_it_knows(cli, tmp_path: Path) -> None:
    assert cli("demo", tmp_path / "demo", "--prepare-only").code == 0
    captions = packaged_captions()
    split = split_pictures(captions)
    metadata = json.loads((tmp_path / "demo" / "metadata.json").read_text("utf-8"))
    assert metadata == {key: {"caption": captions[key]} for key in split.new}
    pictures = {path.stem: Image.open(path) for path in (tmp_path / "demo" / "images").iterdir()}
    assert pictures.keys() == metadata.keys()
    assert all(np.array_equal(np.asarray(picture), np.asarray(on_canvas(packaged_picture(key)))) for key, picture in pictures.items())
    entries = json.loads((tmp_path / "demo" / "benchmark.json").read_text("utf-8"))
    assert [entry["prompt"] for entry in entries[:24]] == [captions[key] for key in split.new]
    assert [(entry["width"], entry["height"]) for entry in entries[:24]] == [pictures[key].size for key in split.new]
    old = {entry["prompt"] for entry in entries[24:]}
    assert len(old) == 20 and old <= {captions[key] for key in split.base}
    assert len({entry["seed"] for entry in entries}) == 44


def test_the_packaged_base_is_an_sdxl_file_in_fp16_below_32_mb_that_says_what_it_predicts() -> None:
    from safetensors import safe_open

    path = str(resources.files("sdxl_train") / "demo_data" / "base.safetensors")
    assert Path(path).stat().st_size <= 32_000_000
    with safe_open(path, "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["prediction_type"] == "v_prediction"
    mark = {"v_pred"}  # an empty tensor by which ComfyUI knows a model that predicts v
    assert {dtype for name, dtype in dtypes.items() if name not in mark} <= {"F16", "I64"} and mark <= dtypes.keys()
    assert {name.split(".")[0] for name in dtypes.keys() - mark} == {"conditioner", "first_stage_model", "model"}


def test_the_curve_falls_where_the_losses_do_and_one_loss_draws_nothing() -> None:
    curve = np.asarray(loss_curve([1.0] * 50 + [0.1] * 50, (400, 200)))
    blue = (curve == (65, 105, 225)).all(axis=2)
    rows = [np.flatnonzero(blue[:, x]).mean() for x in (60, 340)]
    assert rows[0] < 60 and rows[1] > 130  # row 44 is the largest loss, row 156 is 0
    assert (np.asarray(loss_curve([1.0], (400, 200))) == 255).all()


def test_the_pictures_come_with_their_notice_and_licence_and_stay_small() -> None:
    packaged = resources.files("sdxl_train") / "demo_data"
    notice = (packaged / "NOTICE.md").read_text("utf-8")
    assert "Copyright (c) Microsoft Corporation" in notice and "Copyright (c) 2023 LobeHub" in notice
    assert "Permission is hereby granted" in notice and 'PROVIDED "AS IS"' in notice
    assert sum(len(picture.read_bytes()) for picture in (packaged / "images").iterdir()) < 2_500_000


def test_a_second_run_keeps_what_is_there_and_writes_what_is_missing(cli, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert cli("demo", folder, "--prepare-only").code == 0
    first = hashes(folder)
    config = folder / "sdxl.toml"
    config.write_text(config.read_text("utf-8").replace("batch_size = 8", "batch_size = 4"), "utf-8")
    (folder / "base.safetensors").unlink()
    (folder / "images" / "raccoon.png").unlink()
    (folder / "images" / "mine.png").write_bytes(b"mine")
    edited = hashes(folder)
    ended = cli("demo", folder, "--prepare-only")
    assert ended.code == 0 and "kept as found: sdxl.toml, benchmark.json" in ended.out
    assert hashes(folder) == {**first, **edited}


@pytest.mark.parametrize("name", ["mine.txt", "sdxl.toml", "base.safetensors"])
def test_a_folder_that_is_no_demo_is_refused_and_left_alone(cli, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    ended = cli("demo", tmp_path)
    assert ended.code == 2 and "not empty" in ended.err and "sdxl-train demo DIR" in ended.err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}


def test_a_file_in_place_of_the_folder_is_named(cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ended = cli("demo", tmp_path / "file" / "demo", "--prepare-only")
    assert ended.code == 2 and str(tmp_path / "file") in ended.err and "Traceback" not in ended.err
