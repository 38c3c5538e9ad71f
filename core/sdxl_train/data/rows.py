"""What the metadata says, as columns: a datum of 600 bytes of text costs its text and some 60 bytes beside it."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.columns import NameColumn, TextColumn
from sdxl_train.data.metadata import FALLBACKS, fields_from_tags, metadata_problem, row_problems
from sdxl_train.errors import Problem

_NAMES = ("artist", "characters", "styles", "quality")
FIELDS_READ = ("image_path", "caption", "description", "tags", "nl_caption", "original_size", *_NAMES)
_BATCH = 512  # rows that exist as Python objects at a time
_GATHERED = 128  # texts that are copied at a time: as one block that malloc keeps for the next
_SHORT = 64  # bytes; keys up to this size are sorted as an array


@dataclass(frozen=True)
class Rows:
    """N data in order of their keys (as Python sorts text), each key once.

    Attributes:
        keys: what each datum is called.
        image_paths: the file that its metadata names, `\\` read as `/`; '' where it names none.
        texts: its fields as JSON text.
        original_sizes: (w, h) in px; 0 where not given. [N, 2] int32
        has_caption, has_description: whether there is a caption (or tags) and a description (or nl_caption) that is not blank. [N] bool
        max_tokens: no text of the datum has more tokens; 0 without text. [N] int32
        artists, characters, styles, qualities: these fields as given.
    """

    keys: TextColumn
    image_paths: TextColumn
    texts: TextColumn
    original_sizes: NDArray[np.int32]
    has_caption: NDArray[np.bool_]
    has_description: NDArray[np.bool_]
    max_tokens: NDArray[np.int32]
    artists: NameColumn
    characters: NameColumn
    styles: NameColumn
    qualities: NameColumn

    def __len__(self) -> int:
        return len(self.keys)


def rows_of_captions(captions: Iterable[tuple[str, str | None]]) -> Rows:
    """The rows of pictures with a .txt file (or None) each: its text is the caption, its tags fill the fields. The keys differ."""
    builder = RowsBuilder([])
    remaining = iter(captions)
    while batch := list(islice(remaining, _BATCH)):
        rows = [{} if caption is None else fields_from_tags(caption) for _, caption in batch]
        builder.extend([key for key, _ in batch], [msgspec.json.encode(row) for row in rows], columns_of(rows))
    return builder.build()


class RowsBuilder:
    """Takes rows in any order and sorts them by key.

    A key given by several files is merged field by field, the later file wins; one given twice by the same file is a problem.

    Args:
        problems: where the problems of repeated keys go.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self._problems = problems
        self._files: list[tuple[str, str]] = []
        self._first_rows: list[int] = []  # of the files
        self._places = array("q")
        self._keys, self._image_paths, self._texts = _Texts(), _Texts(), _Texts()
        self._sides = array("i")
        self._has_caption, self._has_description = bytearray(), bytearray()
        self._max_tokens = array("q")
        self._codes = {name: array("i") for name in _NAMES}
        self._known = {name: _Codes() for name in _NAMES}

    def start_file(self, path: str, counted: str = "line", size: int = 0) -> None:
        """The rows that follow come from this file.

        Args:
            counted: what the places of its rows are numbers of.
            size: bytes of text to make room for.
        """
        self._files.append((path, counted))
        self._first_rows.append(len(self._places))
        self._texts.reserve(size)

    def add(self, key: str, text: bytes, fields: dict[str, Any], image_path: str | None = None, place: int = 0) -> None:
        """Append one row; see `extend`."""
        self.extend([key], [text], columns_of([fields]), None if image_path is None else [image_path], [place])

    def extend(
        self,
        keys: list[str],
        texts: list[bytes],
        columns: Mapping[str, Sequence[Any]],
        image_paths: list[str] | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        """Append rows whose fields have the right types.

        Args:
            texts: the fields of each row as JSON.
            columns: the same fields by `columns_of`.
            image_paths: what stands for the field image_path.
            places: the line or number of each row in its file.
        """
        self._places.extend(places or [0] * len(keys))
        self._keys.extend_str(keys)
        self._image_paths.extend_str(named_pictures(columns["image_path"]) if image_paths is None else image_paths)
        self._texts.extend(texts)
        self._sides.extend([*chain.from_iterable([size or (0, 0) for size in columns["original_size"]])])
        captions, descriptions = (_texts_or_fallback(columns, name) for name in FALLBACKS)
        self._has_caption.extend(map(bool, captions))
        self._has_description.extend(map(bool, descriptions))
        self._max_tokens.extend(map(max, _most_tokens(captions), _most_tokens(descriptions)))
        for name in _NAMES:
            self._codes[name].extend(map(self._known[name].__getitem__, columns[name]))

    def build(self) -> Rows:
        """All rows. The builder is used up by it."""
        order, repeats = _sorted_keys(self._keys.column())
        if repeats.any():
            order = self._merge(order, repeats)
        rows = None if len(order) == len(self._places) and (np.diff(order) == 1).all() else order

        def column(values: array[int] | bytearray, dtype: type[Any], width: tuple[int, ...] = ()) -> NDArray[Any]:
            given = np.frombuffer(values, dtype).reshape(-1, *width)
            return given if rows is None else given[rows]

        def names(name: str) -> NameColumn:
            return NameColumn(self._known[name].names(), column(self._codes[name], np.int32))

        return Rows(
            keys=self._keys.column(rows),
            image_paths=self._image_paths.column(rows),
            texts=self._texts.column(rows),
            original_sizes=column(self._sides, np.int32, (2,)),
            has_caption=column(self._has_caption, np.bool_),
            has_description=column(self._has_description, np.bool_),
            max_tokens=np.minimum(column(self._max_tokens, np.int64), np.iinfo(np.int32).max).astype(np.int32),
            artists=names("artist"),
            characters=names("characters"),
            styles=names("styles"),
            qualities=names("quality"),
        )

    def _merge(self, order: NDArray[np.int64], repeats: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The order with one row a key; that of several files is a new row."""
        starts = np.flatnonzero(~repeats)
        sizes = np.diff(starts, append=len(order))
        places = starts[sizes > 1].tolist()
        groups = [order[start : start + size].tolist() for start, size in zip(places, sizes[sizes > 1].tolist(), strict=True)]
        for at in range(0, len(groups), _BATCH):
            order[places[at : at + _BATCH]] = self._merged(groups[at : at + _BATCH])
        order = order[starts]
        return order[order >= 0]

    def _merged(self, groups: list[list[int]]) -> list[int]:
        """The row that stands for each group of rows with one key; -1 where they do not fit together."""
        merged: list[int] = []
        keys: list[str] = []
        rows: list[dict[str, Any]] = []
        image_paths: list[str] = []
        for group in groups:
            group = self._one_a_file(group)
            if len(group) == 1:
                merged.append(group[0])
                continue
            fields: dict[str, Any] = {}
            image_path = b""
            for row in group:
                given, named = decode_fields(self._texts.raw(row)), self._image_paths.raw(row)
                fields |= given
                image_path = named if named or "image_path" in given else image_path
            found = list(row_problems(fields))
            for problem in found:
                self._report(group[-1], problem)
            merged.append(-1 if found else len(self._places) + len(keys))
            if not found:
                keys.append(decoded(self._keys.raw(group[0])))
                rows.append(fields)
                image_paths.append(decoded(image_path))
        self.extend(keys, [encode_fields(row) for row in rows], columns_of(rows), image_paths)
        return merged

    def _one_a_file(self, group: list[int]) -> list[int]:
        """Of rows with one key, in order, the first of each file; each other is a problem."""
        firsts: dict[int, int] = {}
        for row in group:
            first = firsts.setdefault(bisect_right(self._first_rows, row), row)
            if first != row:
                self._report(row, f"the key stands in this file twice, first on {self._file(first)[1]} {self._places[first]}")
        return list(firsts.values())

    def _file(self, row: int) -> tuple[str, str]:
        return self._files[bisect_right(self._first_rows, row) - 1]

    def _report(self, row: int, problem: str) -> None:
        path, counted = self._file(row)
        self._problems.append(metadata_problem(path, self._places[row], problem, decoded(self._keys.raw(row)), counted))


def columns_of(rows: Sequence[dict[str, Any]], names: Iterable[str] = FIELDS_READ) -> dict[str, Sequence[Any]]:
    """{field: its value in each row, None where it is absent}."""
    layout = list(rows[0]) if rows else []
    if all([list(row) == layout for row in rows]):  # the same fields in the same order: a third of the time
        known = dict(zip(layout, zip(*map(dict[str, Any].values, rows), strict=True), strict=True))
        absent = (None,) * len(rows)
        return {name: known.get(name, absent) for name in names}
    return {name: [row.get(name) for row in rows] for name in names}


def named_pictures(image_paths: Sequence[str | None]) -> list[str]:
    """The files that values of image_path name: `\\` read as `/`, '' for None."""
    return [path.replace("\\", "/") if path else "" for path in image_paths]


def decode_fields(text: bytes) -> dict[str, Any]:
    """The fields of a row that was checked."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:  # half of a surrogate pair
        return json.loads(text)


def encode_fields(fields: Mapping[str, Any]) -> bytes:
    """The fields as JSON text."""
    try:
        return msgspec.json.encode(fields)
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(fields).encode()


def decoded(raw: bytes) -> str:
    """A text of a column."""
    return raw.decode("utf-8", "surrogateescape")


def _texts_or_fallback(columns: Mapping[str, Sequence[Any]], name: str) -> list[str]:
    """What is trained as `name`: its own value, else its fallback's; '' where both are absent or blank, as `has_text` says."""
    pairs = zip(columns[name], columns[FALLBACKS[name]], strict=True)
    return [text if text and not text.isspace() else other if other and not other.isspace() else "" for text, other in pairs]


def _most_tokens(texts: list[str]) -> list[int]:
    """At least the tokens of each text: one for each byte in lower case and NFC, which make no text three times as long."""
    return [len(text) if text.isascii() else 3 * len(text.encode("utf-8", "surrogatepass")) for text in texts]


def _sorted_keys(keys: TextColumn) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The rows in order of their keys, equal keys in their own order, and whether each of them has the key of the one before."""
    lengths = np.diff(keys.ends, prepend=0)
    repeats = np.zeros(len(keys), np.bool_)
    if lengths.max(initial=1) <= _SHORT and keys.buffer.max(initial=0) < 128:
        buffer, starts = keys.buffer.tobytes(), [0, *keys.ends.tolist()]
        names = np.array([buffer[start:end] for start, end in pairwise(starts)], np.bytes_)
        order = np.argsort(names, kind="stable")
        names = names[order]
        repeats[1:] = names[1:] == names[:-1]
    else:
        texts = list(keys)
        order = np.array(sorted(range(len(texts)), key=texts.__getitem__), np.int64)
        repeats[1:] = [texts[i] == texts[j] for i, j in pairwise(order.tolist())]
    return order, repeats


class _Texts:
    """A text column that grows."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)  # the first `_size` bytes hold texts; the others cost no memory until they do
        self._size = 0
        self._ends = array("q")

    def reserve(self, size: int) -> None:
        """Make room for so many bytes more."""
        if self._size + size > len(self._buffer):
            buffer = np.empty(self._size + size, np.uint8)
            buffer[: self._size] = self._buffer[: self._size]
            self._buffer = buffer

    def extend(self, texts: list[bytes]) -> None:
        self._append(b"".join(texts), texts)

    def extend_str(self, texts: list[str]) -> None:
        joined = "".join(texts)
        if joined.isascii():
            self._append(joined.encode(), texts)
        else:
            self.extend([text.encode("utf-8", "surrogateescape") for text in texts])

    def _append(self, joined: bytes, texts: Sequence[str] | Sequence[bytes]) -> None:
        self._ends.extend(islice(accumulate(map(len, texts), initial=self._size), 1, None))
        end = self._size + len(joined)
        if end > len(self._buffer):
            self.reserve(max(len(joined), self._size // 2))
        self._buffer[self._size : end] = np.frombuffer(joined, np.uint8)
        self._size = end

    def raw(self, row: int) -> bytes:
        start = self._ends[row - 1] if row else 0
        return self._buffer[start : self._ends[row]].tobytes()

    def column(self, rows: NDArray[np.int64] | None = None) -> TextColumn:
        """These rows, in their order, or all; no text can be added while it exists."""
        buffer, ends = self._buffer[: self._size], np.frombuffer(self._ends, np.int64)
        if rows is None:
            return TextColumn(buffer, ends)
        starts, lengths = np.concatenate([[0], ends[:-1]])[rows], np.diff(ends, prepend=0)[rows]
        new_ends = np.cumsum(lengths)
        gathered = np.empty(lengths.sum(), np.uint8)
        are_short = len(gathered) < _SHORT * len(rows)
        at = 0
        for first in range(0, len(rows), _GATHERED):  # in parts, for what stands for a text meanwhile is as large as a short text
            part = slice(first, first + _GATHERED)
            gather = _gather_bytes if are_short else _gather_texts
            texts = gather(buffer, starts[part], lengths[part])
            gathered[at : at + len(texts)] = texts
            at += len(texts)
        return TextColumn(gathered, new_ends)


def _gather_bytes(buffer: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The texts one after another, each byte by its place: the faster way for short texts."""
    ends = np.cumsum(lengths)
    return buffer[np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])]


def _gather_texts(buffer: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
    view = buffer.data
    pieces = [view[start:end] for start, end in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]
    return np.frombuffer(b"".join(pieces), np.uint8)


class _Codes(dict[str | None, int]):
    """The number of each name, in the order in which they come; -1 for no name."""

    def __init__(self) -> None:
        super().__init__({None: -1, "": -1})

    def __missing__(self, name: str | None) -> int:
        self[name] = code = len(self) - 2
        return code

    def names(self) -> list[str]:
        return [name for name in self if name]
