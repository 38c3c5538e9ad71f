"""Metadata files, each row read and checked once: one JSON object, JSON Lines or Parquet, as the name of the file ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from types import NoneType
from typing import Any, TypeVar

from sdxl_train.data.metadata import FIELDS, is_file_text, metadata_problem, regular_size, row_problems, text_fault
from sdxl_train.data.metadata_json import NotJsonError, Piece, decode_exactly, decode_rows, json_lines, json_object
from sdxl_train.data.metadata_parquet import NotParquetError, parquet_rows
from sdxl_train.data.names import split_name
from sdxl_train.data.rows import FIELDS_READ, Rows, RowsBuilder, columns_of, named_pictures
from sdxl_train.errors import Problem

MOST_PROBLEMS = 1000  # of one file that are kept; the others are counted
_LINES, _PARQUET = frozenset({".jsonl", ".ndjson"}), ".parquet"
_COLUMNS = tuple(dict.fromkeys((*FIELDS_READ, *FIELDS, "key", "file_name")))
_PLAIN_TYPES = {
    name: {NoneType, int, float} if FIELDS.get(name) == "a number" else {NoneType, str} for name in _COLUMNS if name != "original_size"
}
_T = TypeVar("_T")


def read_metadata_files(paths: list[str], problems: list[Problem]) -> Rows:
    """All rows of the files; a field given by several files has the value of the last one.

    A row of JSON Lines or Parquet is named by its field key, else by the file name without extension of image_path, else of file_name
    (the name that Hugging Face's ImageFolder uses), which is relative to the folder of the metadata file.

    Args:
        problems: gets one of kind "metadata" for each thing that is wrong, with file and line. Rows that are wrong are left out.
    Raises:
        DataError: a Parquet file without pyarrow installed.
    """
    builder = RowsBuilder(problems)
    for path in paths:
        file = _MetadataFile(path, builder)
        file.read()
        problems += file.problems()
    return builder.build()


class _MetadataFile:
    """One file on its way into the builder."""

    def __init__(self, path: str, builder: RowsBuilder) -> None:
        self._path = path
        self._folder = os.path.dirname(path)
        self._builder = builder
        self._counted = "line"
        self._problems: list[Problem] = []
        self._unlisted = 0

    def problems(self) -> list[Problem]:
        """What was found wrong so far."""
        more = [metadata_problem(self._path, None, f"{self._unlisted} more problems like these")] if self._unlisted else []
        return [*self._problems, *more]

    def read(self) -> None:
        """Append its rows to the builder."""
        extension = split_name(self._path)[1]
        self._counted = "row" if extension == _PARQUET else "line"
        try:
            size = regular_size(self._path)
            self._builder.start_file(self._path, self._counted, size)
            if extension == _PARQUET:
                pieces = parquet_rows(self._path)
            else:
                pieces = json_lines(self._path) if extension in _LINES else json_object(self._path)
            for piece in pieces:
                self._add_rows(piece)
        except OSError as error:
            self._report(None, f"it cannot be read: {error.strerror or error}")
        except NotJsonError as error:
            self._report(1 + error.lines, str(error))
        except NotParquetError as error:
            self._report(None, str(error))

    def _report(self, place: int | None, message: str, key: str | None = None) -> None:
        if len(self._problems) < MOST_PROBLEMS:
            self._problems.append(metadata_problem(self._path, place, message, key, self._counted))
        else:
            self._unlisted += 1

    def _add_rows(self, piece: Piece) -> None:
        rows, suspects = decode_rows(piece.texts)
        wrong: set[int] = set()
        for i in suspects:
            key = piece.keys[i] if piece.keys else None
            try:
                rows[i], found = decode_exactly(piece.texts[i])
            except NotJsonError as error:
                found = [(error.lines, str(error))]
            for lines, problem in found:
                self._report(piece.lines[i] + lines, problem, key)
            if found or not self._is_right(piece.lines[i], key, rows[i]):
                wrong.add(i)
        if wrong:
            kept = [i for i in range(len(rows)) if i not in wrong]
            piece = Piece(_at(kept, piece.lines), _at(kept, piece.texts), _at(kept, piece.keys) if piece.keys else [])
            rows = _at(kept, rows)
        self._add(piece.lines, piece.keys or None, piece.texts, rows)

    def _add(self, places: list[int], keys: list[str] | None, texts: list[bytes], rows: list[dict[str, Any]]) -> None:
        """Append rows of which it is not known yet whether their names and fields are right."""
        columns = columns_of(rows, _COLUMNS)
        named = self._named(keys, columns) if _have_plain_types(columns) else None
        if named is None:
            kept = [i for i, row in enumerate(rows) if self._is_right(places[i], keys[i] if keys else None, row)]
            places, texts, rows = _at(kept, places), _at(kept, texts), _at(kept, rows)
            keys = _at(kept, keys) if keys else None
            columns = columns_of(rows, _COLUMNS)
            named = self._named(keys, columns)
        assert named is not None
        self._builder.extend(named[0], texts, columns, named[1], places)

    def _named(self, keys: list[str] | None, columns: dict[str, Sequence[Any]]) -> tuple[list[str], list[str]] | None:
        """(keys, image paths) of rows; None where a row has no key or one that no file can have."""
        image_paths = named_pictures(columns["image_path"])
        if keys is not None:
            return (keys, image_paths) if is_file_text("".join(keys)) else None
        if any(columns["file_name"]):
            beside = zip(image_paths, columns["file_name"], strict=True)
            image_paths = [path or (os.path.join(self._folder, name.replace("\\", "/")) if name else "") for path, name in beside]
        keys = [key or _stem(path) for key, path in zip(columns["key"], image_paths, strict=True)]
        return (keys, image_paths) if all(keys) and is_file_text("".join(keys)) else None

    def _is_right(self, place: int, key: str | None, row: Any) -> bool:
        """Whether the row can be used; what is wrong with it is reported."""
        found = list(row_problems(row))
        if key is not None:
            found += [] if is_file_text(key) else [f"no file can have this name: it {text_fault(key)}"]
        elif isinstance(row, dict):
            names = {name: row[name] for name in ("key", "file_name") if row.get(name) is not None}
            found += [f"{name} {text_fault(value)}" for name, value in names.items() if not is_file_text(value)]
            if not found and self._named(None, columns_of([row], _COLUMNS)) is None:
                found.append("it has no key: give key, image_path or file_name")
        for problem in found:
            self._report(place, problem, key)
        return not found


def _have_plain_types(columns: dict[str, Sequence[Any]]) -> bool:
    """Whether all values have the usual types; other ones may be right too. NUL and numbers that are not finite were found before."""
    if not all([{*map(type, columns[name])} <= types for name, types in _PLAIN_TYPES.items()]):
        return False
    sizes = [size for size in columns["original_size"] if size is not None]
    if not ({*map(type, sizes)} <= {list} and {*map(len, sizes)} <= {2}):
        return False
    sides = [*chain.from_iterable(sizes)]
    return {*map(type, sides)} <= {int} and min(sides, default=1) >= 1 and max(sides, default=1) < 1 << 31


def _stem(path: str) -> str:
    """The key of a file, as `split_name` gives it, in half the time."""
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    return name[:dot] if dot > 0 and name[0] != "." else split_name(path)[0]


def _at(rows: list[int], values: list[_T]) -> list[_T]:
    return [values[i] for i in rows]
