"""Data that are unusual and right: they train as they are meant, and what is left out is counted."""

import io
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_files import encoded, noise, with_chunk, write_good
from command_runs import WATCH, Ended, contents, read_seen, run_command, watched_run, write_config
from PIL import Image, ImageCms

SIZE = (64, 64)


def smooth(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A soft colour picture that differs in all four corners. [h, w, 3] uint8"""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC))


def exif(orientation: int) -> bytes:
    """An Exif block that says nothing but the orientation."""
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours under an opacity, both uint8, seen on white. [h, w, 3] uint8"""
    share = alpha[..., None] / 255.0
    return np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)


def apng_of_one_frame(png: bytes) -> bytes:
    """The PNG with the mark of an animation that has a single frame."""
    return with_chunk(png, b"acTL", (1).to_bytes(4, "big") + bytes(4))


def stored_and_meant() -> dict[str, tuple[bytes, str, np.ndarray]]:
    """{key: (the file, its extension, the picture that it means)}, each made without the program's own code."""
    picture, alpha = smooth(1), np.tile(np.linspace(0, 255, SIZE[0]).astype(np.uint8), (SIZE[1], 1))
    grey = picture[..., 0]
    stored: dict[str, tuple[bytes, str, np.ndarray]] = {}
    # What a viewer does to the stored pixels, Exif 2.32, tag 0x0112.
    upright: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: p.swapaxes(0, 1)[:, ::-1],
        7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
        8: lambda p: p.swapaxes(0, 1)[::-1],
    }
    wide = smooth(2, (96, 48))
    for orientation, view in upright.items():
        png = encoded(Image.fromarray(wide), "PNG", exif=exif(orientation))
        stored[f"exif{orientation}"] = (png, "png", view(wide))
        jpeg = encoded(Image.fromarray(wide), "JPEG", exif=exif(orientation), quality=95)
        decoded = np.asarray(Image.open(io.BytesIO(jpeg)))
        stored[f"exif{orientation}_jpeg"] = (jpeg, "jpg", view(decoded))

    def add(key: str, image: Image.Image, meant: np.ndarray, kind: str = "PNG", **options: Any) -> None:
        stored[key] = (encoded(image, kind, **options), {"JPEG": "jpg"}.get(kind, kind.lower()), meant)

    def three(values: np.ndarray) -> np.ndarray:
        return np.stack([values] * 3, -1)

    add("grey", Image.fromarray(grey), three(grey))
    add("grey_alpha", Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), on_white(three(grey), alpha))
    add("rgba", Image.fromarray(np.dstack([picture, alpha])), on_white(picture, alpha))
    add("rgba_webp", Image.fromarray(np.dstack([picture, alpha])), on_white(picture, alpha), "WEBP", lossless=True, exact=True)
    bits = grey > 128
    add("one_bit", Image.fromarray(bits), three(np.where(bits, 255, 0).astype(np.uint8)))
    deep = grey.astype(np.uint16) * 257
    add("deep_grey", Image.fromarray(deep), three(grey))
    palette = Image.fromarray(picture).quantize(4)
    colours = np.asarray(palette.convert("RGB"))
    clear = int(np.bincount(np.asarray(palette).ravel()).argmax())
    add("palette", palette, colours)
    add("palette_clear", palette, np.where((np.asarray(palette) == clear)[..., None], 255, colours).astype(np.uint8), transparency=clear)
    add("bmp", Image.fromarray(picture), picture, "BMP")
    ink = np.dstack([255 - picture, np.zeros(SIZE[::-1], np.uint8)])  # cyan, magenta and yellow without black: red, green and blue reversed
    cmyk = encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=100, subsampling=0)
    stored["cmyk"] = (cmyk, "jpg", 255 - np.asarray(Image.open(io.BytesIO(cmyk)))[..., :3])
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    add("with_srgb", Image.fromarray(picture), picture, icc_profile=srgb)
    stored["one_frame_apng"] = (apng_of_one_frame(encoded(Image.fromarray(picture), "PNG")), "png", picture)
    stored["bytes_behind"] = (encoded(Image.fromarray(picture), "PNG") + b"behind the end", "png", picture)
    return stored


