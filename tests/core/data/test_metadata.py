import os

import pytest

from sdxl_train.data.metadata import complete, fields_from_tags, read_caption_file
from sdxl_train.errors import DataError


def write(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_complete_metadata_has_every_documented_field_and_passes_others_through():
    metadata = complete({"artist": "x", "mine": {"deep": 1}}, "p.png")
    texts = {"image_path", "caption", "description", "artist", "characters", "styles", "quality", "perceptual_hash", "safe_level"}
    documented = texts | {"aesthetic_score", "safe_rating", "original_size"}
    assert set(metadata) == documented | {"mine"}
    assert metadata["artist"] == "x" and metadata["mine"] == {"deep": 1} and metadata["image_path"] == "p.png"
    assert all(metadata[name] is None for name in documented - {"artist", "image_path"})


@pytest.mark.parametrize(
    ("row", "caption", "description"),
    [
        ({"tags": "t", "nl_caption": "n"}, "t", "n"),
        ({"caption": "c", "tags": "t", "description": "d", "nl_caption": "n"}, "c", "d"),
        ({"caption": None, "tags": "t"}, "t", None),
        ({"caption": "", "tags": "t"}, "t", None),
        ({"caption": " \n", "tags": "t", "description": "\t", "nl_caption": " n"}, "t", " n"),
        ({"caption": "c", "tags": ["x"]}, "c", None),
        ({"caption": ""}, "", None),
    ],
)
def test_tags_and_nl_caption_stand_in_for_absent_texts(row, caption, description):
    metadata = complete(row, None)
    assert (metadata["caption"], metadata["description"]) == (caption, description)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_never_opened_as_a_caption_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        read_caption_file(str(tmp_path / "pipe"))


def test_a_caption_file_loses_bom_carriage_returns_and_outer_space(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf  one, two\r\nthree \xe7\x8c\xab\r\n", "a.txt")
    assert read_caption_file(path) == "one, two\nthree 猫"


@pytest.mark.parametrize(
    "raw", ["größe".encode("latin-1"), "猫の絵".encode("shift-jis"), "cat".encode("utf-16"), "cat".encode("utf-16-le"), b"a\0b"]
)
def test_other_encodings_and_nul_are_refused(tmp_path, raw):
    with pytest.raises(DataError, match=r"a\.txt: it (is not UTF-8|holds a NUL)"):
        read_caption_file(write(tmp_path, raw, "a.txt"))


def test_tags_fill_the_fields_and_stay_in_the_caption():
    caption = "1girl, artist:some one, character:a b, best quality, character: c (d), style:oil, style:flat, low quality, ratio 3:4"
    assert fields_from_tags(caption) == {
        "caption": caption,
        "artist": "some one",
        "characters": "a b, c (d)",
        "styles": "oil, flat",
        "quality": "low",
    }
    assert fields_from_tags("cat") == {"caption": "cat"}
