"""What is known about a picture: the fields of its metadata, their rules, and the .txt file beside it."""

import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

from sdxl_train.data.captions import has_text
from sdxl_train.errors import DataError, Problem
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


def complete(row: dict[str, Any], image_path: str | None) -> dict[str, Any]:
    """The metadata as plugins get it: every documented field (None when absent), the fallbacks applied, then all further fields.

    A blank caption or description gives way to its fallback.
    """
    metadata: dict[str, Any] = dict.fromkeys(FIELDS) | row
    for name, fallback in FALLBACKS.items():
        if not has_text(metadata[name]) and has_text(row.get(fallback)):
            metadata[name] = row[fallback]
    metadata["image_path"] = image_path
    return metadata


def row_problems(row: Any) -> Iterator[str]:
    """What is wrong with the fields of a datum."""
    if not isinstance(row, dict):
        yield f"it must be an object of fields, found {excerpt(row)}"
        return
    for name, wanted in FIELDS.items():
        value = row.get(name)
        if value is not None and not _CHECKS[wanted](value):
            yield f"{name} {text_fault(value)}" if wanted == "text" else f"{name} must be {wanted}, found {excerpt(value)}"
    for name, fallback in FALLBACKS.items():
        value = row.get(fallback)
        if value and not is_file_text(value) and not (isinstance(row.get(name), str) and has_text(row[name])):
            yield f"{fallback}, used as {name}, {text_fault(value)}"


def is_file_text(value: Any) -> bool:
    """Whether it is text that can be written to a file or be the name of one: no NUL, and no half of a surrogate pair.

    The halves that stand for bytes of file names that are no UTF-8 (Python's surrogateescape) are accepted.
    """
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        return value.isascii() or bool(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False


def text_fault(value: Any) -> str:
    """What is wrong with a value that is no `is_file_text`, to follow its name in a message."""
    if not isinstance(value, str):
        return f"must be text, found {excerpt(value)}"
    if "\0" in value:
        return "holds a NUL character"
    half = next(char for char in value if "\ud800" <= char <= "\udfff" and not is_file_text(char))
    return f"holds half of a surrogate pair, {shown(half)}, which is no character"


def metadata_problem(path: str, place: int | None, message: str, key: str | None = None, counted: str = "line") -> Problem:
    """A problem of a metadata file: at a line, or another thing that is `counted`; of the datum `key`."""
    where = shown(path) if place is None else f"{shown(path)}:{place}" if counted == "line" else f"{shown(path)}: {counted} {place}"
    of_key = "" if key is None else f'key "{shown(key)}": '
    return Problem("metadata", f"{where}: {of_key}{message}", path, key)


def read_caption_file(path: str) -> str:
    """The text of a caption file: strict UTF-8 whatever the locale, without BOM and CR, stripped.

    Raises:
        DataError: not a regular file, unreadable, not UTF-8, or with a NUL character.
    """
    try:
        regular_size(path)
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{shown(path)}: it cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise DataError(f"{shown(path)}: it is not UTF-8 ({found}); save it as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{shown(path)}: it holds a NUL character; it may be UTF-16, save it as UTF-8")
    return text.replace("\r", "").strip()


def regular_size(path: str) -> int:
    """The bytes of a regular file. Raises OSError for anything else: opening a pipe would wait for ever."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not a regular file")
    return status.st_size


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


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and 1 <= side < 1 << 31 for side in value)


_CHECKS: dict[str, Callable[[Any], bool]] = {"text": is_file_text, "a number": _is_number, "[w, h] in px": _is_size}


def excerpt(value: Any) -> str:
    """The beginning of a value, for a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
