import json
from pathlib import Path

from sdxl_train.data.counter import count_tags, format_tag
from sdxl_train.data.metadata import complete

ORACLES = json.loads((Path(__file__).parents[2] / "oracles.json").read_text(encoding="utf-8"))


def counted(*rows, path="a/b/x.png"):
    return count_tags(complete(row, path) for row in rows)


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
