"""What is known about the pictures: metadata JSON files, merged field by field, or the .txt file beside each picture."""

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from json.decoder import JSONDecodeError, JSONDecoder
from typing import Any

from sdxl_train.errors import DataError
from sdxl_train.text_display import shown

# Field -> what its value must be, when it is given and not null. Further fields pass through untouched.
FIELDS = {
    "image_path": "text",
    "caption": "text",
    "description": "text",
    "artist": "text",
    "characters": "text",
    "styles": "text",
    "quality": "text",
    "aesthetic_score": "a number",
    "perceptual_hash": "text",
    "safe_rating": "a number",
    "safe_level": "text",
    "original_size": "[w, h] in px",
}
FALLBACKS = {"caption": "tags", "description": "nl_caption"}
REPORTED = 50  # problems of one kind that are listed before the rest is only counted

_Report = Callable[[int, str], None]  # (position in the text, problem)


class _RepeatedKeyError(ValueError):
    """An object names a key twice; the message is the key."""


class _NotFiniteError(ValueError):
    """NaN or Infinity, which Python's reader accepts and JSON does not have; the message is the word."""


def complete(row: dict[str, Any], image_path: str | None) -> dict[str, Any]:
    """The metadata as plugins get it: every documented field (None when absent), the fallbacks applied, then all further fields."""
    metadata: dict[str, Any] = dict.fromkeys(FIELDS) | row
    for name, fallback in FALLBACKS.items():
        metadata[name] = metadata[name] or row.get(fallback) or metadata[name]
    metadata["image_path"] = image_path
    return metadata


def read_metadata_files(paths: list[str]) -> dict[str, str]:
    """Merge the files: {key: its fields as JSON text}. A field given by several files has the value of the last one.

    Raises:
        DataError: with file and line of every problem: not a regular file, not UTF-8, not JSON, a repeated key, a wrong type.
    """
    rows: dict[str, str] = {}
    problems: list[str] = []
    for path in paths:
        text = _read_json_text(path, problems)
        if text is None:
            continue
        found: list[tuple[int, str]] = []
        for key, row in _parse_rows(text, lambda position, problem, found=found: found.append((position, problem))).items():
            earlier = rows.get(key)
            rows[key] = row if earlier is None else json.dumps(json.loads(earlier) | json.loads(row))
        problems += [f"{shown(path)}:{_line(text, position)}: {problem}" for position, problem in found]
    if problems:
        raise DataError(problem_list("metadata_files: these problems must be mended first", problems))
    return rows


def read_caption_file(path: str) -> str:
    """The text of a caption file: strict UTF-8 whatever the locale, without BOM and CR, stripped.

    Raises:
        DataError: not a regular file, unreadable, not UTF-8, or with a NUL character.
    """
    try:
        text = _read_regular(path).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{shown(path)}: it cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise DataError(f"{shown(path)}: it is not UTF-8 ({found}); save it as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{shown(path)}: it holds a NUL character; it may be UTF-16, save it as UTF-8")
    return text.replace("\r", "").strip()


def fields_from_tags(caption: str) -> dict[str, Any]:
    """The fields that a comma-separated caption names: artist:x, character:x, style:x and tags that contain "quality"."""
    fields: dict[str, Any] = {"caption": caption}
    characters, styles = [], []
    for tag in map(str.strip, caption.split(",")):
        kind, colon, name = tag.partition(":")
        if colon and kind == "artist":
            fields["artist"] = name.strip()
        elif colon and kind == "character":
            characters.append(name.strip())
        elif colon and kind == "style":
            styles.append(name.strip())
        elif "quality" in tag:
            fields["quality"] = tag.replace("quality", "").strip()
    if characters:
        fields["characters"] = ", ".join(characters)
    if styles:
        fields["styles"] = ", ".join(styles)
    return fields


def problem_list(heading: str, problems: list[str]) -> str:
    """One message of all problems, a line each; beyond `REPORTED` the rest is counted."""
    more = [f"... and {len(problems) - REPORTED} more"] if len(problems) > REPORTED else []
    return "\n  ".join([f"{heading} ({len(problems)}):", *problems[:REPORTED], *more])


def _read_regular(path: str) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a regular file")
    with open(path, "rb") as file:
        return file.read()


