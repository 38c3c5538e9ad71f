"""Strict JSON, fast: rows are decoded by msgspec; what it refuses, and what only could be wrong, is read again by an exact reader.

Beyond JSON's own rules a row names no field twice, nests no deeper than `MAX_DEPTH`, and its numbers are finite.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from json.decoder import JSONDecodeError, JSONDecoder
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from sdxl_train.text_display import shown

MAX_DEPTH = 100  # levels of a value; the readers of Python and msgspec stop at some hundreds, depending on who calls them
_BATCH = 128  # rows that exist as Python objects at a time
_BATCH_BYTES = 1 << 16
_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"

_Member = tuple[int, str, bytes]  # of an object: line of the value, key, text of the value


@dataclass
class Piece:
    """Some consecutive rows of a file.

    Attributes:
        lines: where each begins.
        texts: each as JSON text.
        keys: of the rows of one JSON object; empty in JSON Lines.
    """

    lines: list[int] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


class NotJsonError(ValueError):
    """A text that cannot be read on. `lines`: how many lines after its start the fault is."""

    def __init__(self, message: str, lines: int) -> None:
        super().__init__(message)
        self.lines = lines


class _RepeatedFieldError(ValueError):
    """An object names a field twice; the message is the field."""


class _NotFiniteError(ValueError):
    """NaN or Infinity, which Python's reader accepts and JSON does not have, or a number as large; the message is the word."""


def json_lines(path: str) -> Iterator[Piece]:
    """The rows of a JSON Lines file, one a line; blank lines are left out. Only a piece is in memory."""
    with open(path, "rb") as file:
        if file.read(len(_BOM)) != _BOM:
            file.seek(0)
        line = 1
        while read := file.readlines(_BATCH_BYTES):
            texts = [text.strip(_SPACE) for text in read]
            lines = list(range(line, line + len(read)))
            line += len(read)
            if not all(texts):
                lines = [number for number, text in zip(lines, texts, strict=True) if text]
                texts = [text for text in texts if text]
            if texts:
                yield Piece(lines, texts)


def json_object(path: str) -> Iterator[Piece]:
    """The rows of a file that is one object {key: row}, in its order; a key given twice comes twice.

    Raises:
        NotJsonError: after the rows before the fault.
    """
    with open(path, "rb") as file:
        raw = file.read().removeprefix(_BOM)
    piece = Piece()
    try:
        for line, key, text in _members(raw):
            piece.lines.append(line)
            piece.keys.append(key)
            piece.texts.append(text)
            if len(piece.texts) == _BATCH:
                yield piece
                piece = Piece()
    except NotJsonError:
        if piece.texts:
            yield piece
        raise
    if piece.texts:
        yield piece


def decode_rows(texts: list[bytes]) -> tuple[list[Any], list[int]]:
    """The values of these texts, and which of them have to be read by `decode_exactly`: not JSON for sure or by suspicion."""
    try:
        rows = list(map(_decode, texts))
        failed: list[int] = []
    except (ValueError, RecursionError):
        rows = [_decoded_or_none(text) for text in texts]
        failed = [i for i, row in enumerate(rows) if row is None]
    num_fields = [len(row) if isinstance(row, dict) else -1 for row in rows]
    suspects = set(_suspects(texts, num_fields).tolist()).union(failed)
    return rows, sorted(suspects)


def decode_exactly(raw: bytes) -> tuple[Any, list[tuple[int, str]]]:
    """The value of a text, and each thing that is wrong with it: (lines after its start, problem).

    Raises:
        NotJsonError: it cannot be read at all.
    """
    text = _utf8(raw)
    problems: list[tuple[int, str]] = []
    try:
        try:
            value, end = _raw_decode(_STRICT, text, 0)
        except (_RepeatedFieldError, _NotFiniteError) as error:
            repeated = isinstance(error, _RepeatedFieldError)
            problem = (
                f"the field {shown(str(error))} is given twice" if repeated else f"{error} is no number; leave the field out or give null"
            )
            problems.append((text.count("\n", 0, _refused_position(text, error)), problem))
            value, end = _raw_decode(JSONDecoder(), text, 0)
        if end < len(text):
            raise JSONDecodeError("something follows the object", text, end)
    except JSONDecodeError as error:
        raise NotJsonError(f"it is not JSON: {error.msg}", text.count("\n", 0, error.pos)) from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        problems.append((0, f"values are nested too deeply, more than {MAX_DEPTH} levels"))
    return value, problems


_decode = msgspec.json.Decoder().decode


def _decoded_or_none(text: bytes) -> Any:
    try:
        return _decode(text)
    except (ValueError, RecursionError):
        return None


