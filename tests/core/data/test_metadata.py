import json
import os

import pytest

from sdxl_train.data.metadata import complete, fields_from_tags, read_caption_file, read_metadata_files
from sdxl_train.errors import DataError


def write(tmp_path, content, name="m.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(*paths):
    return {key: json.loads(row) for key, row in read_metadata_files(list(paths)).items()}


def refused(*paths) -> str:
    with pytest.raises(DataError) as caught:
        read_metadata_files(list(paths))
    return str(caught.value)


def test_files_merge_per_picture_and_per_field_and_the_later_wins(tmp_path):
    first = write(tmp_path, '{"a": {"caption": "old", "artist": "x"}, "b": {"caption": "b"}}', "1.json")
    second = write(tmp_path, '{"a": {"caption": "new", "more": [1]}, "c": {}}', "2.json")
    assert read(first, second) == {"a": {"caption": "new", "artist": "x", "more": [1]}, "b": {"caption": "b"}, "c": {}}
    assert read(second, first)["a"]["caption"] == "old"


def test_a_byte_order_mark_is_accepted(tmp_path):
    assert read(write(tmp_path, b'\xef\xbb\xbf{"a": {}}')) == {"a": {}}


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
        ({"caption": ""}, "", None),
    ],
)
def test_tags_and_nl_caption_stand_in_for_absent_texts(row, caption, description):
    metadata = complete(row, None)
    assert (metadata["caption"], metadata["description"]) == (caption, description)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"a": {"caption": "x"},\n "b": {"caption": "y', 2, "not JSON"),
        ('{"a": {},\n\n', 3, "not JSON"),
        ("", 1, "the end of the file"),
        ("[1]", 1, "expected {"),
        ('{"a": {}}\n{}', 2, "follows"),
        ('{"a": {},\n}', 2, 'expected "'),
        ('{"a": {"aesthetic_score":\n NaN}}', 2, "NaN"),
        ('{"a": {"mine": [1,\n -Infinity]}}', 2, "-Infinity"),
        ('{"a": {},\n"b": {},\n"a": {}}', 3, "twice"),
        ('{"a": {"caption": "x",\n"caption": "y"}}', 2, "twice"),
        ('{"a":\n [1]}', 2, "object"),
        ('{"x": {},\n "a": {"caption": 5}}', 2, "caption must be text, found 5"),
        ('{"a": {"tags": ["x"]}}', 1, "tags, used as caption"),
        ('{"a": {"aesthetic_score": true}}', 1, "aesthetic_score must be a number, found true"),
        ('{"a": {"aesthetic_score": 1e999}}', 1, "aesthetic_score"),
        ('{"a": {"original_size": [3]}}', 1, "original_size must be [w, h] in px, found [3]"),
        ('{"a": {"original_size": [3.0, 4]}}', 1, "original_size"),
        ('{"a": {"original_size": [0, 4]}}', 1, "original_size"),
        ('{"a": {"caption": "x\\u0000"}}', 1, "caption must be text"),
        ('{"a": {"caption": "\\ud800"}}', 1, "caption must be text"),
        ('{"a\\u0000": {}}', 1, "no file can have this name"),
        ('{"ok": {},\n"a": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}}", 2, "nested too deeply"),
        ('{"ok": {},\n"a": {"x": ' + "9" * 5000 + "}}", 2, "digits"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path, text, line, words):
    path = write(tmp_path, text)
    message = refused(path)
    assert f"{path}:{line}: " in message
    assert words in message


def test_a_value_that_only_looks_like_a_repetition_is_accepted(tmp_path):
    assert read(write(tmp_path, '{"a": {"caption": "caption"}, "b": {"a": "NaN, Infinity"}}'))["b"] == {"a": "NaN, Infinity"}


def test_all_problems_of_all_files_come_in_one_report(tmp_path):
    first = write(tmp_path, '{"a": {"caption": 1},\n"b": {"artist": 2}}', "1.json")
    second = write(tmp_path, b'{"a": {},\n"\xff": {}}', "2.json")
    missing, folder = str(tmp_path / "none.json"), str(tmp_path)
    message = refused(first, second, missing, folder)
    for place in (f"{first}:1", f"{first}:2", f"{second}:2", missing, folder):
        assert f"{place}: " in message
    assert "not UTF-8" in message and "No such file" in message and "not a regular file" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(str(tmp_path / "pipe"))
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
