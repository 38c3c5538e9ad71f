"""What `sdxl-train demo --prepare-only` writes, and that it takes nothing of a user's. Also the demo's VAE, which is built by hand."""

import hashlib
import json
import socket
from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdxl_train.config import load_settings
from sdxl_train.demo_base import write_demo_base

WRITTEN = {"base.safetensors", "metadata.json", "benchmark.json", "sdxl.toml", "NOTICE.md"}


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "base.safetensors"
    write_demo_base(path)
    return path


@pytest.fixture(scope="module")
def vae(base: Path):
    from sdxl_train.model.single_file import load_vae, open_checkpoint

    return load_vae(open_checkpoint(str(base), None), torch.float32).eval()


def test_preparing_writes_the_same_files_each_time_and_only_the_paths_differ(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)  # offline
    monkeypatch.chdir(tmp_path)
    for folder in ("a demo", "b"):
        assert cli("demo", folder, "--prepare-only").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a demo", "b"}
    written, again = hashes(tmp_path / "a demo"), hashes(tmp_path / "b")
    assert {name for name in written if not name.startswith("images/")} == WRITTEN
    assert sum(name.startswith("images/") for name in written) == 96
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


def test_every_picture_has_metadata_and_every_prompt_is_a_caption(cli, tmp_path: Path) -> None:
    assert cli("demo", tmp_path / "demo", "--prepare-only").code == 0
    metadata = json.loads((tmp_path / "demo" / "metadata.json").read_text("utf-8"))
    pictures = {path.stem: Image.open(path).size for path in (tmp_path / "demo" / "images").iterdir()}
    assert {key: tuple(fields["original_size"]) for key, fields in metadata.items()} == pictures
    prompts = {entry["prompt"] for entry in json.loads((tmp_path / "demo" / "benchmark.json").read_text("utf-8"))}
    assert prompts <= {fields["caption"] for fields in metadata.values()}


def test_the_pictures_come_with_their_notice_and_licence_and_stay_small() -> None:
    packaged = resources.files("sdxl_train") / "demo_data"
    notice = (packaged / "NOTICE.md").read_text("utf-8")
    assert "Copyright (c) Microsoft Corporation" in notice and "Copyright (c) 2023 LobeHub" in notice
    assert "Permission is hereby granted" in notice and 'PROVIDED "AS IS"' in notice
    assert sum(len(picture.read_bytes()) for picture in (packaged / "images").iterdir()) < 700_000


def test_a_second_run_keeps_what_is_there_and_writes_what_is_missing(cli, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert cli("demo", folder, "--prepare-only").code == 0
    first = hashes(folder)
    config = folder / "sdxl.toml"
    config.write_text(config.read_text("utf-8").replace("batch_size = 16", "batch_size = 4"), "utf-8")
    (folder / "base.safetensors").unlink()
    (folder / "images" / "apple.webp").unlink()
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


@torch.no_grad()
def test_the_vae_gives_one_colour_back(vae) -> None:
    """A picture of one colour has no detail to lose, so it comes back as it was, at the borders too only for white (zeros lie around it)."""
    from sdxl_train.model.sdxl import decode_latents, encode_latents

    for colour in ([1.0, 1.0, 1.0], [-1.0, -1.0, -1.0], [0.8, -0.4, 0.1]):
        pixels = torch.tensor(colour)[None, :, None, None].expand(1, 3, 64, 96)
        decoded = decode_latents(vae, encode_latents(vae, pixels, None))
        inner = slice(24, -24)
        torch.testing.assert_close(decoded[..., inner, inner], pixels[..., inner, inner], atol=0.03, rtol=0)
    white = torch.ones(1, 3, 64, 64)
    torch.testing.assert_close(decode_latents(vae, encode_latents(vae, white, None)), white, atol=0.03, rtol=0)


@torch.no_grad()
def test_the_scaled_latents_of_the_pictures_have_mean_0_and_deviation_1(vae) -> None:
    from sdxl_train.data.buckets import place
    from sdxl_train.data.encoding import as_vae_input
    from sdxl_train.data.images import load_pixels
    from sdxl_train.model.sdxl import encode_latents

    latents = []
    for picture in sorted(Path(str(resources.files("sdxl_train") / "demo_data" / "images")).iterdir()):
        pixels = load_pixels(str(picture), place(Image.open(picture).size, 128, 32), 10**6)
        latents.append(encode_latents(vae, as_vae_input(torch.from_numpy(pixels).permute(2, 0, 1)[None]), None)[0].flatten(1))
    values = torch.cat(latents, 1)
    torch.testing.assert_close(values.mean(1), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(values.std(1), torch.ones(4), atol=0.02, rtol=0)
