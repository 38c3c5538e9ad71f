"""Reads the TOML file and the --set arguments, and knows on which line each key stands."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from sdxl_train.errors import ConfigError

MAX_BYTES = 1_000_000
KeyPath = tuple[str, ...]


@dataclass
class TomlSource:
    """The user's settings as nested dicts, and where each came from.

    Attributes:
        name: the file as the user named it.
        text: its text, without a byte-order mark.
        data: what it says, with the --set arguments put in.
        from_arguments: the --set argument behind each key path that one of them set.
    """

    name: str
    text: str
    data: dict[str, Any]
    from_arguments: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """`sdxl.toml:31` or `--set KEY=VALUE`; the file's name alone for a key that is not given."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.from_arguments:
                return f"--set {self.from_arguments[path[:length]]}"
        line = self._line(path)
        return f"{self.name}:{line}" if line else self.name

    def _line(self, path: KeyPath) -> int | None:
        """The line on which a key is set: the first that mentions it and after which a prefix of the file holds it."""
        lines = self.text.splitlines(keepends=True)
        mention = re.compile(r"(?<![\w-])" + re.escape(path[-1]) + r"(?![\w-])")
        for number, line in enumerate(lines):
            if not mention.search(line):
                continue
            for end in range(number + 1, min(number + 200, len(lines)) + 1):  # a value may go on over further lines
                prefix = _parse_or_none("".join(lines[:end]))
                if prefix is not None:
                    if _holds(prefix, path):
                        return number + 1
                    break
        return None


def read_toml(path: Path, settings: Sequence[str] = ()) -> TomlSource:
    """Read a configuration file and put the --set arguments in.

    Args:
        settings: `KEY=VALUE` texts; KEY may be dotted, VALUE is a TOML value, a bare word counts as a string.
    Raises:
        ConfigError: the file is missing, too large, not UTF-8 or not TOML, or an argument has no `=`; names file and line.
    """
    source = parse_toml(_read_text(path), str(path))
    for setting in settings:
        key_path, value = _parse_setting(setting)
        table = source.data
        for part in key_path[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {setting}: {part} is not a table")
        table[key_path[-1]] = value
        source.from_arguments[key_path] = setting
    return source


def parse_toml(text: str, name: str) -> TomlSource:
    """Parse a configuration text; `name` stands for it in messages."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    try:
        return TomlSource(name, text, tomli.loads(text))
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{name}:{error.lineno}: this is not TOML: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ConfigError(f"{name}: arrays or tables are nested too deeply") from None
    except ValueError as error:  # numbers of thousands of digits
        raise ConfigError(f"{name}: a value cannot be read: {error}") from None


def show(value: Any) -> str:
    """A value as TOML would write it, short and without control characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
    return text if len(text) <= 100 else text[:97] + "..."


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: {size} bytes are too many for a configuration (at most {MAX_BYTES})")
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: this is not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8") from None


def _parse_setting(setting: str) -> tuple[KeyPath, Any]:
    key, equals, value = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting}: expected KEY=VALUE")
    holder = _parse_or_none(f"{key.strip()} = 0")
    if holder is None:
        raise ConfigError(f"--set {setting}: {key.strip()!r} is not a TOML key")
    path: list[str] = []
    while isinstance(holder, dict):
        ((name, holder),) = holder.items()
        path.append(name)
    parsed = _parse_or_none(f"value = {value}")
    return tuple(path), value.strip() if parsed is None or set(parsed) != {"value"} else parsed["value"]


def _parse_or_none(text: str) -> dict[str, Any] | None:
    try:
        return tomli.loads(text)
    except (ValueError, RecursionError):  # TOMLDecodeError is a ValueError
        return None


def _holds(data: Any, path: KeyPath) -> bool:
    for part in path:
        if isinstance(data, list):
            if not part.isdigit() or int(part) >= len(data):
                return False
            data = data[int(part)]
        elif isinstance(data, dict) and part in data:
            data = data[part]
        else:
            return False
    return True
