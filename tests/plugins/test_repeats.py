"""The built-in repeat counters."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_train import DataError
from sdxl_train.data.metadata import complete
from sdxl_train.plugins import Choice, Plugins
from sdxl_train.testing import check_plugin
from sdxl_train_plugins.repeats import balanced_repeats, folder_number, names_of

EMPTY: dict[str, dict[str, int]] = {"artist": {}, "characters": {}, "styles": {}, "quality": {}, "category": {}}


def repeats(
    name: str, options: dict[str, Any], metadata: dict[str, Any], counts: dict[str, dict[str, int]] = EMPTY, path: str | None = "a.png"
) -> int:
    plugins = Plugins([Choice("num_repeats_getter", name, options)], 1)
    return plugins.hooks.count_repeats(img_key="a", img_md=complete(metadata, path), counter=EMPTY | counts)


@pytest.mark.parametrize(("name", "options"), [("one", {}), ("balanced", {"by": "artist"}), ("by_quality", {"repeats": {"best": 2}}), ("folder", {})])
def test_counters_keep_the_rules(name: str, options: dict) -> None:
    check_plugin("num_repeats_getter", name, **options)


# ---- balanced ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("occurrences", "target", "max_repeats", "expected"),
    [
        ([30], 30, 10, 1),
        ([10], 30, 10, 3),
        ([12], 30, 10, 3),  # 2.5 is rounded upwards; Python's round gives 2
        ([13], 30, 10, 2),
        ([1], 30, 10, 10),
        ([100], 30, 10, 1),  # never 0
        ([30, 5, 10], 30, 10, 6),  # the rarest name counts
        ([], 30, 10, 1),
        ([1], 10**30, 10, 10),
        ([5], 30, 1, 1),
    ],
)
def test_a_name_is_repeated_up_to_the_target(occurrences: list[int], target: int, max_repeats: int, expected: int) -> None:
    assert balanced_repeats(occurrences, target, max_repeats) == expected


def test_names_are_formatted_as_the_counter_formats_them() -> None:
    metadata = complete({"artist": " some artist", "characters": "saber \\(fate\\), Alice ,", "styles": None, "quality": " very best"}, None)
    assert [names_of(metadata, by) for by in ("artist", "character", "style", "quality")] == [
        ["some_artist"], ["saber_(fate)", "Alice"], [], ["very best"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("by", "metadata", "expected"),
    [
        ("artist", {"artist": "few pictures"}, 4),
        ("artist", {"artist": "many"}, 1),
        ("artist", {}, 1),
        ("character", {"characters": "alice, bob"}, 5),
        ("style", {"styles": "sketch"}, 2),
        ("quality", {"quality": "worst"}, 3),
    ],
)
def test_the_target_is_the_most_frequent_name_by_default(by: str, metadata: dict[str, str], expected: int) -> None:
    counts = {
        "artist": {"many": 12, "few_pictures": 3},
        "characters": {"alice": 10, "bob": 2},
        "styles": {"sketch": 4, "oil": 8},
        "quality": {"best": 9, "worst": 3},
    }
    assert repeats("balanced", {"by": by}, metadata, counts) == expected


def test_target_and_cap_are_options() -> None:
    counts = {"artist": {"many": 12, "few": 3}}
    assert repeats("balanced", {"target": 24}, {"artist": "many"}, counts) == 2
    assert repeats("balanced", {"target": 24}, {"artist": "few"}, counts) == 8
    assert repeats("balanced", {"target": 24, "max_repeats": 5}, {"artist": "few"}, counts) == 5


def test_one_plugin_follows_the_counter_it_is_given() -> None:
    plugins = Plugins([Choice("num_repeats_getter", "balanced")], 1)
    for most, expected in ((4, 2), (8, 4)):
        counter = EMPTY | {"artist": {"a": 2, "b": most}}
        assert plugins.hooks.count_repeats(img_key="k", img_md=complete({"artist": "a"}, None), counter=counter) == expected


# ---- by_quality -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quality", "expected"), [("best", 3), (" best ", 3), ("worst", 0), ("normal", 2), (None, 2), ("Best", 2)])
def test_the_table_gives_the_repeats_of_a_quality_and_the_default_those_of_all_others(quality: str | None, expected: int) -> None:
    assert repeats("by_quality", {"repeats": {"best": 3, "worst": 0}, "default": 2}, {"quality": quality}) == expected


@pytest.mark.parametrize("value", ["-1", "1.5", "true", '"3"'])
def test_a_repeat_count_that_is_no_whole_number_is_named(config, cli, value: str) -> None:
    tables = f"[num_repeats_getter_kwargs.repeats]\nbest = 1\nworst = {value}\n"
    ended = cli(config(tables=tables, num_repeats_getter="by_quality"))
    assert ended.code == 2
    assert re.search(r"sdxl\.toml:\d+: num_repeats_getter_kwargs\.repeats must hold whole numbers of at least 0, but worst is ", ended.err), ended.err


def test_by_quality_needs_its_table(config, cli) -> None:
    ended = cli(config(num_repeats_getter="by_quality"))
    assert ended.code == 2 and "num_repeats_getter_kwargs.repeats is required" in ended.err


# ---- folder -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "number"),
    [("10_name", 10), ("0_bad", 0), ("007_x", 7), ("3_", 3), ("name", None), ("name_10", None), ("10", None), ("10 name", None), ("-1_x", None)],
)
def test_the_number_stands_in_front_of_an_underscore(folder: str, number: int | None) -> None:
    assert folder_number(folder) == number


@pytest.mark.parametrize(
    ("path", "expected"),
    [("data/10_cats/a.png", 10), ("data/0_bad/a.png", 0), ("data/cats/a.png", 4), ("10_cats/close/a.png", 4), ("a.png", 4), (None, 4)],
)
def test_the_folder_of_the_picture_itself_counts(path: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert repeats("folder", {"default": 4}, {}, path=path) == expected


def test_a_relative_path_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "6_here").mkdir()
    monkeypatch.chdir(tmp_path / "6_here")
    assert repeats("folder", {}, {}, path="a.png") == 6


def test_a_date_is_no_repeat_count() -> None:
    with pytest.raises(DataError, match=r"'20240101_cats' asks for 20240101 repeats, more than .*max_repeats = 1000"):
        repeats("folder", {}, {}, path="20240101_cats/a.png")
    assert repeats("folder", {"max_repeats": 2024}, {}, path="2024_cats/a.png") == 2024


# ---- In a training ----------------------------------------------------------------------------------------------------------------

WATCH = """
import json
from sdxl_train import hookimpl

