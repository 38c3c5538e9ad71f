"""Which data have a cache that can be used: found, checked, and remembered in the index until the file changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sdxl_train.data.file_stamps import FileStamp, file_stamp, stamp_of
from sdxl_train.data.index import BESIDE, ELSEWHERE, SIZED, Index, pair
from sdxl_train.data.latent_file import EXTENSION, BadCache, CacheHeader, file_digest, read_header, verify
from sdxl_train.data.names import IMAGE_EXTENSIONS, split_name
from sdxl_train.errors import Problem
from sdxl_train.text_display import shown

if TYPE_CHECKING:
    from sdxl_train.keys import Config

CheckStop = Callable[[], None]  # raises to end the work; see `never_stop`
OnProgress = Callable[[int, int], None]  # (done, in all)

MAX_THREADS = 16
_AT_ONCE = 64  # caches of one piece of work for a thread


def never_stop() -> None:
    """The `CheckStop` of work that Ctrl-C may end at any place."""


@dataclass
class CacheCheck:
    """
    Attributes:
        missing: rows of the pictures that have no valid cache.
        num_unchanged: caches that are as they were when they were last checked; nothing of them was read.
        num_checked: caches found valid now.
        invalid: path and reason of each cache that is to be made again.
    """

    missing: list[int] = field(default_factory=list)
    num_unchanged: int = 0
    num_checked: int = 0
    invalid: list[str] = field(default_factory=list)


def check_caches(
    index: Index,
    config: Config,
    vae_digest: bytes | None,
    problems: list[Problem],
    check_stop: CheckStop,
    on_progress: OnProgress,
    read_values: bool = True,
    only_caches: bool = False,
) -> CacheCheck:
    """Look at the cache of every datum with repeats; only one that is new or has changed is read.

    With `check_cache_validity = false` only headers are read, the caches are trusted, and the size that one stores decides the bucket.
    What is found is noted in `index.caches`. A picture without a cache is in `missing`.

    Args:
        vae_digest: of the VAE in use; caches that say they are another's are not valid. None compares nothing.
        problems: gets each cache of a datum without a picture that is not valid.
        only_caches: leave out the data that have a picture.
        read_values: False looks at headers and origins only, for a first impression.
    """
    read_values = read_values and config.check_cache_validity
    index.uses_caches = True
    if not config.check_cache_validity:
        index.placed_for = (0, 0)  # the buckets are the caches' from here on: the next start chooses anew
    _forget_other_vae(index, config, vae_digest)
    check = CacheCheck()
    trained = (index.num_repeats > 0) & (index.image_paths.lengths == 0) if only_caches else index.num_repeats > 0
    waiting = _changed(index, np.flatnonzero(trained).tolist(), config, check)
    num_done, num_all = check.num_unchanged, check.num_unchanged + len(waiting)
    for row, place, found in _examined(index, waiting, config, vae_digest, read_values):
        check_stop()
        if isinstance(found, CacheHeader):
            # Flipped latents that were not verified do not count as there: with flip_aug they are read.
            has_flipped = found.has_flipped and (config.flip_aug or not read_values)
            note(index, row, place, found, has_flipped, is_verified=read_values)
            check.num_checked += 1
        else:
            index.caches.forget(row)
            if index.image_path(row) is None:
                problems.append(Problem("cache", str(found), path=index.cache_path(row)))
            else:
                check.missing.append(row)
                check.invalid.append(str(found))
        num_done += 1
        on_progress(num_done, num_all)
    return check


def note(index: Index, row: int, place: int, header: CacheHeader, has_flipped: bool, is_verified: bool) -> None:
    """This is the cache of the datum; `has_flipped`: with flipped latents that can be used."""
    caches = index.caches
    caches.stamps[row] = stamp_of(header.status)
    caches.is_verified[row] = is_verified
    caches.offsets[row] = header.offsets
    caches.sizes[row] = header.bucket
    caches.has_flipped[row] = has_flipped
    caches.has_several[row] = header.has_several
    caches.places[row] = place
    index.bucket_sizes[row] = header.bucket
    caches.crops[row] = header.crop


def _forget_other_vae(index: Index, config: Config, vae_digest: bytes | None) -> None:
    if config.check_cache_validity and vae_digest is not None and index.vae_digest != vae_digest.hex():
        if index.caches.is_verified.any():
            index.caches.is_verified[:] = False
        index.vae_digest = vae_digest.hex()


def _changed(index: Index, data: list[int], config: Config, check: CacheCheck) -> list[tuple[int, int]]:
    """(row, place) of the caches that must be read; pictures without any and caches that are as they were are noted in `check`."""
    waiting: list[tuple[int, int]] = []
    caches, namesakes = index.caches, _Namesakes()
    fits = caches.has_flipped if config.flip_aug else np.ones(len(index), bool)
    if config.check_cache_validity:
        fits = fits & caches.is_verified & np.equal(caches.sizes, index.bucket_sizes).all(axis=1)
    for row in data:
        place, stamp = _locate(index, row, namesakes)
        if stamp is None:
            index.caches.forget(row)
            if index.image_path(row) is None:
                waiting.append((row, place))  # it vanished a moment ago
            else:
                check.missing.append(row)
        elif fits[row] and place == caches.places[row] and stamp == tuple(caches.stamps[row].tolist()):
            check.num_unchanged += 1
            index.bucket_sizes[row] = caches.sizes[row]
        else:
            waiting.append((row, place))
    return waiting


def _locate(index: Index, row: int, namesakes: _Namesakes) -> tuple[int, FileStamp | None]:
    """Where the datum's cache is: beside the picture, else elsewhere by its name, else beside it with a size in the name."""
    image, elsewhere = index.image_paths[row], index.cache_paths[row]
    for place in (BESIDE, ELSEWHERE, SIZED) if image else (ELSEWHERE,):
        if place == ELSEWHERE and not elsewhere:
            continue
        path = index.cache_path_at(row, place)
        stamp = file_stamp(path)
        if stamp is not None and not (place == SIZED and namesakes.have(path)):
            return place, stamp
    return (BESIDE if image else ELSEWHERE), None


