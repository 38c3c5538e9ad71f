import json
import random

import pytest

from sdxl_train.data.captions import has_text
from sdxl_train.data.metadata import complete
from sdxl_train.data.rows import RowsBuilder, rows_of_captions


def build(**rows):
    builder = RowsBuilder([])
    for key, fields in rows.items():
        builder.add(key, json.dumps(fields).encode(), fields)
    return builder.build()


def names(column):
    return [column.names[code] if code >= 0 else None for code in column.codes]


@pytest.mark.parametrize("extra", ["", "x" * 65, "é", "\udcff\uffff"])
def test_rows_are_sorted_as_python_sorts_their_keys(extra):
    draws = random.Random(1)
    keys = {extra + "".join(draws.choices("aB1_ ", k=draws.randrange(9))) for _ in range(500)} | {extra}
    shuffled = draws.sample(sorted(keys), len(keys))
    rows = build(**{key: {"caption": f"of {key[-9:]}", "image_path": f"{key}.png"} for key in shuffled})
    assert list(rows.keys) == sorted(keys)
    assert list(rows.image_paths) == [f"{key}.png" for key in sorted(keys)]
    assert [json.loads(text)["caption"] for text in rows.texts] == [f"of {key[-9:]}" for key in sorted(keys)]


def test_all_columns_follow_the_order_of_the_keys():
    rows = build(
        b={"artist": "x", "characters": "p, q", "quality": "best", "original_size": [3, 4], "image_path": "a\\b.png"},
        a={"artist": "y", "styles": "s", "caption": "one two", "description": "d" * 20},
        c={"artist": "x", "nl_caption": "猫"},
    )
    assert names(rows.artists) == ["y", "x", "x"] and names(rows.characters) == [None, "p, q", None]
    assert names(rows.styles) == ["s", None, None] and names(rows.qualities) == [None, "best", None]
    assert rows.original_sizes.tolist() == [[0, 0], [3, 4], [0, 0]]
    assert rows.has_caption.tolist() == [True, False, False] and rows.has_description.tolist() == [True, False, True]
    assert rows.max_tokens.tolist() == [20, 0, 9]
    assert list(rows.image_paths) == ["", "a/b.png", ""]


@pytest.mark.parametrize("caption", [None, "", " \n", "\u3000", "c", "é"])
@pytest.mark.parametrize("tags", [None, "", "\t", "t"])
def test_the_columns_agree_with_the_complete_metadata(caption, tags):
    row = {"caption": caption, "tags": tags, "description": tags, "nl_caption": caption}
    rows, metadata = build(a=row), complete(row, None)
    assert rows.has_caption[0] == has_text(metadata["caption"])
    assert rows.has_description[0] == has_text(metadata["description"])
    texts = [text for text in (metadata["caption"], metadata["description"]) if has_text(text)]
    assert rows.max_tokens[0] == max((len(text) if text.isascii() else 3 * len(text.encode()) for text in texts), default=0)


def test_captions_give_rows_with_the_fields_of_their_tags():
    captions = [(f"{i:04d}", f"artist:a{i % 3}, {i} cats, best quality") for i in range(1300)]
    rows = rows_of_captions([*captions[::-1], ("none", None)])
    assert list(rows.keys) == [*(key for key, _ in captions), "none"]
    assert json.loads(rows.texts[7]) == {"caption": captions[7][1], "artist": "a1", "quality": "best"}
    assert json.loads(rows.texts[1300]) == {} and not rows.has_caption[1300]
    assert rows.artists.occurrences(rows.has_caption) == {"a0": 434, "a1": 433, "a2": 433}


def test_no_rows_are_rows_too():
    rows = rows_of_captions([])
    assert len(rows) == 0 and list(rows.keys) == [] and rows.original_sizes.shape == (0, 2)
