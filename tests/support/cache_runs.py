"""Pictures with their places by hand, their caches before and after a run, and what a run opens."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bad_files import noise

SIZES = {"square0": (64, 64), "square1": (80, 70), "square2": (64, 64), "wide0": (128, 48), "wide1": (200, 75)}
# At resolution 64 and steps of 32: (bucket, resized, crop left and top), all as (w, h), by hand.
PLACED = {
    "square0": ((64, 64), (64, 64), (0, 0)),
    "square1": ((64, 64), (73, 64), (4, 0)),
    "wide0": ((96, 32), (96, 36), (0, 2)),
    "wide1": ((96, 32), (96, 36), (0, 2)),
}


def write_pictures(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, (key, size) in enumerate(SIZES.items()):
        noise(number, size).save(folder / f"{key}.png")
        (folder / f"{key}.txt").write_text(f"picture {key}")
    return folder


def caches(data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(data.glob("*.npz"))}


def identities(data: Path) -> dict[str, tuple[int, int]]:
    """What changes when a cache is written: inode and time."""
    return {path.stem: (path.stat().st_ino, path.stat().st_mtime_ns) for path in data.glob("*.npz")}


def rewritten(before: dict[str, tuple[int, int]], data: Path) -> set[str]:
    now = identities(data)
    return {key for key in now if now[key] != before.get(key)}


_opened: list[str] | None = None


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The paths of all files that Python opens meanwhile."""
    global _opened
    if not hasattr(sys, "_watches_opened_files"):
        sys.addaudithook(_note_opened)  # for ever: there is no way to take it away
        sys._watches_opened_files = True  # type: ignore[attr-defined]
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _opened.append(os.fsdecode(arguments[0]))