class Watch:
    def __init__(self): self.seen = []

    @hookimpl(wrapper=True)
    def compute_loss(self, batch):
        self.seen += batch.keys
        return (yield)

    @hookimpl
    def on_train_end(self, run): json.dump(self.seen, open(run.output_dir / "seen.json", "w"))
"""


@pytest.fixture
def trained(config, cli, tmp_path: Path) -> Callable[..., tuple[dict[str, int], str]]:
    """How often each picture was trained in one epoch with these keys, and what was said."""

    def training(tables: str = "", **keys: Any) -> tuple[dict[str, int], str]:
        (tmp_path / "watch.py").write_text(WATCH)
        ended = cli(config(tables=tables, num_train_epochs=1, plugins=[f"{tmp_path}/watch.py:Watch"], **keys))
        assert ended.code == 0, ended.err
        return Counter(json.loads((tmp_path / "out" / "seen.json").read_text())), ended.err

    return training


def test_rare_artists_are_trained_more_often(trained, tmp_path: Path) -> None:
    artists = {"square0": "rare one", **{f"square{i}": "other" for i in (1, 2, 3, 4)}, "square5": None}
    (tmp_path / "metadata.json").write_text(json.dumps({key: {"artist": artist} for key, artist in artists.items()}))
    tables = "[num_repeats_getter_kwargs]\nby = 'artist'\nmax_repeats = 3\n"
    counts, said = trained(tables, metadata_files=[str(tmp_path / "metadata.json")], num_repeats_getter="balanced")
    assert counts == {"square0": 3, "square1": 1, "square2": 1, "square3": 1, "square4": 1, "square5": 1}
    assert "no effect" not in said


def test_folders_and_their_numbers_are_trained(trained, tmp_path: Path) -> None:
    for folder in ("3_cats", "0_bad", "dogs"):
        (tmp_path / "sorted" / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "sorted" / folder / f"in_{folder}.png")
    counts, said = trained(image_dirs=[str(tmp_path / "sorted")], num_repeats_getter="folder")
    assert counts == {"in_3_cats": 3, "in_dogs": 1} and "finds no folder" not in said


def test_a_folder_that_asks_for_too_much_ends_the_run_before_it_starts(config, cli, tmp_path: Path) -> None:
    (tmp_path / "sorted" / "20240101_cats").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "sorted" / "20240101_cats" / "tom.png")
    ended = cli(config(image_dirs=[str(tmp_path / "sorted")], num_repeats_getter="folder"))
    assert ended.code == 2 and "asks for 20240101 repeats" in ended.err


@pytest.mark.parametrize(
    ("name", "table", "said"),
    [
        ("balanced", "by = 'style'", "the metadata of no picture names its style"),
        ("by_quality", "repeats = {best = 2}", "names best, which no picture has; there are: none"),
        ("folder", "", "finds no folder named like 10_name"),
    ],
)
def test_a_counter_without_effect_warns_once(trained, name: str, table: str, said: str) -> None:
    counts, messages = trained(f"[num_repeats_getter_kwargs]\n{table}\n", num_repeats_getter=name)
    assert set(counts.values()) == {1} and messages.count(said) == 1, messages
