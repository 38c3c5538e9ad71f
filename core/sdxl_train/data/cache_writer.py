"""Writes latents into cache files beside their pictures, in the background while the next ones are encoded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdxl_train.atomic import remove_leftovers
from sdxl_train.data.caches import note
from sdxl_train.data.images import SourceFile
from sdxl_train.data.index import BESIDE, Index, pair
from sdxl_train.data.latent_file import CacheHeader, write_cache
from sdxl_train.data.problems import refuse
from sdxl_train.data.sharing import SharedCaches
from sdxl_train.errors import DataError, Problem
from sdxl_train.text_display import listed, shown

_LEFTOVER_S = 600.0  # no cache takes so long to write
_NUM_THREADS = 4  # each waits for the disk most of the time
_MAX_WAITING = 64  # caches that are encoded and not yet written

_Written = tuple[int, CacheHeader]


def prepare_folders(index: Index, data: Sequence[int]) -> None:
    """Before anything is encoded: the caches of all these data can be written. What killed runs left half written is removed.

    Raises:
        DataError: naming the folders and what can be done.
    """
    folders = {os.path.dirname(index.image_paths[datum]) or "." for datum in data}
    refuse(unwritable_folders(folders))
    for folder in folders:
        remove_leftovers(Path(folder), _LEFTOVER_S)


def unwritable_folders(folders: Iterable[str]) -> list[Problem]:
    """What stands against writing caches into these folders."""
    closed = sorted(folder for folder in folders if not os.access(folder, os.W_OK | os.X_OK))
    message = (
        f"caches cannot be written into {listed(closed)}: make {'it' if len(closed) == 1 else 'them'} writable, "
        "set cache_latents_to_disk = false to keep the latents in memory, or copy the pictures to another disk"
    )
    return [Problem("data", message, path=closed[0])] if closed else []


class CacheWriter:
    """Writes each datum's cache once all its orientations are there, and notes it in the index.

    Args:
        vae_digest, precision: of the VAE that encodes.
        shared: which data have the cache of another.
        in_background: by threads; else at once. The files have the same bytes.
    """

    def __init__(self, index: Index, flip_aug: bool, vae_digest: bytes, precision: str, in_background: bool, shared: SharedCaches) -> None:
        self._index, self._shared = index, shared
        self._flip_aug = flip_aug
        self._vae_digest = vae_digest
        self._precision = precision
        self._plain: dict[int, NDArray[np.float32]] = {}  # those whose flipped latents are still to come
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="cache-writer") if in_background else None
        self._waiting: deque[Future[_Written]] = deque()
        self.num_written = 0

    def write(self, data: list[int], flipped: bool, latents: NDArray[np.float32], sources: list[SourceFile]) -> None:
        """Take the latents of data of one bucket, [B, 4, h, w], in one orientation: plain first.

        Raises:
            DataError: a cache could not be written, this one or one before it.
        """
        for datum, one, source in zip(data, latents, sources, strict=True):
            if self._flip_aug and not flipped:
                self._plain[datum] = one
            else:
                self._submit(datum, self._plain.pop(datum, one), one if flipped else None, source)

    def finish(self) -> None:
        """Wait until all is on the disk.

        Raises:
            DataError: a cache could not be written.
        """
        while self._waiting:
            self._note(self._waiting.popleft().result())

    def close(self) -> None:
        """End the threads, once they have written what they have; errors are not told any more."""
        if self._pool is None:
            return
        self._pool.shutdown()
        for future in self._waiting:
            if future.exception() is None:
                self._note(future.result())
        self._waiting.clear()

    def _submit(self, datum: int, plain: NDArray[np.float32], flipped: NDArray[np.float32] | None, source: SourceFile) -> None:
        if self._pool is None:
            self._note(self._write(datum, plain, flipped, source))
            return
        self._waiting.append(self._pool.submit(self._write, datum, plain, flipped, source))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > _MAX_WAITING):
            self._note(self._waiting.popleft().result())

    def _write(self, datum: int, plain: NDArray[np.float32], flipped: NDArray[np.float32] | None, source: SourceFile) -> _Written:
        index = self._index
        path = index.cache_path_at(datum, BESIDE)
        try:
            header = write_cache(
                path,
                plain,
                flipped,
                pair(index.image_sizes[datum]),
                index.placement(datum),
                (source.size, source.mtime_ns),
                source.digest,
                self._vae_digest,
                self._precision,
            )
        except OSError as error:
            needed = (1 + self._flip_aug) * plain.nbytes
            raise DataError(f"{shown(path)}: the cache ({needed} bytes) cannot be written: {error.strerror or error}") from error
        return datum, header

    def _note(self, written: _Written) -> None:
        datum, header = written
        # Verified is what fits `index.vae_digest`, which caches that are trusted leave as it is.
        is_verified = self._index.vae_digest == self._vae_digest.hex()
        for row in self._shared.all_of(datum):
            note(self._index, row, BESIDE, header, header.has_flipped, is_verified)
        self.num_written += 1
