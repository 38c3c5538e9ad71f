import json
from pathlib import Path

import numpy as np

from sdxl_train.data.columns import NameColumn
from sdxl_train.data.counter import count_tags, format_tag

ORACLES = json.loads((Path(__file__).parents[2] / "oracles.json").read_text(encoding="utf-8"))


def counted(*rows):
    """The counter of these metadata, all of pictures in a folder b."""
    fields = [column([row.get(name) for row in rows]) for name in ("artist", "characters", "styles", "quality")]
    return count_tags(*fields, column(["b"] * len(rows)), np.ones(len(rows), bool))


def column(values):
    names = list(dict.fromkeys(value for value in values if value is not None))
    return NameColumn(names, np.array([-1 if value is None else names.index(value) for value in values], np.int32))


def test_tags_are_formatted_as_published():
    for given, expected in zip(ORACLES["tag_format"]["inputs"], ORACLES["tag_format"]["expected"], strict=True):
        assert format_tag(given["tag"]) == expected["formatted"]


def test_counter_as_published():
    for given, expected in zip(ORACLES["counter"]["inputs"], ORACLES["counter"]["expected"], strict=True):
        found = counted(*given["metadata"])
        assert {name: found[name] for name in expected} == expected


def test_letter_case_stays_and_quality_is_only_stripped():
    found = counted({"artist": " John Doe ", "quality": " very good "}, {"artist": "john doe", "quality": "very good"})
    assert found["artist"] == {"John_Doe": 1, "john_doe": 1}
    assert found["quality"] == {"very good": 2}


def test_an_artist_with_a_comma_is_one_name():
    assert counted({"artist": "Doe, John"})["artist"] == {"Doe,_John": 1}


def test_category_is_the_folder_and_aliases_are_the_same_counts():
    found = counted({"characters": "a,, b", "styles": "oil"})
    assert found["category"] == {"b": 1}
    assert found["character"] == found["characters"] == {"a": 1, "b": 1}
    assert found["style"] == found["styles"] == {"oil": 1}


def test_absent_fields_count_nothing():
    found = counted({})
    assert found.pop("category") == {"b": 1}
    assert found == {name: {} for name in ("artist", "characters", "styles", "quality", "character", "style")}


def test_only_the_rows_asked_for_count():
    names = column(["a", "b", "a"])
    found = count_tags(names, names, names, names, names, np.array([True, False, True]))
    assert found["artist"] == found["category"] == {"a": 2}
