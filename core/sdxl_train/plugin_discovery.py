"""Finds what a TOML value names: an entry point, an import path or a file. Reads metadata only; imports nothing but what is named."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from sdxl_train.errors import PluginError
from sdxl_train.plugin_keys import PluginKey
from sdxl_train.text_display import did_you_mean

OWN_DISTRIBUTION = "sdxl-train"
RESOLVERS_GROUP = "sdxl_train.resolvers"


class NameResolver(Protocol):
    """Says what further names stand for, where a key takes more than a list can hold. Entry point: this group, named like the TOML key.

    It is asked about a name that is no entry point, before the name is taken for an import path, and imports nothing heavy.
    """

    def names(self) -> list[str]:
        """The names to suggest to somebody who mistyped one."""
        ...

    def find(self, name: str) -> tuple[str, Any] | None:
        """The name in its proper spelling and the plugin; None for a name it does not know.

        Raises:
            PluginError: the name is its own and cannot be used.
        """
        ...


@dataclass(frozen=True)
class Target:
    """What a name in the TOML file stands for.

    Attributes:
        key: the TOML key that names it.
        name: the name, in the spelling of the entry point (or the import path as written).
        origin: "distribution version" it came from, or the module or file.
        value: the class or function itself.
        point: the entry point it was found by, its own or a resolver's; None for an import path or a file.
    """

    key: PluginKey
    name: str
    origin: str
    value: Any
    point: EntryPoint | None = None

    def __str__(self) -> str:
        return f'plugin "{self.name}" of {self.key.key} ({self.origin})'


class Catalogue:
    """The entry points of everything installed, read once as metadata."""

    def __init__(self) -> None:
        self._installed = entry_points()

    def names(self, key: PluginKey) -> list[str]:
        """The names that a TOML key may have, sorted."""
        return sorted({point.name for point in self._installed.select(group=key.group)})

    def entry_points(self, key: PluginKey) -> list[EntryPoint]:
        """Every entry point of a key's group."""
        return sorted(self._installed.select(group=key.group), key=lambda point: point.name)

    def find(self, key: PluginKey, name: str) -> Target:
        """Load what `name` stands for under a TOML key.

        Raises:
            PluginError: nothing has this name, two distributions have it, or it cannot be imported; names the cause.
        """
        resolvers: list[NameResolver] = []
        same = (lambda a, b: a.casefold() == b.casefold()) if key.ignores_case else (lambda a, b: a == b)
        matches = [point for point in self._installed.select(group=key.group) if same(point.name, name)]
        if len(matches) > 1:
            owners = " and ".join(_origin(point) for point in matches)
            raise PluginError(f'{key.key} = "{name}": {owners} both have this name; uninstall one, or name its import path')
        if matches:
            return Target(key, matches[0].name, _origin(matches[0]), _load_entry_point(key, matches[0]), matches[0])
        for point in self._installed.select(group=RESOLVERS_GROUP, name=key.key):
            resolvers.append(_load_entry_point(key, point)())
            found = resolvers[-1].find(name)
            if found is not None:
                return Target(key, found[0], _origin(point), found[1], point)
        if ":" in name:
            return Target(key, name, name.partition(":")[0], _load_path(key, name))
        raise PluginError(f'{key.key} = "{name}": no installed plugin has this name{self._instead(key, name, resolvers)}')

    def _instead(self, key: PluginKey, name: str, resolvers: list[NameResolver]) -> str:
        """The end of the message about an unknown name: the nearest one, and which there are."""
        known = self.names(key)
        spellings = {one.casefold() if key.ignores_case else one: one for one in (*(n for r in resolvers for n in r.names()), *known)}
        near = difflib.get_close_matches(name.casefold() if key.ignores_case else name, spellings, 1)
        hint = f'; did you mean "{spellings[near[0]]}"?' if near else ""
        return f"{hint} (known: {', '.join(known) or 'none'}{'; ' + key.other_names if key.other_names else ''})"


def missing_packages(value: Any) -> list[str]:
    """What a plugin's `needs_packages` (module: how to install it) names and is not installed, as words. Imports nothing."""
    needed: dict[str, str] = getattr(value, "needs_packages", {})
    return [f"the package {name}, which is not installed: {how}" for name, how in needed.items() if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def distribution_name(point: EntryPoint) -> str:
    """The distribution an entry point belongs to; empty where its metadata names none."""
    return point.dist.name if point.dist else ""


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _load_entry_point(key: PluginKey, point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # whatever a foreign module raises while it is imported is the cause to show
        raise PluginError(
            f'{key.key} = "{point.name}": entry point {point.value} of {_origin(point)} cannot be loaded: {type(error).__name__}: {error}'
        ) from error


def _load_path(key: PluginKey, name: str) -> Any:
    module_name, _, attribute = name.rpartition(":")
    try:
        value = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
        for part in attribute.split("."):
            value = _attribute(value, part, module_name)
    except Exception as error:  # as above: a user's own file may raise anything
        raise PluginError(f'{key.key} = "{name}" cannot be loaded: {type(error).__name__}: {error}') from error
    return value


def _attribute(value: Any, name: str, where: str) -> Any:
    """An attribute of what was loaded from `where`, which an error names: Python would name the module that a file became."""
    try:
        return getattr(value, name)
    except AttributeError:
        hint = did_you_mean(name, [known for known in dir(value) if not known.startswith("_")])
        raise AttributeError(f"{where} has no attribute {name}{hint}") from None


def _load_file(path: Path) -> Any:
    """Import a Python file under a name of its own, once."""
    where = str(path.resolve(strict=True))
    module_name = f"sdxl_train_file_{hashlib.blake2b(where.encode(), digest_size=8).hexdigest()}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, where)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return sys.modules[module_name]
