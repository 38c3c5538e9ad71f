"""Keys whose behaviour this version does not have yet: what it does instead, and which values are therefore refused."""

from collections.abc import Mapping
from typing import Any

# key -> what this version does. The default of the key is accepted too, and then counts as this value (one line of the banner says so).
ACTS_AS: dict[str, Any] = {
    "mem_eff_attn": False,
    "xformers": False,
    "diffusers_xformers": False,
}
REFUSED: dict[str, tuple[Any, ...]] = {}


def refusals(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, message) for each key that asks for what this version does not do."""
    found = []
    for key, acts_as in ACTS_AS.items():
        if key in values and values[key] not in (acts_as, defaults[key]):
            found.append((key, f"{key} = {values[key]!r} is not built yet in this version; leave the key out"))
    for key, refused in REFUSED.items():
        if values.get(key) in refused:
            found.append((key, f"{key} = {values[key]!r} is not built yet in this version"))
    return found


def counted_as_off(values: Mapping[str, Any]) -> list[str]:
    """The keys whose default this version does not follow yet."""
    return [key for key, acts_as in ACTS_AS.items() if key in values and values[key] != acts_as]