def _read_json_text(path: str, problems: list[str]) -> str | None:
    raw = b""
    try:
        raw = _read_regular(path)
        return raw.decode("utf-8-sig")
    except OSError as error:
        problems.append(f"{shown(path)}: it cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.append(f"{shown(path)}:{line}: it is not UTF-8; save it as UTF-8")
    return None


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


_SPACE = re.compile(r"[ \t\n\r]*")
_NOT_FINITE = re.compile(r"[\[,:][ \t\n\r]*(?=-?Infinity|NaN)")


def _parse_rows(text: str, report: _Report) -> dict[str, str]:
    """{key: the JSON text of its object}, in one pass that knows where it is; each object is checked and let go."""
    rows: dict[str, str] = {}
    try:
        for key, key_at, row, start, end in _walk(text, report):
            if key in rows:
                report(key_at, f'the key "{shown(key)}" stands in this file twice')
            for problem in _row_problems(key, row):
                report(start, f'key "{shown(key)}": {problem}')
            rows[key] = text[start:end]
    except JSONDecodeError as error:
        report(error.pos, f"it is not JSON: {error.msg}")
    return rows


def _walk(text: str, report: _Report) -> Iterator[tuple[str, int, Any, int, int]]:
    """(key, its position, value, start and end of the value) of each member of the file's object."""
    decoder = JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)
    position = _expect(text, "{", _skip_space(text, 0))
    if text[position : position + 1] != "}":
        while True:
            key_at = position
            _expect(text, '"', position)
            key, position = decoder.raw_decode(text, position)
            start = _expect(text, ":", _skip_space(text, position))
            row, end = _decode(decoder, text, start, report)
            yield key, key_at, row, start, end
            position = _skip_space(text, end)
            if text[position : position + 1] == "}":
                break
            position = _expect(text, ",", position)
    position = _skip_space(text, position + 1)
    if position < len(text):
        raise JSONDecodeError("something follows the end of its object", text, position)


def _decode(decoder: JSONDecoder, text: str, start: int, report: _Report) -> tuple[Any, int]:
    """The value at `start` and where it ends. What is refused but leaves the rest readable is reported."""
    try:
        return decoder.raw_decode(text, start)
    except JSONDecodeError:
        raise
    except _RepeatedKeyError as error:
        name = json.dumps(str(error), ensure_ascii=False)
        first = text.find(name, start)
        report(max(start, text.find(name, first + 1)), f"the field {shown(name)} is given twice")
    except _NotFiniteError as error:
        found = _NOT_FINITE.search(text, start)
        report(found.end() if found else start, f"{error} is no number; leave the field out or give null")
    except RecursionError:
        raise JSONDecodeError("values are nested too deeply", text, start) from None
    except ValueError as error:  # a number of thousands of digits
        raise JSONDecodeError(str(error).split(";")[0], text, start) from None
    return JSONDecoder().raw_decode(text, start)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        raise _RepeatedKeyError(next(name for name, _ in pairs if name in seen or seen.add(name)))
    return fields


def _refuse_constant(name: str) -> Any:
    raise _NotFiniteError(name)


def _row_problems(key: str, row: Any) -> Iterator[str]:
    if not isinstance(row, dict):
        yield f"its value must be an object of fields, found {_excerpt(row)}"
        return
    if not _is_encodable(key) or "\0" in key:
        yield "no file can have this name"
    for name, wanted in FIELDS.items():
        value = row.get(name)
        if value is not None and not _CHECKS[wanted](value):
            yield f"{name} must be {wanted}, found {_excerpt(value)}"
    for name, fallback in FALLBACKS.items():
        value = row.get(fallback)
        if value and not row.get(name) and not _is_text(value):
            yield f"{fallback}, used as {name}, must be text, found {_excerpt(value)}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value and _is_encodable(value)


def _is_encodable(text: str) -> bool:
    """Whether it can be written as bytes; bytes of file names that are no UTF-8 count (Python's surrogateescape)."""
    try:
        return text.isascii() or bool(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and 1 <= side < 1 << 31 for side in value)


_CHECKS: dict[str, Callable[[Any], bool]] = {"text": _is_text, "a number": _is_number, "[w, h] in px": _is_size}


def _excerpt(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _expect(text: str, char: str, position: int) -> int:
    """The position of what follows `char` and space."""
    if text[position : position + 1] != char:
        found = "the end of the file" if position >= len(text) else json.dumps(text[position : position + 20])
        raise JSONDecodeError(f"expected {char} but found {found}", text, position)
    return _skip_space(text, position + 1)
