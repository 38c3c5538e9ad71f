"""TOML -> settings: what is chosen, every value checked, every problem in one report with file, line and key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from sdxl_train import config_rules
from sdxl_train.errors import ConfigError, PluginError, Problem
from sdxl_train.keys import Config
from sdxl_train.options import Options, flat_keys, option_aliases, resolve_aliases
from sdxl_train.plugin_discovery import OWN_DISTRIBUTION, Catalogue, distribution_name, missing_packages
from sdxl_train.plugin_keys import PLUGIN_KEYS, PluginKey
from sdxl_train.plugins import Choice, Plugins, options_of
from sdxl_train.sample_benchmark import SampleEntry, read_benchmark
from sdxl_train.text_display import did_you_mean
from sdxl_train.toml_source import KeyPath, TomlSource, read_toml, show

# A key that a command does not need may be absent; this is what it then reads.
_NEEDED_BY = {
    "pretrained_model_name_or_path": ("training", "cache", "samples"),
    "image_dirs": ("data",),
    "output_dir": ("training", "samples"),
}
_ABSENT = {"pretrained_model_name_or_path": "-", "image_dirs": [], "output_dir": "-"}
# Keys of files without which the data can still be read.
_BESIDE_THE_DATA = {"pretrained_model_name_or_path", "vae", "sample_benchmark"}


@dataclass(frozen=True)
class Settings:
    """A configuration without problems.

    Attributes:
        config: the core's own keys.
        plugins: the plugins the run uses, made with their options.
        values: every effective key, as plain values, read-only; what plugins see as `run.config`.
        warnings: settings without effect, one line each.
        samples: what to render, from `sample_benchmark`; empty without one.
        given: the keys that the user set, also inside tables ("sample_params.seed").
    """

    config: Config
    plugins: Plugins
    values: Mapping[str, Any]
    warnings: tuple[str, ...]
    samples: tuple[SampleEntry, ...]
    given: frozenset[str]


def load_settings(path: Path, settings: Sequence[str] = (), needs: Iterable[str] = ("data", "training")) -> Settings:
    """Read and check a configuration file.

    Args:
        settings: the `--set KEY=VALUE` arguments.
        needs: what the command works with: "data", "cache", "training", "samples".
    Raises:
        ConfigError: all problems together, one a line, and in `problems`.
    """
    check = _Check(read_toml(path, settings), set(needs), asks_libraries="training" in needs)
    made = check.settings()
    if made is None or check.problems:
        raise ConfigError("\n".join(check.problems), tuple(check.problems.values()))
    return made


def read_settings(path: Path, settings: Sequence[str], needs: Iterable[str], problems: list[Problem]) -> Settings | None:
    """As `load_settings`, for a report that goes on after a problem, and that imports no library to ask about options.

    Args:
        problems: gets all of them.
    Returns:
        The settings, also where only the model's files or the sample benchmark are wrong (`samples` is then empty); else None.
    """
    try:
        check = _Check(read_toml(path, settings), set(needs))
    except ConfigError as error:
        problems.append(Problem("config", str(error)))
        return None
    made = check.settings()
    problems += check.problems.values()
    return made


@dataclass
class _Used:
    """A plugin that the file uses, what is known of its options, and the table they stand in."""

    key: PluginKey
    name: str
    model: type[Options] | None
    options: dict[str, Any]
    table: KeyPath


class _Check:
    """One pass over a configuration that collects every problem."""

    def __init__(self, source: TomlSource, needs: set[str], asks_libraries: bool = False) -> None:
        self.source = source
        self.needs = needs
        self.asks_libraries = asks_libraries
        self.catalogue = Catalogue()
        self.problems: dict[str, Problem] = {}  # by message
        self.bad: set[str] = set()
        self.given = set(source.data)
        self.data, notes = config_rules.follow_relative_step(source.data)
        self.notes = [f"{source.where((key,))}: {note}" for key, note in notes]

    def settings(self) -> Settings | None:
        """The settings, which hold only together with `problems`; None where what is wrong decides which data there are."""
        self._refuse_values_of_no_option()
        used = [plugin for key in PLUGIN_KEYS.values() for plugin in self._used(key)]
        owners = self._flat_owners(used)
        self._refuse_unknown_keys(owners)
        config = self._core()
        values = {**config.model_dump(), **self._chosen_names(used)}
        for plugin in used:
            values.update(self._plugin_values(plugin))
        for key in PLUGIN_KEYS.values():
            values.setdefault(key.options_key, {})
        self._apply_plugin_rules(used, values)
        self._apply_rules(values)
        plugins = self._plugins(used, config.seed)
        samples = self._samples(config)
        if plugins is None or self.bad - _BESIDE_THE_DATA:
            return None
        warnings = [f"{self.source.where((text.split()[0],))}: {text}" for text in config_rules.warnings(values, self.given)]
        return Settings(
            config,
            plugins,
            MappingProxyType(values),
            (*warnings, *self.notes),
            tuple(samples),
            frozenset(self.given)
            | {f"{key}.{name}" for key, table in self.source.data.items() if isinstance(table, dict) for name in table},
        )

    def _plugins(self, used: list[_Used], seed: int) -> Plugins | None:
        """Make the plugins whose options are valid, so that what is wrong with their hooks is in the same report."""
        try:
            plugins = Plugins([Choice(plugin.key.key, plugin.name, plugin.options) for plugin in self._sound(used)], seed, self.catalogue)
            if self.asks_libraries:
                self._ask_libraries(plugins)
            return plugins
        except PluginError as error:
            self._add(f"{self.source.name}: {error}", None)
            return None

    def _ask_libraries(self, plugins: Plugins) -> None:
        """What is wrong with options that only an imported library knows, from plugins that offer `library_problems`."""
        for plugin in plugins.loaded:
            key = plugin.target.key
            for name, message in getattr(plugin.instance, "library_problems", tuple)():
                path = (key.key,) if not name else (key.options_key, *([plugin.target.name] if key.shape == "list" else []), name)
                self._problem(path, f"{'.'.join(path)}: {message}")

    def _sound(self, used: list[_Used]) -> list[_Used]:
        """The plugins whose names and options are valid."""
        return [plugin for plugin in used if not self.bad & {plugin.key.key, plugin.key.options_key, *self._flat_of(plugin)}]

    def _samples(self, config: Config) -> list[SampleEntry]:
        """The benchmark's entries; what is wrong with them joins the report."""
        if config.sample_benchmark is None or self.bad & {"sample_benchmark", "sample_params"}:
            return []
        try:
            return read_benchmark(Path(config.sample_benchmark), config.sample_params, self.notes.append)
        except ConfigError as error:
            for line in str(error).splitlines():
                self._add(line, "sample_benchmark")
            return []

    @staticmethod
    def _flat_of(plugin: _Used) -> set[str]:
        return flat_keys(plugin.model) if plugin.model else set()

    def _problem(self, path: KeyPath, message: str) -> None:
        self.bad.add(path[0])
        self._add(f"{self.source.where(path)}: {message}", ".".join(path))

    def _add(self, message: str, key: str | None) -> None:
        self.problems.setdefault(message, Problem("config", message, key=key))

    def _refuse_values_of_no_option(self) -> None:
        """TOML has values that no option takes: dates, nan and inf, integers beyond 64 bits."""

        def walk(value: Any, path: KeyPath) -> None:
            if isinstance(value, dict):
                for name, inner in value.items():
                    walk(inner, (*path, name))
            elif isinstance(value, list):
                for inner in value:
                    walk(inner, path)
            elif isinstance(value, float) and not math.isfinite(value):
                self._problem(path, f"{'.'.join(path)} must be a finite number, got {value}")
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                self._problem(path, f"{'.'.join(path)} must fit 64 bits, got {show(value)}")
            elif not isinstance(value, str | int | float | bool):
                self._problem(path, f"{'.'.join(path)} is a date or time ({value}); no key takes one")

        walk(self.data, ())

    def _used(self, key: PluginKey) -> list[_Used]:
        """The plugins that a key names, by the file or by default, loaded, with the options tables laid beside them."""
        given = self.data.get(key.key)
        names = list(key.default) if given is None else self._names(key, given)
        tables = self.data.get(key.options_key, {})
        if not isinstance(tables, dict):
            self._problem((key.options_key,), f"{key.options_key} must be a table, got {show(tables)}")
            tables = {}
        as_list = key.shape == "list" or isinstance(given, list)
        found = []
        for name in names:
            try:
                target = self.catalogue.find(key, name)
                for missing in missing_packages(target.value):
                    self._problem((key.key,), f'{key.key} = "{target.name}" needs {missing}')
                own, table = (tables.get(name, {}), (name,)) if as_list else (tables, ())
                found.append(_Used(key, target.name, options_of(target), own, (key.options_key, *table)))
            except PluginError as error:
                self._problem((key.key,), str(error))
        if as_list:
            for name in set(tables) - set(names):
                self._unknown((key.options_key, name), names)
        elif not names and tables:
            self._problem((key.options_key,), f"{key.options_key} has no effect, since {key.key} names no plugin")
        return found

    def _names(self, key: PluginKey, given: Any) -> list[str]:
        names = [given] if isinstance(given, str) and key.shape != "list" else given
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not is_list or (isinstance(given, list) and key.shape == "name"):
            expected = {"name": "a plugin name", "list": "a list of plugin names", "name or list": "a plugin name or a list of them"}[
                key.shape
            ]
            self._problem((key.key,), f"{key.key} must be {expected}, got {show(given)}")
            return []
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            self._problem((key.key,), f"{key.key} names {', '.join(twice)} twice")
        return list(dict.fromkeys(names))

    def _flat_owners(self, used: list[_Used]) -> dict[str, _Used]:
        owners: dict[str, _Used] = {}
        for plugin in used:
            for flat in sorted(self._flat_of(plugin)):
                clash = owners.get(flat)
                if clash or flat in Config.model_fields or flat in PLUGIN_KEYS:
                    other = f'"{clash.name}" of {clash.key.key}' if clash else "the trainer itself"
                    self._problem((plugin.key.key,), f'"{plugin.name}" of {plugin.key.key} and {other} both claim the key {flat}')
                else:
                    owners[flat] = plugin
        return owners

    def _refuse_unknown_keys(self, owners: dict[str, _Used]) -> None:
        tables = {key.options_key for key in PLUGIN_KEYS.values()}
        known = {*Config.model_fields, *PLUGIN_KEYS, *tables, *owners}
        for name, value in self.data.items():
            if name in known:
                continue
            owner = self._unselected_owner(name)
            if owner is None:
                self._unknown((name,), known)
            elif owner.key.kind == "pick" or value == owner.model.model_fields[name].get_default(call_default_factory=True):
                owned = f'it belongs to {owner.key.key} = "{owner.name}", which this file does not use'
                self.notes.append(f"{self.source.where((name,))}: {name} has no effect: {owned}")
                self._validate(owner.model, {name: value}, lambda path: path)
            else:
                self._problem((name,), f'{name} belongs to the plugin "{owner.name}", which {owner.key.key} does not name')

    def _unselected_owner(self, name: str) -> Any:
        """The plugin of this distribution that has `name` as a flat key although the file does not select it."""
        for key in PLUGIN_KEYS.values():
            for point in self.catalogue.entry_points(key):
                if distribution_name(point) != OWN_DISTRIBUTION:
                    continue
                model = options_of(self.catalogue.find(key, point.name))
                if model is not None and name in flat_keys(model):
                    return _Used(key, point.name, model, {}, (key.options_key,))
        return None

    def _unknown(self, path: KeyPath, known: Iterable[str]) -> None:
        *tables, name = path
        inside = f" in [{'.'.join(tables)}]" if tables else ""
        hint = did_you_mean(name, known)
        if tables and self._is_top_level(name):
            hint = "; it is a top-level key: move it above the first [table], since TOML puts what follows into the table"
        self._problem(path, f'unknown key "{show(name)[1:-1]}"{inside}{hint}')

    def _is_top_level(self, name: str) -> bool:
        return name in Config.model_fields or name in PLUGIN_KEYS or self._unselected_owner(name) is not None

    def _core(self) -> Config:
        given = {name: value for name, value in self.data.items() if name in Config.model_fields}
        for name, commands in _NEEDED_BY.items():
            if name not in given and not self.needs & set(commands):
                given[name] = _ABSENT[name]
        valid = self._validate(Config, given, lambda path: path)
        return Config.model_validate({**_ABSENT, **valid})

    def _plugin_values(self, plugin: _Used) -> dict[str, Any]:
        """Check one plugin's options; its flat keys and its table as they are in effect."""
        table_path = plugin.table
        if not isinstance(plugin.options, dict):
            self._problem(table_path, f"{'.'.join(table_path)} must be a table, got {show(plugin.options)}")
            plugin.options = {}
        if plugin.model is None:
            for name in plugin.options:
                self._unknown((*table_path, name), ())
            return {}
        flat = flat_keys(plugin.model)
        for name in flat & set(plugin.options):
            self._problem((*table_path, name), f"{name} is a top-level key: move it out of [{'.'.join(table_path)}]")
        own = {name: value for name, value in plugin.options.items() if name not in flat}
        try:
            own = resolve_aliases(plugin.model, own)
        except ValueError as error:
            self._problem(table_path, str(error))
            own = {}
        given = {**own, **{name: self.data[name] for name in flat if name in self.data}}
        valid = self._validate(plugin.model, given, lambda path: path if path and path[0] in flat else (*table_path, *path))
        plugin.options = {name: value for name, value in given.items() if name in valid}
        effective = plugin.model.model_construct(**valid).model_dump() if not set(given) - set(valid) else dict(valid)
        table = {name: value for name, value in effective.items() if name not in flat}
        values = {name: value for name, value in effective.items() if name in flat}
        if table:
            values[plugin.key.options_key] = {plugin.name: table} if len(table_path) > 1 else table
        return values

    def _validate(self, model: type[BaseModel], given: Mapping[str, Any], where: Any) -> dict[str, Any]:
        """Validate strictly, report each problem, and give back the entries that are valid (with defaults where nothing is wrong)."""
        clean = {name: value for name, value in given.items() if name not in self.bad or model is not Config}
        try:
            checked = model.model_validate_json(json.dumps(clean, default=str), strict=True)
            return {name: getattr(checked, name) for name in (*type(checked).model_fields, *(checked.model_extra or ()))}
        except ValidationError as error:
            wrong: dict[KeyPath, list[Any]] = {}
            for one in error.errors(include_url=False):
                path = _key_path(model, one)
                wrong.setdefault(path, []).append(one)
            for path, errors in wrong.items():
                self._report(model, where(path) or where(()), path, errors)
            bad = {path[0] for path in wrong if path}
            rest = {name: value for name, value in clean.items() if name not in bad and () not in wrong}
            if model is Config:
                rest = {**{name: _ABSENT[name] for name in bad & set(_ABSENT)}, **rest}
                checked = model.model_validate_json(json.dumps(rest, default=str), strict=True)
                return {name: getattr(checked, name) for name in type(checked).model_fields}
            return rest

    def _report(self, model: type[BaseModel], path: KeyPath, inner: KeyPath, errors: list[Any]) -> None:
        key = ".".join(path)
        first = errors[0]
        if first["type"] == "extra_forbidden":
            holder = _model_at(model, inner[:-1])
            known = [*holder.model_fields, *(alias for names in option_aliases(holder).values() for alias in names)]
            self._unknown(path, known)
        elif first["type"] == "missing":
            self._problem(path, f"{key} is required")
        else:
            texts = dict.fromkeys(one["msg"].replace("Input should be", "must be").removeprefix("Value error, ") for one in errors)
            got = f", got {show(first['input'])}" if inner else ""
            self._problem(path, f"{key}: {' or '.join(texts)}{got}" if not inner else f"{key} {' or '.join(texts)}{got}")

    def _chosen_names(self, used: list[_Used]) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for key in PLUGIN_KEYS.values():
            chosen = [plugin.name for plugin in used if plugin.key is key]
            listed = key.shape == "list" or isinstance(self.data.get(key.key), list) or not chosen
            names[key.key] = chosen if listed and key.shape != "name" else next(iter(chosen), None)
        return names

    def _apply_rules(self, values: dict[str, Any]) -> None:
        for keys, message in config_rules.broken_rules(values, self.bad, self.needs):
            self._problem(next(((key,) for key in keys if key in self.data), (keys[0],)), message)

    def _apply_plugin_rules(self, used: list[_Used], values: Mapping[str, Any]) -> None:
        """What plugins know to be wrong with their options beside the other keys; not asked where one of these has no valid value."""
        if self.bad & set(Config.model_fields):
            return
        for plugin in self._sound(used):
            problem = plugin.model.model_validate(plugin.options).problem_with_keys(values) if plugin.model else None
            if problem:
                self._problem(plugin.table, problem)


def _key_path(model: type[BaseModel], error: Any) -> KeyPath:
    """The keys an error is about. Pydantic adds the branches of a union, which are no keys; list positions stay."""
    loc = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return tuple(loc)
    holder = _model_at(model, tuple(loc[:1]))
    return tuple(part for i, part in enumerate(loc) if i == 0 or part in holder.model_fields or (holder is model and part.isdigit()))


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel]:
    for name in path:
        field = model.model_fields.get(name)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return model
        model = field.annotation
    return model
