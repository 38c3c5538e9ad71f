"""What one start finds out is used by the next, as long as the files are what they were."""

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_train.data import indexing
from sdxl_train.data.index import Index
from sdxl_train.data.indexing import Indexed, build_index
from sdxl_train.data.records import read_records, write_records
from sdxl_train.keys import Config


class Plugins:
    """No plugin is named: every datum once."""

    def only_default_answers(self, key, hook):
        return True


class Repeats:
    """Stands for the plugins: two repeats for every datum."""

    def __init__(self) -> None:
        self.hooks, self.asked = self, []

    def only_default_answers(self, key, hook):
        return False

    def many_calls(self, key):
        return nullcontext()

    def count_repeats(self, img_key, img_md, counter):
        self.asked.append(img_key)
        return 2


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures whose header is read."""
    names: list[str] = []
    real = indexing.image_header

    def image_header(path: str, max_pixels: int) -> tuple[int, int]:
        names.append(os.path.basename(path))
        return real(path, max_pixels)

    monkeypatch.setattr(indexing, "image_header", image_header)
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures a, b and c with captions, in a folder that has not changed for a while."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, key in enumerate("abc"):
        Image.new("RGB", (64 + 32 * i, 64)).save(folder / f"{key}.png")
        (folder / f"{key}.txt").write_text(f"cat {key}, artist:me")
    age(folder)
    return folder


def age(folder: Path) -> None:
    """As if it had been changed an hour ago."""
    os.utime(folder, (time.time() - 3600,) * 2)


def config(folder: Path, **keys: Any) -> Config:
    given = {"pretrained_model_name_or_path": "base", "output_dir": "out", "image_dirs": [str(folder)], "resolution": 128}
    return Config(**(given | keys))


def start(folder: Path, records: Path, plugins: Any = None, **keys: Any) -> Indexed:
    """One start of a run: the index, made with what the records know, and then recorded."""
    problems: list[Any] = []
    indexed = build_index(config(folder, **keys), plugins or Plugins(), read_records(records), lambda text: None, problems)  # type: ignore[arg-type]
    assert not problems
    write_records(records, indexed.index, indexed.inputs)
    return indexed


def content(index: Index) -> list[Any]:
    return [(index.info(i), index.placement(i), index.crop(i, True)) for i in range(len(index))] + [index.counter, index.summary]


def test_a_start_after_nothing_changed_reads_no_picture_and_finds_the_same(folder, tmp_path, opened):
    first = start(folder, tmp_path / "records")
    assert sorted(opened) == ["a.png", "b.png", "c.png"] and first.is_new
    opened.clear()
    second = start(folder, tmp_path / "records")
    assert opened == [] and not second.is_new
    assert content(second.index) == content(first.index)


def test_the_index_is_opened_once_so_that_its_header_and_its_columns_are_of_one_file(folder, tmp_path, monkeypatch):
    start(folder, tmp_path / "records")
    opened, real = [], open
    monkeypatch.setattr("builtins.open", lambda path, *given, **named: (opened.append(str(path)), real(path, *given, **named))[1])
    assert read_records(tmp_path / "records") is not None
    assert len([path for path in opened if path.endswith("index.safetensors")]) == 1


def test_only_a_changed_picture_is_read_again(folder, tmp_path, opened):
    start(folder, tmp_path / "records")
    opened.clear()
    Image.new("RGB", (64, 128)).save(folder / "b.png")
    age(folder)
    again = start(folder, tmp_path / "records")
    assert opened == ["b.png"] and again.is_new
    assert again.index.info(1).image_size == (64, 128) and again.index.info(1).bucket_size == (64, 128)


def test_a_picture_of_the_same_size_and_time_is_noticed_by_its_inode(folder, tmp_path, opened):
    start(folder, tmp_path / "records")
    opened.clear()
    status = (folder / "a.png").stat()
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    os.utime(tmp_path / "other.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(tmp_path / "other.png", folder / "a.png")
    age(folder)
    start(folder, tmp_path / "records")
    assert opened == ["a.png"]


def test_new_lost_and_renamed_pictures_are_noticed_and_the_others_not_read(folder, tmp_path, opened):
    start(folder, tmp_path / "records")
    opened.clear()
    Image.new("RGB", (64, 64)).save(folder / "d.png")
    (folder / "c.png").rename(folder / "e.png")
    again = start(folder, tmp_path / "records")
    assert sorted(opened) == ["d.png", "e.png"] and list(again.index.keys) == ["a", "b", "d", "e"]


@pytest.mark.parametrize("change", ["edited", "removed", "added"])
def test_a_changed_caption_is_noticed(folder, tmp_path, opened, change):
    (folder / "c.txt").unlink()
    age(folder)
    start(folder, tmp_path / "records")
    opened.clear()
    if change == "edited":
        (folder / "a.txt").write_text("dog, artist:you")
    elif change == "removed":
        (folder / "a.txt").unlink()
    else:
        (folder / "c.txt").write_text("dog")
    age(folder)
    index = start(folder, tmp_path / "records").index
    assert opened == []
    expected = {"edited": ["dog, artist:you", None], "removed": [None, None], "added": ["cat a, artist:me", "dog"]}[change]
    assert [index.info(0).caption, index.info(2).caption] == expected


def test_changed_metadata_and_other_keys_are_noticed(folder, tmp_path, opened):
    file = tmp_path / "m.json"
    file.write_text(json.dumps({key: {"image_path": str(folder / f"{key}.png"), "caption": key} for key in "ab"}))
    keys = {"metadata_files": [str(file)]}
    assert list(start(folder, tmp_path / "records", **keys).index.keys) == ["a", "b"]
    file.write_text(json.dumps({key: {"image_path": str(folder / f"{key}.png"), "caption": 2 * key} for key in "abc"}))
    index = start(folder, tmp_path / "records", **keys).index
    assert [index.info(i).caption for i in range(3)] == ["aa", "bb", "cc"]
    assert sorted(opened) == ["a.png", "b.png", "c.png"]
    assert start(folder, tmp_path / "records").index.info(0).caption == "cat a, artist:me"
    assert len(opened) == 3


def test_a_missing_picture_that_comes_back_is_found(tmp_path, folder):
    file = tmp_path / "m.json"
    file.write_text(json.dumps({key: {"image_path": str(tmp_path / "elsewhere" / f"{key}.png")} for key in "xy"} | {"a": {}}))
    keys = {"metadata_files": [str(file)]}
    assert start(folder, tmp_path / "records", **keys).index.missing == ["x", "y"]
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "elsewhere" / "y.png")
    assert start(folder, tmp_path / "records", **keys).index.missing == ["x"]


def test_another_resolution_places_the_pictures_anew_without_reading_them(folder, tmp_path, opened):
    start(folder, tmp_path / "records")
    opened.clear()
    index = start(folder, tmp_path / "records", resolution=64).index
    fresh = build_index(config(folder, resolution=64), Plugins(), None, lambda text: None, []).index  # type: ignore[arg-type]
    assert index.bucket_sizes.tolist() == fresh.bucket_sizes.tolist()
    assert sorted(opened) == ["a.png", "b.png", "c.png"]  # those of `fresh`


def test_a_lower_pixel_limit_is_noticed(folder, tmp_path):
    start(folder, tmp_path / "records")
    problems: list[Any] = []
    build_index(config(folder, max_image_pixels=5000), Plugins(), read_records(tmp_path / "records"), lambda text: None, problems)  # type: ignore[arg-type]
    assert [os.path.basename(problem.path) for problem in problems] == ["b.png", "c.png"]


def test_repeats_are_asked_at_every_start(folder, tmp_path):
    start(folder, tmp_path / "records")
    repeats = Repeats()
    assert start(folder, tmp_path / "records", repeats).index.num_repeats.tolist() == [2, 2, 2]
    assert repeats.asked == ["a", "b", "c"]
    assert start(folder, tmp_path / "records").index.num_repeats.tolist() == [1, 1, 1]


def test_the_files_for_people_hold_sizes_repeats_and_counts(folder, tmp_path):
    start(folder, tmp_path / "records", Repeats())
    sizes, repeats, counter = (
        json.loads((tmp_path / "records" / f"{name}.json").read_text()) for name in ("image_size", "num_repeats", "counter")
    )
    status = (folder / "b.png").stat()
    expected = {"size": [96, 64], "path": str(folder / "b.png"), "mtime_ns": status.st_mtime_ns, "bytes": status.st_size}
    assert sizes["b"] == expected and list(sizes) == ["a", "b", "c"]
    assert repeats == {"a": 2, "b": 2, "c": 2} and counter["artist"] == {"me": 3}


@pytest.mark.parametrize("fits", [True, False])
def test_sizes_in_image_size_json_are_used_where_path_time_and_bytes_match(folder, tmp_path, opened, fits):
    start(folder, tmp_path / "records")
    opened.clear()
    file = tmp_path / "records" / "image_size.json"
    sizes = json.loads(file.read_text())
    sizes["a"]["size"] = [128, 128]
    if not fits:
        sizes["a"]["mtime_ns"] += 1
    file.write_text(json.dumps(sizes))
    index = start(folder, tmp_path / "records").index
    assert opened == ([] if fits else ["a.png"])
    assert index.info(0).image_size == ((128, 128) if fits else (64, 64))


def test_caches_are_no_source_of_picture_sizes(tmp_path, folder):
    np.savez(folder / "alone.npz", latents=np.zeros((4, 8, 8), np.float32), original_size=np.array([64, 64]))
    age(folder)
    start(folder, tmp_path / "records")
    assert list(json.loads((tmp_path / "records" / "image_size.json").read_text())) == ["a", "b", "c"]
    assert list(start(folder, tmp_path / "records").index.keys) == ["a", "alone", "b", "c"]


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"\0" * len(raw), lambda raw: b"{}" * 50])
def test_damaged_records_are_as_good_as_none(folder, tmp_path, opened, damage):
    expected = content(start(folder, tmp_path / "records").index)
    for file in (tmp_path / "records").iterdir():
        file.write_bytes(damage(file.read_bytes()))
    opened.clear()
    assert content(start(folder, tmp_path / "records").index) == expected
    assert sorted(opened) == ["a.png", "b.png", "c.png"]


def test_a_bad_picture_is_looked_at_again_at_every_start(folder, tmp_path, opened):
    (folder / "d.png").write_bytes(b"")
    age(folder)
    start(folder, tmp_path / "records", bad_images="skip")
    opened.clear()
    assert start(folder, tmp_path / "records", bad_images="skip").index.summary.bad == 1
    assert opened == ["d.png"]
    Image.new("RGB", (64, 64)).save(folder / "d.png")
    assert start(folder, tmp_path / "records", bad_images="skip").index.summary.bad == 0


def test_mapped_columns_can_be_written_to_without_changing_the_file(folder, tmp_path):
    start(folder, tmp_path / "records")
    raw = (tmp_path / "records" / "index.safetensors").read_bytes()
    records = read_records(tmp_path / "records")
    assert records is not None and records.index is not None
    records.index.leave_out([1])
    assert records.index.num_repeats.tolist() == [1, 0, 1]
    assert (tmp_path / "records" / "index.safetensors").read_bytes() == raw
