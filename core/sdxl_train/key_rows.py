"""One row for every TOML key that the core and the installed plugins know, in the order of the example file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from sdxl_train import keys
from sdxl_train.installed_plugins import Installed
from sdxl_train.keys import Config
from sdxl_train.option_schemas import OptionSchemas, Schema, allowed_text, option_schemas, resolved, type_text
from sdxl_train.options import Options, flat_keys, option_aliases, option_help
from sdxl_train.plugin_keys import PLUGIN_KEYS, PluginKey

PLUGINS_SECTION = "Plugins"
SECTIONS_ZH = {
    "Model and paths": "模型与路径",
    "Dataset": "数据集",
    "Loss recorder, saving, resuming": "损失记录器、保存与恢复",
    "Training": "训练",
    "Text, attention, noise, loss, timesteps": "文本、注意力、噪声、损失与时间步",
    "Sampling": "采样",
    "Latent cache": "潜变量缓存",
    PLUGINS_SECTION: "插件",
}
_SECTION_OF_KEY = {
    "num_repeats_getter": "Dataset",
    "caption_processor": "Dataset",
    "description_processor": "Dataset",
    "optimizer_type": "Training",
    "lr_scheduler": "Training",
    "timestep_sampler_type": "Text, attention, noise, loss, timesteps",
    "noise_strategies": "Text, attention, noise, loss, timesteps",
    "loss_type": "Text, attention, noise, loss, timesteps",
    "loss_weightings": "Text, attention, noise, loss, timesteps",
    "save_triggers": "Loss recorder, saving, resuming",
    "sample_triggers": "Sampling",
    "sample_sampler": "Sampling",
    "trackers": "Loss recorder, saving, resuming",
    "plugins": PLUGINS_SECTION,
}
REQUIRED = object()
ABSENT = None


@dataclass(frozen=True)
class Row:
    """One key.

    Attributes:
        path: ("seed",), or ("sample_params", "seed") for an entry of a table.
        section: where it stands in the example file and on the configuration page.
        type, allowed: as words.
        default: the value when the file gives none; REQUIRED; or ABSENT: no value.
        help, zh: what it does, in English and Chinese.
        owners: the plugins it belongs to; empty for the core.
        is_used: the core or a plugin of the default selection reads it.
        aliases: further spellings.
        schema: its JSON schema.
    """

    path: tuple[str, ...]
    section: str
    type: str
    allowed: str
    default: Any
    help: str
    zh: str
    schema: Schema
    owners: tuple[Installed, ...] = ()
    is_used: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def is_table_entry(self) -> bool:
        return len(self.path) > 1


def banners(module: ModuleType) -> dict[str, list[str]]:
    """The sections of a source file: each `# ---- Title ----` comment with the names that are declared below it."""
    sections: dict[str, list[str]] = {}
    title = None
    for line in inspect.getsource(module).splitlines():
        if banner := re.match(r"\s*# ---- (.+?) -+$", line):
            title = banner[1]
            sections[title] = []
        elif title and (name := re.match(r"    (?:def )?([a-z]\w*)[(:]", line)):
            sections[title].append(name[1])
    return sections


def key_rows(plugins: Iterable[Installed]) -> list[Row]:
    """The rows of the core and of these plugins: section by section, in each the core's keys first, then those of each plugin key."""
    sound = [plugin for plugin in plugins if not plugin.broken]
    schemas = option_schemas([Config, *(plugin.options for plugin in sound if plugin.options)])
    by_section: dict[str, list[Row]] = {title: [] for title in SECTIONS_ZH}
    for title, names in banners(keys).items():
        declared = [name for name in names if name in Config.model_fields]
        by_section[title] += [row for name in declared for row in _core_rows(name, title, schemas)]
    for key in PLUGIN_KEYS.values():
        title = _SECTION_OF_KEY[key.key]
        own = [plugin for plugin in plugins if plugin.key is key]
        by_section[title] += [_plugin_key_row(key, own, title), *_merged(row for plugin in own for row in plugin_rows(plugin, schemas))]
    return [row for rows in by_section.values() for row in rows]