class _Namesakes:
    """Pictures that are really called like `a_0512x0768_sdxl.png`: the cache of this name is theirs, not one of `a.png`."""

    def __init__(self) -> None:
        self._caches: dict[str, set[str]] = {}  # of such pictures, by folder

    def have(self, cache_path: str) -> bool:
        folder, name = os.path.split(cache_path)
        if folder not in self._caches:
            self._caches[folder] = set()
            with suppress(PermissionError), os.scandir(folder or ".") as scan:  # what cannot be listed can still hold files
                names = [split_name(entry.name) for entry in scan if "_sdxl." in entry.name]
                self._caches[folder] = {key + EXTENSION for key, extension in names if extension in IMAGE_EXTENSIONS}
        return name in self._caches[folder]


def _examined(
    index: Index, waiting: list[tuple[int, int]], config: Config, vae_digest: bytes | None, read_values: bool
) -> Iterator[tuple[int, int, CacheHeader | BadCache]]:
    """Each cache with its header, or with what is wrong with it. Threads read: disk, checksums and numpy let them."""

    def examine(one: tuple[int, int]) -> CacheHeader | BadCache:
        try:
            return _examine(index, one[0], index.cache_path_at(*one), config, vae_digest, read_values)
        except BadCache as bad:
            return bad

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="caches") as pool:
        for first in range(0, len(waiting), _AT_ONCE):
            piece = waiting[first : first + _AT_ONCE]
            for one, found in zip(piece, pool.map(examine, piece), strict=True):
                yield *one, found


def _examine(index: Index, row: int, path: str, config: Config, vae_digest: bytes | None, read_values: bool) -> CacheHeader:
    """The header of a cache that can be used.

    Raises:
        BadCache: it cannot.
    """
    has_image = index.image_path(row) is not None
    bucket, chosen_for = pair(index.bucket_sizes[row]) if has_image else None, (config.resolution, config.bucket_reso_step)
    try:
        header = read_header(path, bucket, chosen_for)
    except BadCache:
        if config.check_cache_validity or bucket is None:
            raise
        header = read_header(path, None, chosen_for)
    if config.flip_aug and not header.has_flipped:
        raise BadCache(f"{shown(path)}: it holds no flipped latents, which flip_aug = true needs")
    if not config.check_cache_validity:
        return header
    if has_image:
        _check_origin(index, row, header)
    if vae_digest is not None and header.vae_digest not in (None, vae_digest):
        raise BadCache(f"{shown(path)}: it was made by another VAE")
    if read_values:
        verify(header, config.flip_aug)
    return header


def _check_origin(index: Index, row: int, header: CacheHeader) -> None:
    """A cache that says what picture it was made from must say this one."""
    sizes = (pair(index.image_sizes[row]), pair(index.given_sizes[row]))
    if header.original_size is not None and header.original_size not in sizes:
        found = "{}x{}".format(*header.original_size)
        raise BadCache(f"{shown(header.path)}: it was made from a picture of {found} px, which has {sizes[0][0]}x{sizes[0][1]} px now")
    if header.source is None or header.source == tuple(index.stamps[row, :2].tolist()):
        return
    if header.source_digest is None or header.source_digest != file_digest(index.image_paths[row]):
        raise BadCache(f"{shown(header.path)}: its picture has changed since")