def _suspects(texts: list[bytes], num_fields: list[int]) -> NDArray[np.int64]:
    """Rows that may name a field twice, nest too deeply or hold a NUL; every one that does is among them.

    Every name of a field ends with a quote and, but for space, a colon. Strings may hold colons too, so a row with as many `":` as
    decoded fields names none twice, provided that no space stands before a colon.
    """
    buffer = np.frombuffer(b"\n".join([b"", *texts, b"\n" * 6]), np.uint8)
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1)  # of each text, in the buffer
    colons = np.flatnonzero(buffer == ord(":"))
    before = buffer[colons - 1]
    suspect = _occurrences(colons[before == ord('"')], ends) != num_fields
    spaced = colons[before <= ord(" ")]
    spaced = spaced[(buffer[spaced - 2] == ord('"')) | (buffer[spaced - 2] <= ord(" "))]
    suspect |= _occurrences(spaced, ends) > 0
    suspect |= _occurrences(np.flatnonzero(buffer == ord("[")), ends) > MAX_DEPTH
    escapes = np.flatnonzero(buffer == ord("\\"))
    for i, char in enumerate(b"u0000", start=1):
        escapes = escapes[buffer[escapes + i] == char]
    suspect |= _occurrences(escapes, ends) > 0
    return np.flatnonzero(suspect)


def _occurrences(positions: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of the sorted positions lie in each text."""
    return np.diff(np.searchsorted(positions, ends, side="right"), prepend=0) if len(positions) else np.zeros_like(ends)


# What stands between two values of an object that is known to be JSON, with the name of the second.
_NAME = re.compile(rb'[ \t\r\n,]*("(?:[^"\\]|\\.)*")[ \t\r\n]*:[ \t\r\n]*', re.DOTALL)


def _members(raw: bytes) -> Iterator[_Member]:
    """The members of the object, found by msgspec; from where the file holds others (a name given twice is one to it) found exactly."""
    try:
        values = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).values()
    except (ValueError, RecursionError):
        values = ()
    line, at = 1, 0
    for value in values:
        text = bytes(value)
        name = _NAME.match(raw, at or raw.index(b"{") + 1)
        if name is None or not raw.startswith(text, name.end()):
            break
        line += raw.count(b"\n", at, name.end())
        yield line, _decode(name[1]), text
        at = name.end() + len(text)
        line += text.count(b"\n")
    yield from _exact_members(raw, at, line)


def _exact_members(raw: bytes, at: int, line: int) -> Iterator[_Member]:
    """The members of the object: all, or those that follow a value that ends at `at`, in `line`.

    Raises:
        NotJsonError: its lines count from the start of the file.
    """
    try:
        text = _utf8(raw[at:])
    except NotJsonError as error:
        raise NotJsonError(str(error), line - 1 + error.lines) from None
    decoder, counted = JSONDecoder(), 0
    try:
        follows = at > 0
        position = _skip_space(text, 0) if follows else _expect(text, "{", _skip_space(text, 0))
        while text[position : position + 1] != "}":
            if follows:
                position = _expect(text, ",", position)
            _expect(text, '"', position)
            key, position = decoder.raw_decode(text, position)
            start = _expect(text, ":", _skip_space(text, position))
            _, end = _raw_decode(decoder, text, start)
            line, counted = line + text.count("\n", counted, start), start
            yield line, key, text[start:end].encode()
            position = _skip_space(text, end)
            follows = True
        position = _skip_space(text, position + 1)
        if position < len(text):
            raise JSONDecodeError("something follows the end of its object", text, position)
    except JSONDecodeError as error:
        raise NotJsonError(f"it is not JSON: {error.msg}", line - 1 + text.count("\n", counted, error.pos)) from None


def _raw_decode(decoder: JSONDecoder, text: str, start: int) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends."""
    try:
        return decoder.raw_decode(text, start)
    except RecursionError:
        raise JSONDecodeError("values are nested too deeply", text, start) from None
    except (JSONDecodeError, _RepeatedFieldError, _NotFiniteError):
        raise
    except ValueError as error:  # a number of thousands of digits
        raise JSONDecodeError(str(error).split(";")[0], text, start) from None


_NOT_FINITE = re.compile(r"[\[,:][ \t\n\r]*(?=-?Infinity|NaN)")


def _refused_position(text: str, error: _RepeatedFieldError | _NotFiniteError) -> int:
    """Where in the text of a row the thing stands that was refused."""
    if isinstance(error, _RepeatedFieldError):
        name = json.dumps(str(error), ensure_ascii=False)
        return max(0, text.find(name, text.find(name) + 1))
    found = _NOT_FINITE.search(text)
    return found.end() if found else max(0, text.find(str(error)))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        raise _RepeatedFieldError(next(name for name, _ in pairs if name in seen or seen.add(name)))
    return fields


def _refuse_constant(name: str) -> Any:
    raise _NotFiniteError(name)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _NotFiniteError(digits)
    return number


_STRICT = JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_is_deeper(item, levels - 1) for item in inner))


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise NotJsonError("it is not UTF-8; save it as UTF-8", raw.count(b"\n", 0, error.start)) from None


_SPACES = re.compile(r"[ \t\n\r]*")


def _skip_space(text: str, position: int) -> int:
    found = _SPACES.match(text, position)
    return found.end() if found else position


def _expect(text: str, char: str, position: int) -> int:
    """The position of what follows `char` and space."""
    if text[position : position + 1] != char:
        found = "the end of the file" if position >= len(text) else json.dumps(text[position : position + 20])
        raise JSONDecodeError(f"expected {char} but found {found}", text, position)
    return _skip_space(text, position + 1)
