"""Where batches get their stored latents from: all of them in memory, or cache files that are read at each fetch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.caches import MAX_THREADS, CheckStop, OnProgress
from sdxl_train.data.index import Index, pair
from sdxl_train.data.latent_file import BadCache, read_at, read_header, read_latents
from sdxl_train.errors import DataError
from sdxl_train.model.architecture import LATENT_CHANNELS, PX_PER_LATENT
from sdxl_train.text_display import listed, shown

if TYPE_CHECKING:
    from torch import Tensor

ORIENTATIONS = ("plain", "flipped")
_AT_ONCE = 64  # data of one piece of work for a thread


class LatentStore(Protocol):
    """Where a batch gets its stored latents from. It lives in the main process only."""

    def read(self, data: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        """The latents of B data of one bucket, unscaled, in the orientation that each is trained in. [B, 4, h, w] float32, on the CPU.

        Raises:
            DataError: a latent cannot be read.
        """
        ...


class DiskLatents:
    """A `LatentStore` that reads cache files: the bytes of the latents, at the offset where the index says that they are.

    Args:
        is_trusted: the values were verified when the caches were checked; else each is looked at for NaN and infinity.
    """

    def __init__(self, index: Index, is_trusted: bool) -> None:
        self._index = index
        self._is_trusted = is_trusted

    def read(self, data: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        import torch

        out = np.empty((len(data), *latent_shape(self._index, data[0])), np.float32)
        for row, datum, flip in zip(out, data, flipped, strict=True):
            self.read_one(datum, {flip: row})
        return torch.from_numpy(out)

    def read_one(self, datum: int, out: dict[bool, NDArray[np.float32]]) -> None:
        """Fill the arrays with the latents of one datum, {flipped: [4, h, w]}.

        Raises:
            DataError: the file is gone, unreadable, not the one that was checked, or holds values that are not finite.
        """
        index, caches = self._index, self._index.caches
        path, offsets = index.cache_path(datum), caches.offsets[datum].tolist()
        try:
            if all(offsets[flipped] >= 0 for flipped in out):
                status = read_at(path, *((offsets[flipped], one) for flipped, one in out.items()))
            else:  # of another program: packed, or of another dtype
                header = read_header(path, pair(caches.sizes[datum]))
                for flipped, one in out.items():
                    read_latents(header, flipped, one)
                status = header.status
        except BadCache as bad:
            raise DataError(f"{bad}; it was there when the caches were checked") from bad
        if (status.st_size, status.st_mtime_ns) != (caches.stamps[datum, 0], caches.stamps[datum, 1]):
            raise DataError(f"{shown(path)}: it has changed since the caches were checked; nothing may write to it while it is trained on")
        if not self._is_trusted and not all(np.isfinite(one).all() for one in out.values()):
            raise DataError(f"{shown(path)}: its latents hold NaN or infinity; check_cache_validity = true makes it again")


class MemoryLatents:
    """A `LatentStore` that keeps all latents in memory, in one array for each bucket.

    Args:
        data: the data to keep.
        flip_aug: keep the flipped orientation too.
    """

    def __init__(self, index: Index, data: NDArray[np.int64], flip_aug: bool) -> None:
        self._index = index
        self._row = np.full(len(index), -1, np.int64)
        self._arrays: dict[tuple[int, int], NDArray[np.float32]] = {}
        sizes, bucket_of = np.unique(index.bucket_sizes[data], axis=0, return_inverse=True)
        for bucket, size in enumerate(sizes):
            rows = data[bucket_of == bucket]
            self._row[rows] = np.arange(len(rows))
            self._arrays[pair(size)] = np.empty((len(rows), 1 + flip_aug, *latent_shape(index, int(rows[0]))), np.float32)
        self._orientations = (False, True) if flip_aug else (False,)

    def write(self, data: Sequence[int], flipped: bool, latents: NDArray[np.float32]) -> None:
        """Keep the latents of data of one bucket. [B, 4, h, w], or [4, h, w] for all of them."""
        self._array(data[0])[self._row[data], int(flipped)] = latents

    def fill(self, data: NDArray[np.int64], files: DiskLatents, check_stop: CheckStop, on_progress: OnProgress) -> None:
        """Read the latents of these data from their caches, by threads.

        Raises:
            DataError: as `DiskLatents.read_one`.
        """

        def load(start: int) -> int:
            piece = data[start : start + _AT_ONCE].tolist()
            for datum in piece:
                files.read_one(datum, dict(zip(self._orientations, self._array(datum)[self._row[datum]], strict=True)))
            return len(piece)

        num_done = 0
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="latents") as pool:
            futures = [pool.submit(load, start) for start in range(0, len(data), _AT_ONCE)]
            try:
                for future in futures:
                    check_stop()
                    num_done += future.result()
                    on_progress(num_done, len(data))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def read(self, data: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        import torch

        rows = self._row[data]
        assert (rows >= 0).all(), "a datum that was not encoded is in the epoch plan"
        return torch.from_numpy(self._array(data[0])[rows, np.asarray(flipped, np.intp)])

    def _array(self, datum: int) -> NDArray[np.float32]:
        return self._arrays[pair(self._index.bucket_sizes[datum])]


def latent_shape(index: Index, datum: int) -> tuple[int, int, int]:
    """(4, h, w) of the latents of a datum."""
    width, height = pair(index.bucket_sizes[datum])
    return LATENT_CHANNELS, height // PX_PER_LATENT, width // PX_PER_LATENT


def nonfinite_latents_error(names: Sequence[str]) -> DataError:
    """The error for pictures that the VAE turns into NaN or infinity, which the official SDXL VAE does in fp16."""
    return DataError(
        f"the VAE gives latents with NaN or infinity for {listed(list(names))}: set no_half_vae = true to run it in float32, "
        "or name a repaired VAE in vae"
    )
