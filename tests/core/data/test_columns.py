"""Columns give back what was put in."""

import numpy as np

from sdxl_train.data.columns import NameColumn, TextColumn


def test_texts_of_a_column_come_back_whatever_they_hold():
    texts = ["", "a", "猫\n", "\udcff", ""]
    column = TextColumn.of(texts)
    assert list(column) == texts == [column[i] for i in range(5)] and len(column) == 5
    assert column.lengths.tolist() == [0, 1, 4, 1, 0]
    assert [column.raw(i) for i in range(5)] == [b"", b"a", "猫\n".encode(), b"\xff", b""]
    assert list(TextColumn.of([])) == []


def test_rows_are_taken_in_the_order_asked_for():
    column = TextColumn.of(["a", "", "bcd", b"e"])
    assert list(column.take(np.array([3, 2, 2, 1]))) == ["e", "bcd", "bcd", ""]
    assert list(column.take(np.array([], np.int64))) == []


def test_values_are_counted_over_the_rows_asked_for():
    column = NameColumn(["x", "y", "z"], np.array([0, 1, 0, -1, 2], np.int32))
    assert column.occurrences(np.array([True, True, True, True, False])) == {"x": 2, "y": 1}
