import json
import os
import pickle
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_train.data.epoch_plan import epoch_plan
from sdxl_train.data.image_info import ImageInfo
from sdxl_train.data.images import load_pixels
from sdxl_train.data.index import Index
from sdxl_train.data.indexing import build_index, warn_of_silent_data
from sdxl_train.data.problems import refuse
from sdxl_train.errors import DataError, PluginError
from sdxl_train.keys import Config
from sdxl_train.plugins import Choice, Plugins


class Repeats:
    """Stands for the plugins: answers `count_repeats` from a dict and remembers what it was asked."""

    def __init__(self, answers: dict[str, int] | None = None) -> None:
        self.hooks = self
        self.answers = answers or {}
        self.asked: list[tuple[str, dict[str, Any], Any]] = []

    def only_default_answers(self, key, hook):
        return False

    def many_calls(self, key):
        return nullcontext()

    def count_repeats(self, img_key, img_md, counter):
        self.asked.append((img_key, img_md, counter))
        return self.answers.get(img_key, 1)


def picture(path: Path, size=(64, 48), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (len(path.name), 90, 200)).save(path, **options)
    return path


def text(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def config(tmp_path: Path, **keys: Any) -> Config:
    given = {"pretrained_model_name_or_path": "base", "output_dir": "out", "image_dirs": [str(tmp_path)], "resolution": 64}
    return Config(**(given | keys))


def build(tmp_path: Path, repeats: Repeats | None = None, warnings: list[str] | None = None, **keys: Any) -> Index:
    problems = []
    warn = ([] if warnings is None else warnings).append
    indexed = build_index(config(tmp_path, **keys), repeats or Repeats(), None, warn, problems)  # type: ignore[arg-type]
    refuse(problems)
    return indexed.index


def refused(tmp_path: Path, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        build(tmp_path, **keys)
    return str(caught.value)


def write_metadata(tmp_path: Path, rows: dict[str, Any], name="metadata.json") -> list[str]:
    return [str(text(tmp_path / name, json.dumps(rows)))]


def keys_of(index: Index) -> list[str]:
    """Of the data that are trained."""
    return [index.key(i) for i in np.flatnonzero(index.num_repeats)]


# ---- Search ----------------------------------------------------------------------------------------------------------------------


def test_all_roots_folders_and_letter_cases_are_found_once_and_sorted(tmp_path):
    for name in ("one/b.PNG", "one/deep/er/a.Jpg", "two/c.jpeg", "two/d.webp", "two/e.BMP"):
        picture(tmp_path / name)
    text(tmp_path / "one/notes.md", "no picture")
    roots = [str(tmp_path / "two"), str(tmp_path / "one"), str(tmp_path / "one/deep"), str(tmp_path / "two/")]
    assert keys_of(build(tmp_path, image_dirs=roots)) == ["a", "b", "c", "d", "e"]


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    picture(tmp_path / "elsewhere/a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "data")
    assert keys_of(build(tmp_path / "data")) == ["a"]


def test_hidden_names_and_folders_of_runs_are_left_out_and_counted(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / ".hidden.png")
    picture(tmp_path / ".cache/b.png")
    picture(tmp_path / "run/samples/step_0/c.png")
    (tmp_path / "run/logs").mkdir()
    text(tmp_path / "run/.lock", "")
    picture(tmp_path / "models/logs/d.png")  # names alone make no run
    warnings: list[str] = []
    index = build(tmp_path, warnings=warnings)
    assert keys_of(index) == ["a", "d"]
    assert str(tmp_path / "run") in warnings[0]
    assert (index.summary.hidden, index.summary.run_folders) == (2, 1)


def test_every_missing_folder_is_named(tmp_path):
    message = refused(tmp_path, image_dirs=[str(tmp_path / "x"), str(tmp_path), str(tmp_path / "y")])
    assert f"there is no folder {tmp_path / 'x'}" in message and f"there is no folder {tmp_path / 'y'}" in message


# ---- Pictures and their .txt files ------------------------------------------------------------------------------------------------


def test_text_beside_the_picture_is_its_caption_and_fills_the_fields(tmp_path):
    picture(tmp_path / "x/a.png", (64, 48))
    text(tmp_path / "x/a.txt", b"\xef\xbb\xbf cat, artist:me, best quality\r\n")
    picture(tmp_path / "x/b.png")
    info = build(tmp_path).info(0)
    assert info.caption == info.metadata["caption"] == "cat, artist:me, best quality"
    assert (info.metadata["artist"], info.metadata["quality"], info.description) == ("me", "best", None)


def test_info_is_complete_and_fresh_each_time(tmp_path):
    path = picture(tmp_path / "a.png", (60, 50))
    index = build(tmp_path, Repeats({"a": 3}), resolution=64, bucket_reso_step=8)
    info = index.info(0)
    assert isinstance(info, ImageInfo)
    info.metadata["caption"] = info.caption = "changed"
    assert index.info(0).caption is None and index.info(0).metadata["caption"] is None
    found = vars(index.info(0))
    found.pop("metadata")
    assert found == {
        "key": "a",
        "caption": None,
        "description": None,
        "image_size": (60, 50),
        "original_size": (60, 50),
        "latent_size": (7, 6),
        "bucket_size": (56, 48),
        "num_repeats": 3,
        "npz_path": None,
        "image_path": str(path),
    }


def test_pictures_without_text_are_warned_about_once_with_their_number(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    text(picture(tmp_path / "c.png").with_suffix(".txt"), " \r\n")
    text(picture(tmp_path / "d.png").with_suffix(".txt"), "cat")
    warnings: list[str] = []
    index = build(tmp_path, warnings=warnings)
    assert not warnings
    warn_of_silent_data(index, warnings.append)
    assert len(warnings) == 1 and "3 pictures have neither" in warnings[0] and "a, b, c" in warnings[0]
    assert (index.summary.captioned, index.summary.without_text) == (1, 3)


def test_one_key_for_two_pictures_is_an_error_naming_all_paths(tmp_path):
    for name in ("a.png", "a.jpg", "x/b.png", "y/b.png", "c.d.png", "c.e.png", "f.png", "F.png"):
        picture(tmp_path / name)
    message = refused(tmp_path)
    for name in ("a.png", "a.jpg", "x/b.png", "y/b.png"):
        assert str(tmp_path / name) in message
    assert "c.d" not in message and "f.png" not in message
    for name in ("a.jpg", "x/b.png"):
        (tmp_path / name).unlink()
    index = build(tmp_path)
    assert keys_of(index) == ["F", "a", "b", "c.d", "c.e", "f"]


def test_all_unusable_caption_files_come_in_one_report(tmp_path):
    for name, raw in (("a", "ö".encode("latin-1")), ("b", "cat".encode("utf-16")), ("c", b"x\0")):
        text(picture(tmp_path / f"{name}.png").with_suffix(".txt"), raw)
    message = refused(tmp_path)
    assert all(f"{name}.txt: it " in message for name in "abc")


def test_names_of_any_bytes_are_indexed_and_escaped_in_messages(tmp_path):
    raw_names = [b"sp ace", b"-dash", b"line\nfeed", "e\u0301".encode(), "\u00e9".encode(), b"latin\xe9", b"x" * 251]
    for raw in raw_names:
        path = os.path.join(os.fsencode(tmp_path), raw + b".png")
        with open(path, "wb") as file:
            Image.new("RGB", (64, 64)).save(file, "PNG")
    warnings: list[str] = []
    index = build(tmp_path, warnings=warnings)
    assert sorted(os.fsencode(key) for key in keys_of(index)) == sorted(raw_names)
    assert all(load_pixels(index.image_path(i), index.placement(i), 10**6).shape == (64, 64, 3) for i in range(len(index)))
    warn_of_silent_data(index, warnings.append)
    assert "line\\nfeed" in warnings[0] and "latin\\udce9" in warnings[0] and warnings[0].isprintable()


# ---- Metadata files ---------------------------------------------------------------------------------------------------------------


def test_only_pictures_in_the_metadata_are_data_and_missing_ones_are_counted(tmp_path):
    path = picture(tmp_path / "x/a.png")
    picture(tmp_path / "other.png")
    rows = {"a": {"image_path": str(path), "description": "d"}, "gone": {"image_path": "x/gone.png"}, "none": {"image_path": None}}
    warnings: list[str] = []
    index = build(tmp_path, warnings=warnings, metadata_files=write_metadata(tmp_path, rows))
    assert keys_of(index) == ["a"]
    assert (index.summary.missing, index.summary.described, index.summary.captioned) == (2, 1, 0)
    assert len(warnings) == 1 and "gone, none" in warnings[0]


def test_a_moved_picture_is_found_by_its_key_and_the_path_used_is_told(tmp_path):
    moved = picture(tmp_path / "new/place/a.png")
    picture(tmp_path / "new/a.jpg")
    no_path = picture(tmp_path / "new/b.webp")
    other_extension = picture(tmp_path / "new/c.jpg")
    rows = {"a": {"image_path": "C:\\old\\a.PNG"}, "b": {}, "c": {"image_path": "old/c.png"}}
    index = build(tmp_path, metadata_files=write_metadata(tmp_path, rows))
    assert [index.image_path(i) for i in range(3)] == [str(moved), str(no_path), str(other_extension)]
    assert index.metadata(0)["image_path"] == index.info(0).image_path == str(moved)


def test_backslashes_of_an_existing_path_are_read_as_slashes(tmp_path, monkeypatch):
    picture(tmp_path / "x/named_otherwise.png")
    monkeypatch.chdir(tmp_path)
    index = build(tmp_path, image_dirs=[], metadata_files=write_metadata(tmp_path, {"a": {"image_path": "x\\named_otherwise.png"}}))
    assert index.image_path(0) == "x/named_otherwise.png"


def test_a_name_to_look_up_that_fits_several_pictures_is_an_error_listing_them(tmp_path):
    for name in ("x/a.png", "y/a.png", "x/b.jpg", "x/b.png"):
        picture(tmp_path / name)
    rows = {"a": {"image_path": "gone/a.png"}, "b": {"image_path": "gone/b.png"}}
    message = refused(tmp_path, metadata_files=write_metadata(tmp_path, rows))
    assert str(tmp_path / "x/a.png") in message and str(tmp_path / "y/a.png") in message
    assert "b.jpg" not in message  # the same extension decides


def test_original_size_of_the_metadata_is_used_for_conditioning_only(tmp_path):
    picture(tmp_path / "a.png", (64, 48))
    picture(tmp_path / "b.png", (64, 48))
    index = build(tmp_path, metadata_files=write_metadata(tmp_path, {"a": {"original_size": [640, 480]}, "b": {"original_size": None}}))
    assert index.original_sizes.tolist() == [[640, 480], [64, 48]]
    assert index.image_sizes.tolist() == [[64, 48], [64, 48]]
    assert index.info(0).original_size == (640, 480) and index.info(0).metadata["original_size"] == [640, 480]


# ---- Headers ----------------------------------------------------------------------------------------------------------------------


def bad_pictures(tmp_path: Path) -> list[str]:
    text(tmp_path / "cut.png", picture(tmp_path / "good.png", (256, 256)).read_bytes()[:-20])
    text(tmp_path / "empty.jpg", b"")
    text(tmp_path / "page.webp", b"<html>")
    Image.new("RGB", (9, 9)).save(tmp_path / "moving.webp", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    picture(tmp_path / "large.png", (300, 300))
    return ["cut.png", "empty.jpg", "page.webp", "moving.webp", "dangling.png", "large.png"]


def test_all_bad_pictures_come_in_one_report(tmp_path):
    names = bad_pictures(tmp_path)
    message = refused(tmp_path, max_image_pixels=80_000)
    assert all(str(tmp_path / name) in message for name in names)
    assert "good.png" not in message and "(6):" in message


def test_bad_pictures_are_left_out_named_and_counted_when_skipped(tmp_path):
    names = bad_pictures(tmp_path)
    warnings: list[str] = []
    repeats = Repeats()
    index = build(tmp_path, repeats, warnings, max_image_pixels=80_000, bad_images="skip")
    assert keys_of(index) == ["good"] and index.summary.bad == 6
    assert all(any(str(tmp_path / name) in warning for warning in warnings) for name in names)
    assert [key for key, *_ in repeats.asked] == ["good"]


def test_orientation_counts_before_the_bucket_is_chosen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", (128, 32), exif=exif)
    index = build(tmp_path)
    assert index.image_sizes.tolist() == [[32, 128]] and index.bucket_sizes.tolist() == [[32, 128]]


# ---- Counter and repeats ----------------------------------------------------------------------------------------------------------


def test_each_datum_is_asked_once_after_everything_is_counted(tmp_path):
    rows = {key: {"artist": "Me", "characters": "a b, c"} for key in "xyz"}
    for key in rows:
        picture(tmp_path / f"cats/{key}.png")
    repeats = Repeats({"y": 0, "z": 2})
    index = build(tmp_path, repeats, metadata_files=write_metadata(tmp_path, rows))
    assert [key for key, *_ in repeats.asked] == ["x", "y", "z"]
    assert all(counter is index.counter for *_, counter in repeats.asked)
    assert index.counter["artist"] == {"Me": 3} and index.counter["character"] == {"a_b": 3, "c": 3}
    assert index.counter["category"] == {"cats": 3}
    assert set(repeats.asked[0][1]) >= {"image_path", "caption", "safe_level", "original_size"}


def test_the_global_generators_are_kept_once_for_all_calls_of_a_plain_function(tmp_path, monkeypatch):
    """Keeping them takes longer than everything else that is done for a datum."""
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    text(tmp_path / "plugin.py", "import random\ndef repeats(img_key, img_md, **kwargs): return random.randrange(1, 10**6)\n")
    num_kept = []
    get_state = np.random.get_state
    monkeypatch.setattr(np.random, "get_state", lambda: num_kept.append(1) or get_state())
    plugins = Plugins([Choice("num_repeats_getter", f"{tmp_path / 'plugin.py'}:repeats")], 42)
    indexed = build_index(config(tmp_path), plugins, None, print, [])
    assert len(set(indexed.index.num_repeats.tolist())) == 3 and len(num_kept) == 1


def test_repeats_of_zero_drop_the_picture(tmp_path):
    for key in "xyz":
        picture(tmp_path / f"{key}.png")
    index = build(tmp_path, Repeats({"y": 0, "z": 2}))
    assert keys_of(index) == ["x", "z"] and index.num_repeats.tolist() == [1, 0, 2]
    assert (index.summary.images, index.summary.dropped, index.summary.samples_per_epoch) == (2, 1, 3)


def test_an_exception_of_the_plugin_surfaces(tmp_path):
    picture(tmp_path / "a.png")

    class Broken(Repeats):
        def count_repeats(self, img_key, img_md, counter):
            raise PluginError("it is broken")

    for workers in (1, 4):
        with pytest.raises(PluginError, match="it is broken"):
            build(tmp_path, Broken(), max_dataset_n_workers=workers)


def test_nothing_left_to_train_is_an_error_with_the_counts_per_reason(tmp_path):
    assert "0 found" in refused(tmp_path)
    picture(tmp_path / "a.png")
    text(tmp_path / "b.png", b"")
    with pytest.raises(DataError, match=r"2 found in .*\(1 bad; 1 dropped"):
        build(tmp_path, Repeats({"a": 0}), bad_images="skip")
    rows = {"gone": {}}
    assert "1 without a file" in refused(tmp_path, metadata_files=write_metadata(tmp_path, rows))


def test_pictures_left_out_later_keep_their_rows_and_are_counted_as_bad(tmp_path):
    for key in "xyz":
        picture(tmp_path / f"{key}.png")
    text(tmp_path / "y.txt", "cat")
    index = build(tmp_path, Repeats({"y": 5}))
    index.leave_out([1])
    assert list(index.keys) == ["x", "y", "z"] and index.num_repeats.tolist() == [1, 0, 1]
    summary = index.summary
    assert (summary.images, summary.bad, summary.captioned, summary.without_text, summary.samples_per_epoch) == (2, 1, 0, 2, 2)
    assert sum(summary.buckets.values()) == 2
    assert sorted(datum for batch in epoch_plan(index, 0, 1, 4) for datum, _ in batch.data) == [0, 2]
    with pytest.raises(DataError, match="no picture is left to train"):
        index.leave_out([0, 2])


# ---- The whole --------------------------------------------------------------------------------------------------------------------


def test_the_number_of_threads_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    random = np.random.default_rng(0)
    for i in range(600):
        picture(tmp_path / f"{i % 7}/{i}.bmp", tuple(random.integers(8, 90, 2).tolist()))
    text(tmp_path / "0/bad.png", b"")
    one, four = (build(tmp_path, max_dataset_n_workers=n, bad_images="skip", bucket_reso_step=8) for n in (1, 4))
    assert keys_of(one) == keys_of(four) and one.summary == four.summary
    for name in ("image_sizes", "original_sizes", "bucket_sizes", "num_repeats"):
        assert np.array_equal(getattr(one, name), getattr(four, name))
    assert sum(one.summary.buckets.values()) == 600 == one.summary.images


def test_an_index_travels_by_pickle(tmp_path):
    text(picture(tmp_path / "a.png").with_suffix(".txt"), "cat")
    index = build(tmp_path)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.info(0) == index.info(0) and copy.placement(0) == index.placement(0) and copy.summary == index.summary


def test_the_users_files_stay_as_they_are(tmp_path):
    bad_pictures(tmp_path)
    text(tmp_path / "good.txt", b"\xef\xbb\xbfcat\r\n")
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())

    def state():
        return [(path, path.stat().st_mtime_ns, sha256(path.read_bytes()).digest()) for path in files]

    before = state()
    build(tmp_path, bad_images="skip")
    assert state() == before and sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files


def test_a_picture_whose_name_looks_like_a_cache_of_another_is_one_datum(tmp_path):
    picture(tmp_path / "a_0064x0048_sdxl.png")
    np.savez(tmp_path / "a_0064x0048_sdxl.npz", latents=np.zeros((4, 6, 8), np.float32))
    np.savez(tmp_path / "alone_0064x0048_sdxl.npz", latents=np.zeros((4, 6, 8), np.float32))
    assert keys_of(build(tmp_path)) == ["a_0064x0048_sdxl", "alone"]


def test_bad_pictures_that_share_a_name_are_in_the_same_report(tmp_path):
    text(tmp_path / "x.png", b"")
    picture(tmp_path / "deep/x.png")
    message = refused(tmp_path)
    assert "several pictures" in message and f"{tmp_path / 'x.png'}: it is empty" in message