@pytest.fixture(scope="module")
def latents_of_modes(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    """{key: arrays of the cache of (the odd file, a plain PNG of what it means, a plain PNG of what a careless reader sees)}."""
    folder = tmp_path_factory.mktemp("modes")
    files = stored_and_meant()
    for place in ("odd", "plain", "careless"):
        (folder / place).mkdir()
    for key, (data, extension, meant) in files.items():
        (folder / "odd" / f"{key}.{extension}").write_bytes(data)
        Image.fromarray(np.ascontiguousarray(meant)).save(folder / "plain" / f"{key}.png")
        with Image.open(io.BytesIO(data)) as image:
            Image.fromarray(np.asarray(image.convert("RGB"))).save(folder / "careless" / f"{key}.png")
    for place in ("odd", "plain", "careless"):
        ended = run_command("cache", write_config(folder / f"run_{place}", tiny_base, [folder / place], flip_aug=False))
        assert ended.code == 0, ended.err[-3000:]
    return {key: tuple(dict(np.load(folder / place / f"{key}.npz")) for place in ("odd", "plain", "careless")) for key in files}


def test_every_colour_mode_and_orientation_is_encoded_as_the_picture_that_it_means(latents_of_modes) -> None:
    wrong = {}
    for key, (odd, plain, _) in latents_of_modes.items():
        distance = np.abs(odd["latents"] - plain["latents"]).max() if odd["latents"].shape == plain["latents"].shape else np.inf
        if not distance < 0.02 * np.abs(plain["latents"]).max() or odd["original_size"].tolist() != plain["original_size"].tolist():
            wrong[key] = distance
    assert not wrong


def test_the_comparison_would_see_a_careless_reader(latents_of_modes) -> None:
    cared_for = [*(f"exif{i}" for i in range(2, 9)), "grey_alpha", "rgba", "rgba_webp", "deep_grey", "palette_clear"]
    unseen = []
    for key in cared_for:
        _, plain, careless = latents_of_modes[key]
        if plain["latents"].shape == careless["latents"].shape:
            distance = np.abs(plain["latents"] - careless["latents"]).max()
            unseen += [] if distance > 0.05 * np.abs(plain["latents"]).max() else [key]
    assert not unseen


def test_an_orientation_that_lies_on_its_side_swaps_the_bucket(latents_of_modes) -> None:
    shapes = {i: latents_of_modes[f"exif{i}"][0]["latents"].shape for i in range(2, 9)}
    assert {i for i, (_, height, width) in shapes.items() if height > width} == {5, 6, 7, 8}
    assert all(latents_of_modes[f"exif{i}"][0]["original_size"].tolist() == ([48, 96] if i > 4 else [96, 48]) for i in range(2, 9))


NAMES = {
    "with spaces": "with spaces.png",
    unicodedata.normalize("NFC", "é"): unicodedata.normalize("NFC", "é") + ".png",
    unicodedata.normalize("NFD", "é"): unicodedata.normalize("NFD", "é") + ".png",
    "line\nfeed": "line\nfeed.png",
    "-dash": "-dash.png",
    "--set": "--set.png",
    "x" * 251: "x" * 251 + ".png",
    "猫" * 83: "猫" * 83 + ".png",
    os.fsdecode(b"\xff\xfe byte"): os.fsdecode(b"\xff\xfe byte.png"),
    "a.b": "a.b.jpg",
    "a.c": "a.c.jpg",
    "case": "case.png",
    "CASE": "CASE.png",
    "upper": "upper.PNG",
    "mixed": "mixed.JpEg",
    "\x1b[31mred\x1b[2J": "\x1b[31mred\x1b[2J.png",
    "{img.__class__}%s": "{img.__class__}%s.webp",
    "tab\tand\rreturn": "tab\tand\rreturn.bmp",
}
SIZES = {"line": (4000, 1), "post": (1, 3000), "dot": (1, 1), "small": (31, 33)}


@pytest.fixture(scope="module")
def odd_names(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, list[dict[str, Any]], Path]:
    """A training on names and sizes of every kind in two roots, nested folders and one behind a link; (its end, samples, first root)."""
    folder = tmp_path_factory.mktemp("odd")
    first, second, elsewhere = folder / "first", folder / "second", folder / "elsewhere"
    for number, (key, name) in enumerate(NAMES.items()):
        place = first if number % 2 else second / "deep" / "er"
        place.mkdir(parents=True, exist_ok=True)
        data = encoded(
            noise(number),
            {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG"}.get(name[-4:].strip(".").lower(), name[name.rindex(".") + 1 :].upper()),
        )
        (place / name).write_bytes(data)
        (place / f"{key}.txt").write_bytes(f"caption {number}".encode())
    for key, size in SIZES.items():
        noise(1, size).save(first / f"{key}.png")
        (first / f"{key}.txt").write_text(f"size {key}")
    elsewhere.mkdir()
    noise(2).save(elsewhere / "behind_link.png")
    (first / "link").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(first, target_is_directory=True)  # a loop
    (first / "a folder.png").mkdir()
    noise(3).save(first / "a folder.png" / "in_folder.png")
    for left_out in (first / ".hidden.png", first / ".folder" / "x.png", second / ".cut.jpg"):
        left_out.parent.mkdir(exist_ok=True)
        noise(4).save(left_out)
    (second / "notes.md").write_text("no data")
    before = contents(first) | contents(second)
    ended, seen = watched_run(folder / "run", tiny_base, [first, second], max_token_length=75)
    after = contents(first) | contents(second)
    assert {path: after[path] for path in before} == before
    assert all(path.endswith(b".npz") for path in after.keys() - before.keys())
    return ended, seen, first


def test_any_name_and_any_size_trains(odd_names) -> None:
    ended, seen, _ = odd_names
    assert ended.code == 0, ended.err[-3000:]
    expected = {*NAMES, *SIZES, "behind_link", "in_folder"}
    trained = Counter(sample["key"] for sample in seen)
    assert trained == dict.fromkeys(expected, 1)
    captions = {sample["key"]: sample["caption"] for sample in seen}
    assert all(captions[key] == f"caption {number}" for number, key in enumerate(NAMES))


def test_any_name_is_cached_beside_its_picture(odd_names) -> None:
    _, _, first = odd_names
    second = first.parent / "second" / "deep" / "er"
    for number, key in enumerate(NAMES):
        assert ((first if number % 2 else second) / f"{key}.npz").is_file(), ascii(key)


def test_extreme_shapes_get_buckets_of_their_own(odd_names) -> None:
    _, seen, _ = odd_names
    buckets = {sample["key"]: tuple(sample["target_size"]) for sample in seen if sample["key"] in SIZES}
    # No picture covers a bucket of the list, so each has its own: sides rounded down to 32, at least 32, area at most 64 * 64.
    assert buckets == {"line": (32, 128), "post": (128, 32), "dot": (32, 32), "small": (32, 32)}


def test_names_cannot_command_the_terminal(odd_names, tiny_base: Path, tmp_path: Path) -> None:
    ended, _, _ = odd_names
    noise(1).save(tmp_path / "\x1b[31mred.png")
    noise(1).save(tmp_path / "new\nline.png")
    silent = run_command(write_config(tmp_path / "run", tiny_base, [tmp_path]))
    assert silent.code == 0, silent.err[-3000:]
    assert "\\x1b[31mred" in silent.err and "new\\nline" in silent.err, "they are named for having no caption"
    for text in (ended.err, silent.err):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_hidden_names_are_counted(odd_names) -> None:
    ended, _, _ = odd_names
    assert re.search(r"\b3\b[^\n]*(hidden|dot)", ended.err), ended.err[-2000:]


def test_the_folder_of_a_run_is_no_data_and_is_counted(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    good = write_good(data)
    ended, seen = watched_run(tmp_path, tiny_base, [data], output_dir=str(data / "out"))
    assert ended.code == 0, ended.err[-3000:]
    (data / "out" / "samples" / "step_0").mkdir(parents=True, exist_ok=True)
    noise(1).save(data / "out" / "samples" / "step_0" / "sample.png")
    again, both = watched_run(tmp_path, tiny_base, [data], output_dir=str(tmp_path / "another"))
    assert again.code == 0, again.err[-3000:]
    assert sorted(sample["key"] for sample in both[len(seen) :]) == good
    assert re.search(r"\b1\b[^\n]*run[^\n]*data/out", again.err)


def test_captions_with_bom_and_crlf_are_read_cleanly_and_empty_ones_are_counted_once(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_good(data, 6)
    (data / "fine0.txt").write_bytes(b"\xef\xbb\xbfa cat,\r\non a mat\r\n")
    (data / "fine1.txt").write_bytes(b"")
    (data / "fine2.txt").write_bytes(b" \n\t ")
    (data / "fine3.txt").unlink()
    ended, seen = watched_run(tmp_path, tiny_base, [data], num_train_epochs=3)
    assert ended.code == 0, ended.err[-3000:]
    captions = {sample["key"]: sample["caption"] for sample in seen}
    assert captions == {
        "fine0": "a cat,\non a mat",
        "fine1": "",
        "fine2": "",
        "fine3": "",
        "fine4": "fine, number 4",
        "fine5": "fine, number 5",
    }
    warnings = [line for line in ended.err.splitlines() if line.startswith("warning") and "caption" in line]
    assert len(warnings) == 1 and "3 pictures" in warnings[0] and all(f"fine{i}" in warnings[0] for i in (1, 2, 3))
    assert re.search(r"\b3\b[^\n]*without any text", ended.err), "the summary counts them"


def test_a_caption_of_1_mb_with_control_characters_trains(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_good(data)
    text = "\x1b[31mred\x1b]0;title\x07 a\rb, " + "a tag \x1b[2J, " * 80_000
    (data / "fine1.txt").write_text(text, newline="")
    ended, seen = watched_run(tmp_path, tiny_base, [data])
    assert ended.code == 0, ended.err[-3000:]
    (caption,) = [sample["caption"] for sample in seen if sample["key"] == "fine1"]
    assert caption == text.replace("\r", "").strip()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", ended.err)
    assert re.search(r"1 pictures? with[^\n]*fine1", ended.err), "it is counted as cut"


@pytest.mark.slow
def test_the_locale_changes_nothing(process, tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "数据"
    data.mkdir()
    for i, name in enumerate(("猫", "é", "plain")):
        noise(i).save(data / f"{name}.png")
        (data / f"{name}.txt").write_bytes("一只猫, naïve".encode())
    (tmp_path / "元.json").write_bytes(json.dumps({"猫": {"description": "描述"}, "plain": {}}, ensure_ascii=False).encode())
    keys = {"metadata_files": [str(tmp_path / "元.json")], "output_name": "模型"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "watch.py").write_text(WATCH)
    file = write_config(tmp_path / "run", tiny_base, [data], plugins=[f"{tmp_path}/run/watch.py:Watch"], **keys)
    child = process(file, LC_ALL="C", LANG="C", PYTHONIOENCODING="")
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err[-3000:]
    assert {sample["key"]: sample["caption"] for sample in read_seen(tmp_path / "run")} == {"猫": "描述", "plain": ""}
