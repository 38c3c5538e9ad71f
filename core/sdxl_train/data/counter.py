"""How often each artist, character, style, quality and folder occurs in a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.columns import NameColumn

Counter = dict[str, dict[str, int]]


def format_tag(tag: str) -> str:
    """A name as it is counted: stripped, spaces as underscores, escaped brackets plain; letter case stays."""
    return tag.strip().replace(" ", "_").replace("\\(", "(").replace("\\)", ")")


def count_tags(
    artists: NameColumn, characters: NameColumn, styles: NameColumn, qualities: NameColumn, folders: NameColumn, rows: NDArray[np.bool_]
) -> Counter:
    """Count over the data in `rows`, each datum once.

    Args:
        artists, characters, styles, qualities: the fields of the metadata as they are given.
        folders: the name of each picture's folder.
        rows: the data that count. [N] bool
    Returns:
        {"artist" | "characters" | "styles" | "quality" | "category": {name: occurrences}} and the aliases `character` and `style`.
        Characters and styles are split at commas. Names of quality are only stripped, folders as they are, the others formatted by
        `format_tag`.
    """
    counter = {
        "artist": _count(artists, rows, lambda value: [format_tag(value)]),
        "characters": _count(characters, rows, lambda value: map(format_tag, value.split(","))),
        "styles": _count(styles, rows, lambda value: map(format_tag, value.split(","))),
        "quality": _count(qualities, rows, lambda value: [value.strip()]),
        "category": _count(folders, rows, lambda value: [value]),
    }
    return counter | {"character": counter["characters"], "style": counter["styles"]}


def _count(column: NameColumn, rows: NDArray[np.bool_], names_of: Callable[[str], Iterable[str]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value, occurrences in column.occurrences(rows).items():
        for name in names_of(value):
            if name:
                counts[name] = counts.get(name, 0) + occurrences
    return counts