def plugin_rows(plugin: Installed, schemas: OptionSchemas | None = None) -> list[Row]:
    """The options of one plugin."""
    if plugin.options is None:
        return []
    schemas = schemas or option_schemas([plugin.options])
    table = (plugin.key.options_key, *([plugin.name] if plugin.key.shape == "list" else []))
    flat = flat_keys(plugin.options)
    return [
        replace(
            _option_row(plugin.options, name, (name,) if name in flat else (*table, name), _SECTION_OF_KEY[plugin.key.key], schemas),
            owners=(plugin,),
            is_used=plugin.is_default,
        )
        for name in plugin.options.model_fields
    ]


def _core_rows(name: str, section: str, schemas: OptionSchemas) -> list[Row]:
    annotation = Config.model_fields[name].annotation
    if not (inspect.isclass(annotation) and issubclass(annotation, BaseModel)):
        return [_option_row(Config, name, (name,), section, schemas)]
    table = OptionSchemas({annotation: resolved(schemas.properties[Config][name], schemas.definitions)["properties"]}, schemas.definitions)
    return [_option_row(annotation, inner, (name, inner), section, table) for inner in annotation.model_fields]


def _option_row(model: type[BaseModel], name: str, path: tuple[str, ...], section: str, schemas: OptionSchemas) -> Row:
    schema = schemas.properties[model][name]
    default = model.model_fields[name].get_default(call_default_factory=True)
    is_options = issubclass(model, Options)
    return Row(
        path=path,
        section=section,
        type=type_text(schema, schemas.definitions),
        allowed=allowed_text(schema, schemas.definitions),
        default=REQUIRED if default is PydanticUndefined else default,
        help=option_help(model, name),
        zh=option_help(model, name, "zh"),
        schema=schema,
        aliases=tuple(option_aliases(model).get(name, ())) if is_options else (),
    )


def _plugin_key_row(key: PluginKey, own: list[Installed], section: str) -> Row:
    default: Any = list(key.default) if key.shape == "list" else next(iter(key.default), ABSENT)
    names = ", ".join(plugin.name for plugin in own)
    types = {"name": "plugin name", "list": "list[plugin name]", "name or list": "plugin name or list[plugin name]"}
    schema = plugin_key_schema(key, own)
    return Row((key.key,), section, types[key.shape], names, default, key.help.rstrip("."), key.zh.rstrip("。"), schema)


def plugin_key_schema(key: PluginKey, own: Iterable[Installed]) -> Schema:
    """What the value of a key that names plugins may be: an installed name, an import path, or a file."""
    names = [plugin.name for plugin in own]
    name: Schema = {"anyOf": [{"enum": names}] if names else []}
    if key.ignores_case:
        name["anyOf"] += [{"type": "string", "pattern": f"^{any_case(text)}$"} for text in names]
    if key.other_names:
        name["anyOf"].append({"type": "string", "pattern": key.other_names_pattern, "description": key.other_names})
    name["anyOf"].append({"type": "string", "pattern": ".:.", "description": "package.module:attribute or ./file.py:attribute"})
    listed: Schema = {"type": "array", "items": name, "uniqueItems": True}
    schema = {"name": name, "list": listed, "name or list": {"anyOf": [*name["anyOf"], listed]}}[key.shape]
    return {**schema, "description": key.help}


def any_case(text: str) -> str:
    """A regular expression for a name in any mix of cases."""
    return "".join(f"[{char.upper()}{char.lower()}]" if char.isalpha() else re.escape(char) for char in text)


def _merged(rows: Iterable[Row]) -> list[Row]:
    """One row for the options of a plugin that has several names, and for one entry that several plugins describe in the same words."""
    merged: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        has_own_table = len(row.path) > 2
        meaning = row.owners[0].where if has_own_table else (row.help, repr(row.default))
        name_free = (row.path[0], row.path[-1], meaning)
        if name_free in merged:
            first = merged[name_free]
            merged[name_free] = replace(first, owners=(*first.owners, *row.owners), is_used=first.is_used or row.is_used)
        else:
            merged[name_free] = row
    return list(merged.values())
