"""Texts as columns: a buffer and the ends of its pieces, so that a million of them are two arrays and not a million objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_ENCODING, _ERRORS = "utf-8", "surrogateescape"  # a file name may hold bytes that are no UTF-8


class TextColumn(Sequence[str]):
    """N texts in one buffer: 8 bytes each beside their own.

    Attributes:
        buffer: all texts, one after another. [total bytes] uint8
        ends: where each text ends in the buffer. [N] int64
    """

    def __init__(self, buffer: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.buffer = buffer
        self.ends = ends

    @classmethod
    def of(cls, texts: Iterable[str | bytes]) -> TextColumn:
        """The column of these texts; bytes are UTF-8 already."""
        buffer = bytearray()
        ends: list[int] = []
        for text in texts:
            buffer += text if isinstance(text, bytes) else text.encode(_ENCODING, _ERRORS)
            ends.append(len(buffer))
        return cls(np.frombuffer(buffer, np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __eq__(self, other: object) -> bool:
        """Whether all texts are the same."""
        if not isinstance(other, TextColumn):
            return NotImplemented
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.buffer, other.buffer)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, i: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices: use `take`
        return self.raw(i).decode(_ENCODING, _ERRORS)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of each text in bytes. [N]"""
        return np.diff(self.ends, prepend=0)

    def raw(self, i: int) -> bytes:
        """A text as it stands in the buffer."""
        start = self.ends[i - 1] if i > 0 else 0
        return self.buffer[start : self.ends[i]].tobytes()

    def __iter__(self) -> Iterator[str]:
        start, view = 0, self.buffer.data
        for end in self.ends.tolist():
            yield str(view[start:end], _ENCODING, _ERRORS)
            start = end

    def raws(self) -> Iterator[bytes]:
        """All texts as they stand in the buffer."""
        start, view = 0, self.buffer.data
        for end in self.ends.tolist():
            yield bytes(view[start:end])
            start = end

    def take(self, rows: NDArray[np.int64]) -> TextColumn:
        """The texts of these rows, in their order."""
        starts, ends, view = np.concatenate([[0], self.ends[:-1]])[rows].tolist(), self.ends[rows].tolist(), self.buffer.data
        buffer = np.frombuffer(b"".join(view[start:end] for start, end in zip(starts, ends, strict=True)), np.uint8)
        lengths = np.array(ends, np.int64) - np.array(starts, np.int64)
        return TextColumn(buffer, np.cumsum(lengths))


class NameColumn:
    """N values of which many are equal, or absent: each is a number into the list of the distinct ones.

    Attributes:
        names: the distinct values, in the order in which they came.
        codes: the place of each value in `names`; -1 where there is none. [N] int32
    """

    def __init__(self, names: list[str], codes: NDArray[np.int32]) -> None:
        self.names = names
        self.codes = codes

    def occurrences(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> dict[str, int]:
        """How often each value stands in these rows; those that do not are left out."""
        codes = self.codes[rows]
        counts = np.bincount(codes[codes >= 0], minlength=len(self.names))
        return {name: count for name, count in zip(self.names, counts.tolist(), strict=True) if count}

    def take(self, rows: NDArray[np.int64]) -> NameColumn:
        """The values of these rows, in their order."""
        return NameColumn(self.names, self.codes[rows])
