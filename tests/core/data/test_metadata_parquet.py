import datetime
import decimal
import json
import sys
from pathlib import Path

import pytest

from sdxl_train.data.metadata_files import read_metadata_files
from sdxl_train.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(tmp_path, columns, name="m.parquet"):
    path = str(tmp_path / name)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, row_group_size=300)
    return path


def read(path):
    problems = []
    rows = read_metadata_files([path], problems)
    return rows, [json.loads(text) for text in rows.texts], [problem.message for problem in problems]


def test_columns_are_fields_and_nulls_are_absent(tmp_path):
    path = write(
        tmp_path,
        {
            "key": ["b", None],
            "file_name": [None, "sub/a.png"],
            "caption": ["x", None],
            "aesthetic_score": [0.5, float("nan")],
            "original_size": [[3, 4], None],
            "artist": pa.array([None, "y"]).dictionary_encode(),
        },
    )
    rows, texts, problems = read(path)
    assert problems == []
    assert list(rows.keys) == ["a", "b"] and list(rows.image_paths) == [f"{tmp_path}/sub/a.png", ""]
    assert texts == [
        {"file_name": "sub/a.png", "artist": "y", "aesthetic_score": None},
        {"key": "b", "caption": "x", "aesthetic_score": 0.5, "original_size": [3, 4]},
    ]
    assert rows.original_sizes.tolist() == [[0, 0], [3, 4]]


def test_what_json_has_no_type_for_becomes_text_or_a_number(tmp_path):
    path = write(
        tmp_path,
        {
            "key": ["a"],
            "day": [datetime.date(2024, 2, 3)],
            "at": [datetime.datetime(2024, 2, 3, 4, 5)],
            "score": [decimal.Decimal("1.5")],
            "nested": [{"x": [1, None], "days": [datetime.date(2024, 2, 3)]}],
        },
    )
    [row] = read(path)[1]
    assert row["day"] == "2024-02-03" and row["at"].startswith("2024-02-03 04:05") and row["score"] == 1.5
    assert row["nested"] == {"x": [1, None], "days": ["2024-02-03"]}


def test_wrong_rows_are_named_by_their_number(tmp_path):
    keys = [f"{i:04d}" for i in range(1000)]
    path = write(tmp_path, {"key": [*keys[:999], "0007"], "caption": ["a\0" if key == "0600" else "x" for key in keys]})
    rows, _, problems = read(path)
    assert problems == [
        f'{path}: row 601: caption holds a NUL character',
        f'{path}: row 1000: key "0007": the key stands in this file twice, first on row 8',
    ]
    assert len(rows) == 998


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"key": ["a"], "image": [b"\x89PNG"]}, "its column image is binary"),
        ({"key": ["a"], "image": [{"bytes": b"x", "path": "p"}]}, "its column image is struct"),
        (pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["key", "key"]), "two columns key"),
        ({"key": [5]}, "row 1: key must be text, found 5"),
        ({"caption": ["c"]}, "row 1: it has no key"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, columns, words):
    [problem] = read(write(tmp_path, columns))[2]
    assert words in problem


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-20], lambda raw: b"", lambda raw: b"{}", lambda raw: raw[:4] + b"\xff" * 200 + raw[204:]]
)
def test_a_damaged_file_is_a_problem(tmp_path, damage):
    path = write(tmp_path, {"key": [f"{i}" for i in range(2000)]})
    Path(path).write_bytes(damage(Path(path).read_bytes()))
    _, texts, [problem] = read(path)
    assert problem.startswith(f"{path}: it cannot be read") and len(texts) < 2000


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, {"key": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "sdxl-train\[parquet\]"'):
        read_metadata_files([path], [])
