"""Everything that is installed, looked at one plugin at a time, so that a broken one is a line of the listing and not its end."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib.metadata import EntryPoint

from sdxl_train.errors import PluginError
from sdxl_train.options import Options
from sdxl_train.plugin_discovery import OWN_DISTRIBUTION, Catalogue, distribution_name
from sdxl_train.plugin_keys import PLUGIN_KEYS, PluginKey
from sdxl_train.plugins import options_of


@dataclass(frozen=True)
class Installed:
    """One entry point.

    Attributes:
        key: the TOML key that may name it.
        name: the name it has there.
        origin: "distribution version".
        where: "module:attribute"; equal for names of one plugin.
        summary: the first line of its docstring.
        options: its options model, if it has options.
        broken: why it cannot be loaded; empty for a sound one.
    """

    key: PluginKey
    name: str
    origin: str
    where: str
    summary: str = ""
    options: type[Options] | None = None
    broken: str = ""

    @property
    def is_default(self) -> bool:
        return self.name in self.key.default

    @property
    def selection(self) -> str:
        """How a TOML file names it, as words: `optimizer_type = "AdamW"`, or `"jsonl" in trackers`."""
        return f'"{self.name}" in {self.key.key}' if self.key.shape == "list" else f'{self.key.key} = "{self.name}"'


def installed_plugins(built_in_only: bool = False) -> list[Installed]:
    """All plugins in the order of their keys, those of a default first, then by name. Loads each of them.

    Args:
        built_in_only: leave out what other distributions bring.
    """
    catalogue = Catalogue()
    found = []
    for key in PLUGIN_KEYS.values():
        points = [point for point in catalogue.entry_points(key) if not built_in_only or distribution_name(point) == OWN_DISTRIBUTION]
        rank = {name: number for number, name in enumerate(key.default)}
        points.sort(key=lambda point: (rank.get(point.name, len(rank)), point.name.casefold()))
        found += [_look_at(catalogue, key, point) for point in points]
    return found


def _look_at(catalogue: Catalogue, key: PluginKey, point: EntryPoint) -> Installed:
    origin = f"{point.dist.name} {point.dist.version}" if point.dist else "?"
    try:
        target = catalogue.find(key, point.name)
        return Installed(key, point.name, origin, point.value, first_line(target.value), options_of(target))
    except PluginError as error:
        return Installed(key, point.name, origin, point.value, broken=str(error))


def first_line(value: object) -> str:
    """The first line of a docstring; empty without one."""
    return (inspect.getdoc(value) or "").partition("\n")[0]
