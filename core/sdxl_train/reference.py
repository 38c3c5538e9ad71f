"""The configuration as a whole, from the declarations: an example file and a JSON schema for editors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import groupby
from typing import Any

from sdxl_train.installed_plugins import Installed, installed_plugins
from sdxl_train.key_rows import ABSENT, REQUIRED, SECTIONS_ZH, Row, any_case, key_rows
from sdxl_train.keys import Config
from sdxl_train.option_schemas import OptionSchemas, Schema, option_schemas
from sdxl_train.options import flat_keys, option_aliases
from sdxl_train.plugin_discovery import OWN_DISTRIBUTION
from sdxl_train.plugin_keys import PLUGIN_KEYS, PluginKey
from sdxl_train.toml_text import toml_key, toml_value

# What the example file shows where a key has no default: required ones as they are, the others commented out.
_EXAMPLES: dict[str, Any] = {
    "pretrained_model_name_or_path": "models/sd_xl_base_1.0.safetensors",
    "image_dirs": ["pictures"],
    "output_dir": "output/%date%-%index%",
    "records_cache_dir": "records",
    "vae": "models/sdxl_vae.safetensors",
    "resume_from": "latest",
    "max_train_steps": 1000,
    "learning_rate_te1": 1e-6,
    "learning_rate_te2": 1e-6,
    "block_lr": 1e-5,
    "sample_benchmark": "benchmark.json",
    "repeats": {"best": 3, "worst": 0},
    "tags": ["signature"],
}
_HEADER = """\
# sdxl-train {version}: every key with its default. `sdxl-train example` prints this file with the plugins that are installed.
# A key without a default is commented out; so are the options of plugins that the default does not use. Tables come last, since TOML
# puts everything after a [table] into it.
# sdxl-train {version}：所有配置项及其默认值。没有默认值的配置项和未选用插件的选项以注释给出；表（[table]）必须放在文件末尾。
"""


def example_toml(built_in_only: bool = False) -> str:
    """A configuration with every key, its default and a comment in both languages; valid once its paths exist.

    Args:
        built_in_only: leave out the plugins of other distributions.
    """
    plugins = installed_plugins(built_in_only)
    rows = key_rows(plugins)
    parts = [_HEADER.format(version=version(OWN_DISTRIBUTION))]
    for section, group in groupby((row for row in rows if not row.is_table_entry), key=lambda row: row.section):
        parts.append(f"# ==== {section} / {SECTIONS_ZH[section]} ====\n")
        parts += [_entry(row) for row in group]
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.is_table_entry:
            tables.setdefault(row.path[:-1], []).append(row)
    parts.append("# ==== Tables / 表 ====\n")
    for path, group in tables.items():
        parts.append(f"{'' if any(row.is_used for row in group) else '# '}[{toml_key(*path)}]\n")
        parts += [_entry(row) for row in group]
    for key in PLUGIN_KEYS.values():  # keys none of whose installed plugins has options
        if key.options_key not in {path[0] for path in tables}:
            comment = f"# Options of what {key.key} names; empty by default.\n# {key.key} 所选插件的参数；默认为空。"
            parts.append(f"{comment}\n# [{key.options_key}]\n")
    parts += [f"# {plugin.selection} of {plugin.origin} is broken: {_one_line(plugin.broken)}\n" for plugin in plugins if plugin.broken]
    return "\n".join(parts)


def _entry(row: Row) -> str:
    """A key with its comments. It is commented out when it has no value, or when nothing would read it."""
    allowed = f" ({row.allowed})" if row.allowed else ""
    lines = [f"# {_one_line(row.help)}{allowed}"]
    if row.zh != row.help:
        lines.append(f"# {_one_line(row.zh)}")
    if row.owners and not row.is_used:
        lines.append(f"# Only with {' or '.join(plugin.selection for plugin in row.owners)}.")
    is_live = row.is_used and row.default is not ABSENT
    lines.append(f"{'' if is_live else '# '}{toml_key(row.path[-1])} = {_example_value(row)}")
    return "\n".join(lines) + "\n"


def _example_value(row: Row) -> str:
    if row.default is not ABSENT and row.default is not REQUIRED:
        return toml_value(row.default)
    if row.path[-1] in _EXAMPLES:
        return toml_value(_EXAMPLES[row.path[-1]])
    kind = row.schema.get("type")
    if row.path[-1] in PLUGIN_KEYS:
        return toml_value("./my_plugins.py:my_function")
    return toml_value({"string": "...", "boolean": False, "array": []}.get(str(kind), row.schema.get("minimum", 0)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def json_schema(built_in_only: bool = False) -> Schema:
    """A JSON schema (draft 2020-12) of the whole configuration file with the installed plugins.

    Args:
        built_in_only: leave out the plugins of other distributions.
    """
    plugins = installed_plugins(built_in_only)
    with_options = [plugin for plugin in plugins if plugin.options]
    schemas = option_schemas([Config, *(plugin.options for plugin in with_options if plugin.options)])
    properties: Schema = dict(schemas.properties[Config])
    for plugin in with_options:
        assert plugin.options is not None
        flat = flat_keys(plugin.options)
        properties |= {name: schema for name, schema in schemas.properties[plugin.options].items() if name in flat}
    properties |= {row.path[0]: row.schema for row in key_rows(plugins) if row.path[0] in PLUGIN_KEYS}
    conditions = []
    for key in PLUGIN_KEYS.values():
        properties[key.options_key] = {"type": "object", "description": f"options of the plugins that {key.key} names"}
        conditions += list(_table_conditions(key, [plugin for plugin in plugins if plugin.key is key], schemas))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"sdxl-train {version(OWN_DISTRIBUTION)} configuration",
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, field in Config.model_fields.items() if field.is_required()],
        "properties": properties,
        "allOf": conditions,
        "$defs": dict(schemas.definitions),
    }


def _table_conditions(key: PluginKey, plugins: Iterable[Installed], schemas: OptionSchemas) -> Iterator[Schema]:
    """What the options table of a key may hold, by what the key names. A name that is a path allows anything."""
    tables = {plugin.name: _table_schema(plugin, schemas) for plugin in plugins if not plugin.broken}
    if key.shape != "name":
        is_list: Schema = {"not": {"required": [key.key], "properties": {key.key: {"type": "string"}}}}
        named = {"type": "object", "properties": tables, "additionalProperties": {"type": "object"}}
        yield {"if": is_list, "then": {"properties": {key.options_key: named}}}
    if key.shape == "list":
        return
    for name, table in tables.items():
        value: Schema = {"pattern": f"^{any_case(name)}$", "type": "string"} if key.ignores_case else {"const": name}
        chosen: Schema = {"required": [key.key], "properties": {key.key: value}}
        if name in key.default:
            chosen = {"anyOf": [chosen, {"not": {"required": [key.key]}}]}
        yield {"if": chosen, "then": {"properties": {key.options_key: table}}}


def _table_schema(plugin: Installed, schemas: OptionSchemas) -> Schema:
    if plugin.options is None:
        return {"type": "object", "maxProperties": 0}
    flat = flat_keys(plugin.options)
    properties = {name: schema for name, schema in schemas.properties[plugin.options].items() if name not in flat}
    aliases = {alias: properties[name] for name, names in option_aliases(plugin.options).items() if name in properties for alias in names}
    required = [name for name in properties if plugin.options.model_fields[name].is_required()]
    is_open = plugin.options.model_config.get("extra") == "allow"
    return {"type": "object", "additionalProperties": is_open, "properties": properties | aliases, "required": required}
