"""Data whose caches have one path: one picture under several keys, or pictures that differ in their extension only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.index import ELSEWHERE, Index
from sdxl_train.data.latent_file import cache_path_of
from sdxl_train.errors import Problem
from sdxl_train.text_display import shown


def is_named_by(key: str, image_path: str) -> bool:
    """Whether a picture in a folder is called like its key; a no may be wrong.

    Keys differ, so of pictures with one cache all but one are called otherwise: mostly there is nothing to compare.
    """
    stem, _, extension = image_path.rpartition(".")
    return stem.endswith("/" + key) and "/" not in extension


def rows_with_one_cache(image_paths: Sequence[str]) -> NDArray[np.int32]:
    """For each picture the first row whose cache, beside its picture, has the same path; -1 where no other row has it. [N]"""
    first = np.full(len(image_paths), -1, np.int32)
    if not image_paths:
        return first
    real = _RealPaths()
    hashes = np.fromiter((hash(real.cache_path(path)) if path else 0 for path in image_paths), np.int64, len(image_paths))
    order = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], hashes[order[1:]] != hashes[order[:-1]]]))
    sizes = np.diff(starts, append=len(order))
    groups: dict[str, list[int]] = {}
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        for row in map(int, order[start : start + size] if hashes[order[start]] else ()):
            groups.setdefault(real.cache_path(image_paths[row]), []).append(row)
    for rows in groups.values():
        if len(rows) > 1:
            first[rows] = min(rows)
    return first


def sharing_data(index: Index) -> list[list[int]]:
    """The trained data of each cache that several have, in order of their keys."""
    groups: dict[int, list[int]] = {}
    for row in np.flatnonzero((index.shares >= 0) & (index.num_repeats > 0)).tolist():
        groups.setdefault(int(index.shares[row]), []).append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def sharing_problems(index: Index) -> Iterator[Problem]:
    """Each picture whose cache another picture would overwrite. One picture under several keys is none."""
    for first, *others in sharing_data(index):
        different = {index.image_paths[row]: row for row in others if not _are_one_file(index, first, row)}
        for path, row in different.items():
            one = index.image_paths[first]
            message = f"{shown(one)} and {shown(path)} would share the cache {shown(cache_path_of(one))}; rename one"
            yield Problem("name", message, path=path, key=index.key(row))


class SharedCaches:
    """Which data get the latents of another one, since they have its picture and thus its cache.

    Args:
        data: the data that have no valid cache.
        to_disk: else nothing is shared, and each is encoded.

    Attributes:
        missing: `data`, and those whose valid cache will be overwritten, sorted.
        to_encode: of these, the first of those that share a cache, and all others; sorted.
    """

    def __init__(self, index: Index, data: Iterable[int], to_disk: bool) -> None:
        missing, self._others = set(data), dict[int, list[int]]()
        for rows in sharing_data(index) if to_disk and missing else ():
            # Who has a valid cache of his own elsewhere keeps it.
            sharing = [row for row in rows if row in missing or index.caches.places[row] != ELSEWHERE]
            if not missing.isdisjoint(sharing):
                missing.update(sharing)
                self._others[sharing[0]] = sharing[1:]
        self.missing = sorted(missing)
        self.to_encode = sorted(missing.difference(*self._others.values()))

    def all_of(self, datum: int) -> Sequence[int]:
        """The datum, and those that get its latents."""
        return [datum, *self._others.get(datum, ())]


class _RealPaths:
    """Paths by which files are compared: a folder may be written in several ways."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def cache_path(self, image_path: str) -> str:
        folder, name = os.path.split(image_path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return os.path.join(self._folders[folder], cache_path_of(name))


def _are_one_file(index: Index, row: int, other: int) -> bool:
    return index.image_paths.raw(row) == index.image_paths.raw(other) or bool((index.stamps[row] == index.stamps[other]).all())
