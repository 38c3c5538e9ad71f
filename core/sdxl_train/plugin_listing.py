"""What `sdxl-train plugins` prints: all that is installed, and one plugin in detail."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from sdxl_train.errors import ConfigError, PluginError
from sdxl_train.installed_plugins import Installed, first_line, installed_plugins
from sdxl_train.key_rows import ABSENT, REQUIRED, Row, plugin_rows
from sdxl_train.plugin_discovery import Catalogue
from sdxl_train.plugin_keys import PLUGIN_KEYS
from sdxl_train.plugins import options_of
from sdxl_train.text_display import did_you_mean
from sdxl_train.toml_text import toml_key, toml_value


def list_plugins() -> str:
    """All installed plugins by key: name, distribution with version, what they do. A default is marked *, a broken one says why."""
    lines: list[tuple[str, ...]] = [("KEY", "NAME", "FROM", "WHAT IT DOES")]
    for plugin in installed_plugins():
        name = plugin.name + ("*" if plugin.is_default else "")
        said = f"broken: {' '.join(plugin.broken.split())}" if plugin.broken else plugin.summary
        lines.append((plugin.key.key, name, plugin.origin, said))
    return _aligned(lines) + "* used by default\n"


def plugin_info(key: str, name: str) -> str:
    """One plugin: where it comes from, what it does, and its options.

    Args:
        key: the TOML key that names it.
        name: an entry-point name, an import path or a file, as in the TOML file.
    Raises:
        ConfigError: no such key, or nothing of this name can be loaded.
    """
    if key not in PLUGIN_KEYS:
        hint = did_you_mean(key, PLUGIN_KEYS)
        raise ConfigError(f'no key that names plugins is called "{key}"{hint} (there are: {", ".join(PLUGIN_KEYS)})')
    row = PLUGIN_KEYS[key]
    try:
        target = Catalogue().find(row, name)
        plugin = Installed(row, target.name, target.origin, "", first_line(target.value), options_of(target))
    except PluginError as error:
        raise ConfigError(str(error)) from error
    parts = [
        plugin.selection,
        f"from: {target.origin}",
        f"source: {_source(target.value)}",
        f"hooks of {key}: {', '.join(row.hooks)}",
        "",
        inspect.getdoc(target.value) or "(no description)",
        "",
    ]
    options = plugin_rows(plugin)
    parts.append("options:" if options else "It has no options.")
    parts += [_option(option) for option in options]
    return "\n".join(parts) + "\n"


def _option(row: Row) -> str:
    default = "required" if row.default is REQUIRED else "absent" if row.default is ABSENT else toml_value(row.default)
    allowed = f", {row.allowed}" if row.allowed else ""
    aliases = f"\n      also: {', '.join(row.aliases)}" if row.aliases else ""
    return f"  {toml_key(*row.path)} ({row.type}{allowed}), default {default}\n      {row.help}{aliases}"


def _source(value: object) -> str:
    """The file and line of a class or function."""
    try:
        return f"{inspect.getsourcefile(value)}:{inspect.getsourcelines(value)[1]}"  # pyright: ignore[reportArgumentType]
    except (TypeError, OSError):  # built without source
        return "unknown"


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:-1]]
    rows = ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) for line in lines]
    return "".join(f"{row.rstrip()}\n" for row in rows)
