"""Writes values as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def toml_value(value: Any) -> str:
    """A bool, number, string, or a list, tuple or mapping of them, on one line.

    Raises:
        TypeError: TOML has no word for it (None, say).
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return re.sub(r"e([+-])0*(\d)", lambda found: f"e{found[1].strip('+')}{found[2]}", repr(value))
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{toml_key(name)} = {toml_value(inner)}' for name, inner in value.items())}}}"
    raise TypeError(f"TOML has no {type(value).__name__}")


def toml_key(*path: str) -> str:
    """A dotted key, quoted where TOML needs it."""
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part, ensure_ascii=False) for part in path)


def toml_document(values: Mapping[str, Any]) -> str:
    """A whole file: plain keys first, then one `[table]` for each mapping, since TOML puts what follows a table into it."""
    plain = [f"{toml_key(name)} = {toml_value(value)}" for name, value in values.items() if not isinstance(value, Mapping)]
    for name, table in values.items():
        if isinstance(table, Mapping):
            plain += ["", f"[{toml_key(name)}]", *(f"{toml_key(inner)} = {toml_value(value)}" for inner, value in table.items())]
    return "\n".join(plain) + "\n"
