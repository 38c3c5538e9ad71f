"""How often each artist, character, style, quality and folder occurs in a data set."""

import os
from collections.abc import Iterable
from typing import Any

Counter = dict[str, dict[str, int]]


def format_tag(tag: str) -> str:
    """A name as it is counted: stripped, spaces as underscores, escaped brackets plain; letter case stays."""
    return tag.strip().replace(" ", "_").replace("\\(", "(").replace("\\)", ")")


def count_tags(all_metadata: Iterable[dict[str, Any]]) -> Counter:
    """Count over complete metadata of pictures, each picture once.

    Returns:
        {"artist" | "characters" | "styles" | "quality" | "category": {name: occurrences}} and the aliases `character` and `style`.
        The category of a picture is the name of its folder. Names of quality are only stripped, the others formatted by `format_tag`.
    """
    artists: dict[str, int] = {}
    characters: dict[str, int] = {}
    styles: dict[str, int] = {}
    qualities: dict[str, int] = {}
    categories: dict[str, int] = {}
    for metadata in all_metadata:
        _add(artists, [format_tag(metadata["artist"] or "")])
        _add(characters, map(format_tag, (metadata["characters"] or "").split(",")))
        _add(styles, map(format_tag, (metadata["styles"] or "").split(",")))
        _add(qualities, [(metadata["quality"] or "").strip()])
        if metadata["image_path"]:
            _add(categories, [os.path.basename(os.path.dirname(os.path.abspath(metadata["image_path"])))])
    return {
        "artist": artists,
        "characters": characters,
        "styles": styles,
        "quality": qualities,
        "category": categories,
        "character": characters,
        "style": styles,
    }


def _add(counts: dict[str, int], names: Iterable[str]) -> None:
    for name in names:
        if name:
            counts[name] = counts.get(name, 0) + 1
