import os
import struct
from pathlib import Path

import pytest
from PIL import Image

from sdxl_train.sample_benchmark import SampleEntry
from sdxl_train.sample_files import (
    comparison_sheet,
    contact_sheet,
    evaluation_picture_name,
    latents_picture_name,
    parameters_text,
    round_directory,
    training_picture_name,
    write_png,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def entry(**fields) -> SampleEntry:
    given = {
        "prompt": "a cat", "negative_prompt": "", "steps": 28, "batch_size": 1, "batch_count": 1, "scale": 7.5, "seed": 42, "width": 832,
        "height": 1216, "original_width": None, "original_height": None, "original_scale_factor": 1.0, "save_latents": False,
    }  # fmt: skip
    return SampleEntry(**{**given, **fields})


def png_chunks(path: Path) -> list[tuple[str, bytes]]:
    raw, chunks, at = path.read_bytes(), [], 8
    while at < len(raw):
        length, kind = struct.unpack(">I4s", raw[at : at + 8])
        chunks.append((kind.decode(), raw[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def test_names_of_training_pictures():
    assert round_directory("step", 2, 150) == "step_150"
    assert round_directory("train_end", 2, 150) == "step_150"
    assert round_directory("epoch", 2, 150) == "epoch_2"
    assert training_picture_name("step", 2, 150, "20240412205011", 3, 0) == "sample_20240412205011_000150_03.png"
    assert training_picture_name("epoch", 2, 150, "20240412205011", 3, 1) == "sample_20240412205011_e000002_03-1.png"


def test_names_of_other_pictures():
    assert evaluation_picture_name(7, 0) == "0007-0.png"
    assert latents_picture_name(7, 1, 951.73, 2) == "0007-1-t=952-i=2.png"


def test_parameters_of_a_training_picture():
    given = entry(negative_prompt="bad", original_width=1000, original_height=2000)
    assert parameters_text(given, 43, "euler_a", epoch=2, step=150) == (
        "a cat\nNegative prompt: bad\n"
        "Steps: 28, Sampler: euler_a, CFG scale: 7.5, Seed: 43, Size: 832x1216, Original size: 1000x2000, Epoch: 2, Step: 150"
    )


def test_parameters_without_negative_prompt_and_training_leave_these_out():
    assert parameters_text(entry(), 42, "ddim") == (
        "a cat\nSteps: 28, Sampler: ddim, CFG scale: 7.5, Seed: 42, Size: 832x1216, Original size: 832x1216"
    )


@pytest.mark.parametrize(
    ("prompt", "kind"), [("café\nsecond line", "tEXt"), ("一只猫", "iTXt"), ("x" * 2_000_000, "tEXt"), ("猫" * 700_000, "iTXt")]
)
def test_a_png_is_one_frame_with_its_text_as_text_or_international_text(tmp_path, prompt, kind):
    path = tmp_path / "new/folder/a.png"
    write_png(path, Image.new("RGB", (8, 8), RED), prompt)
    chunks = png_chunks(path)
    (raw,) = [data for name, data in chunks if name == kind]
    assert raw.startswith(b"parameters\0") and raw.endswith(prompt.encode("latin-1" if kind == "tEXt" else "utf-8"))
    assert not {name for name, _ in chunks} & {"acTL", "fdAT", "zTXt"}
    with Image.open(path) as image:
        image.load()
        assert image.getpixel((0, 0)) == RED and image.text["parameters"] == prompt and getattr(image, "n_frames", 1) == 1
    assert [name.name for name in path.parent.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_png(path, Image.new("RGB", (8, 8), RED), "first")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_png(path, Image.new("RGB", (8, 8), BLUE), "second")
    with Image.open(path) as image:
        assert image.text["parameters"] == "first"
    assert [name.name for name in tmp_path.iterdir()] == ["a.png"]


def colours(sheet: Image.Image) -> dict[tuple[int, ...], int]:
    counted = sheet.getcolors(sheet.width * sheet.height)
    assert counted is not None
    return {colour: count for count, colour in counted}


def test_a_contact_sheet_shows_every_picture_whole_and_every_caption():
    images = [Image.new("RGB", (64, 96), RED), Image.new("RGB", (64, 32), BLUE), Image.new("RGB", (64, 64), RED)]
    captioned, plain = colours(contact_sheet(images, ["one", "two", "three"])), colours(contact_sheet(images, ["", "", ""]))
    assert captioned[RED] == plain[RED] == 64 * 96 + 64 * 64
    assert captioned[BLUE] == 64 * 32
    assert (0, 0, 0) not in plain and captioned[0, 0, 0] > 20


def test_large_pictures_are_reduced_and_small_ones_are_not_enlarged():
    sheet = contact_sheet([Image.new("RGB", (2000, 1000), RED), Image.new("RGB", (50, 50), BLUE)], ["", ""], max_side_px=100)
    assert colours(sheet)[RED] == 100 * 50 and colours(sheet)[BLUE] == 50 * 50


@pytest.mark.parametrize("caption", ["一只猫 \x1b[31m \ud800", "w" * 5000, "word " * 100_000])
def test_any_caption_can_be_drawn_without_touching_the_picture(caption):
    sheet = contact_sheet([Image.new("RGB", (300, 64), RED)], [caption])
    assert sheet.width == 300 + 2 * 8
    assert colours(sheet)[RED] == 300 * 64


def test_a_caption_that_is_too_long_ends_in_dots_and_differs_by_what_it_shows():
    short, long, other = (contact_sheet([Image.new("RGB", (64, 64))], [text]) for text in ("猫 a", "猫 b", "b"))
    assert len({short.tobytes(), long.tobytes(), other.tobytes()}) == 3


def test_a_comparison_sheet_has_a_row_for_each_prompt_and_shows_missing_pictures_as_such():
    red, blue = Image.new("RGB", (64, 64), RED), Image.new("RGB", (64, 64), BLUE)
    sheet = comparison_sheet(["before", "after"], [("a cat", [red, blue]), ("a dog", [red, None])])
    assert colours(sheet)[RED] == 2 * 64 * 64 and colours(sheet)[BLUE] == 64 * 64
    red_columns, blue_columns = ({x for x in range(sheet.width) for y in range(sheet.height) if sheet.getpixel((x, y)) == c} for c in (RED, BLUE))
    assert max(red_columns) < min(blue_columns)
    with pytest.raises(ValueError):
        comparison_sheet(["before", "after"], [("a cat", [red])])
