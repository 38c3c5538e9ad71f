"""Encodes pictures to latents: all of them before training, or those of one batch in a step.

The posterior draw of a stored latent depends on the seed, the datum's key and the orientation only, so the latents do not depend on the
order of the encodes or on `vae_batch_size` (up to float error).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.batches import pixels_of
from sdxl_train.devices import HostCopy, to_device
from sdxl_train.errors import DataError
from sdxl_train.keys import Config
from sdxl_train.model.architecture import LATENT_CHANNELS, PX_PER_LATENT
from sdxl_train.randomness import StepRandom, generator
from sdxl_train.text_display import listed

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from torch import Tensor

    from sdxl_train.data.index import Index

ORIENTATIONS = ("plain", "flipped")
MAX_DECODE_THREADS = 16

CheckStop = Callable[[], None]  # raises to end the work
OnProgress = Callable[[int, int], None]  # (pictures done, pictures in all)


class LatentStore(Protocol):
    """Where a batch gets its stored latents from. It lives in the main process only."""

    def read(self, data: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        """The latents of B data of one bucket, unscaled, in the orientation that each is trained in. [B, 4, h, w] float32, on the CPU.

        Raises:
            DataError: a latent cannot be read.
        """
        ...


class MemoryLatents:
    """A `LatentStore` that keeps all latents in memory, in one array for each bucket.

    Args:
        chunks: the data to keep, in lists of one bucket each.
        flip_aug: keep the flipped orientation too.
    """

    def __init__(self, index: Index, chunks: Sequence[Sequence[int]], flip_aug: bool) -> None:
        self._index = index
        self._row = np.full(len(index), -1, np.int64)
        num_rows: dict[tuple[int, int], int] = {}
        for chunk in chunks:
            bucket = _bucket(index, chunk[0])
            first = num_rows.get(bucket, 0)
            self._row[chunk] = np.arange(first, first + len(chunk))
            num_rows[bucket] = first + len(chunk)
        orientations = len(ORIENTATIONS) if flip_aug else 1
        self._arrays = {
            (width, height): np.empty((rows, orientations, LATENT_CHANNELS, height // PX_PER_LATENT, width // PX_PER_LATENT), np.float32)
            for (width, height), rows in num_rows.items()
        }

    def write(self, data: Sequence[int], flipped: bool, latents: NDArray[np.float32]) -> None:
        """Keep the latents of data of one bucket. [B, 4, h, w]."""
        self._arrays[_bucket(self._index, data[0])][self._row[data], int(flipped)] = latents

    def read(self, data: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        import torch

        rows = self._row[data]
        assert (rows >= 0).all(), "a datum that was not encoded is in the epoch plan"
        return torch.from_numpy(self._arrays[_bucket(self._index, data[0])][rows, np.asarray(flipped, np.intp)])


@dataclass(frozen=True)
class BadPicture:
    """A picture that cannot be decoded, by its row in the index."""

    datum: int
    reason: str


@dataclass(frozen=True)
class EncodedDataset:
    """All latents, and the pictures that have none (only with bad_images = "skip"): these must leave the epoch plan."""

    latents: MemoryLatents
    bad: tuple[BadPicture, ...]


def encode_dataset(
    index: Index, vae: AutoencoderKL, config: Config, device: torch.device | str, seed: int, check_stop: CheckStop, on_progress: OnProgress
) -> EncodedDataset:
    """Encode every datum with repeats once, or once for each orientation with `flip_aug`, into memory.

    Pictures are decoded by threads while the VAE encodes those before them. After the first bad picture, with bad_images = "error",
    nothing more is encoded and the others are only decoded, so that the report names all bad ones.

    Args:
        vae: on `device`, in the dtype it is to run in.
        check_stop: called between encodes; what it raises ends the work.
    Raises:
        DataError: bad pictures, all named; or a latent that is not finite.
    """
    chunks = encode_chunks(index, config.vae_batch_size)
    latents = MemoryLatents(index, chunks, config.flip_aug)
    encoder = _Encoder(index, vae, device, seed, latents)
    order = [datum for chunk in chunks for datum in chunk]
    bad: list[BadPicture] = []
    num_done = 0
    with closing(decode_ahead(index, order, config.max_image_pixels, config.vae_batch_size)) as pictures:
        for chunk in chunks:
            good: dict[int, NDArray[np.uint8]] = {}
            for datum, pixels in islice(pictures, len(chunk)):
                check_stop()
                if isinstance(pixels, DataError):
                    bad.append(BadPicture(datum, str(pixels)))
                else:
                    good[datum] = pixels
            if good and (not bad or config.bad_images == "skip"):
                for flipped in (False, True) if config.flip_aug else (False,):
                    check_stop()
                    encoder.queue(list(good), np.stack(list(good.values())), flipped)
            num_done += len(chunk)
            on_progress(num_done, len(order))
    _refuse(bad, config)
    encoder.finish()
    return EncodedDataset(latents, tuple(bad))


def check_pictures(index: Index, config: Config, check_stop: CheckStop, on_progress: OnProgress) -> tuple[BadPicture, ...]:
    """Decode every picture with repeats once, for runs that encode in every step.

    Returns:
        With bad_images = "skip", the bad ones: these must leave the epoch plan.
    Raises:
        DataError: with bad_images = "error", bad pictures, all named.
    """
    order = np.flatnonzero(index.num_repeats).tolist()
    bad: list[BadPicture] = []
    with closing(decode_ahead(index, order, config.max_image_pixels, 1)) as pictures:
        for num_done, (datum, pixels) in enumerate(pictures, 1):
            check_stop()
            if isinstance(pixels, DataError):
                bad.append(BadPicture(datum, str(pixels)))
            on_progress(num_done, len(order))
    _refuse(bad, config)
    return tuple(bad)


def _refuse(bad: Sequence[BadPicture], config: Config) -> None:
    if bad and config.bad_images == "error":
        lines = "".join(f"\n  {picture.reason}" for picture in bad)
        raise DataError(f'{len(bad)} bad pictures; mend or remove them, or set bad_images = "skip" to train without them:{lines}')


def encode_chunks(index: Index, vae_batch_size: int) -> list[list[int]]:
    """The data of each encode: those with repeats, sorted by bucket, at most `vae_batch_size` of one bucket together."""
    of_bucket: dict[tuple[int, int], list[int]] = {}
    for datum in np.flatnonzero(index.num_repeats).tolist():
        of_bucket.setdefault(_bucket(index, datum), []).append(datum)
    return [
        data[first : first + vae_batch_size] for _, data in sorted(of_bucket.items()) for first in range(0, len(data), vae_batch_size)
    ]


def decode_ahead(
    index: Index, data: Sequence[int], max_image_pixels: int, num_wanted_together: int
) -> Generator[tuple[int, NDArray[np.uint8] | DataError], None, None]:
    """Each datum in order with its pixels ([8h, 8w, 3] uint8), or with what is wrong with its picture.

    Threads decode the pictures that come next (Pillow and numpy let them run at once); memory is bounded to a few pictures a thread.
    """
    num_threads = max(1, min(MAX_DECODE_THREADS, os.cpu_count() or 1))
    depth = 2 * num_threads + num_wanted_together
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    waiting: deque[tuple[int, Future[NDArray[np.uint8]]]] = deque()
    try:
        for datum in data:
            waiting.append((datum, pool.submit(pixels_of, index, datum, max_image_pixels)))
            if len(waiting) >= depth:
                yield _decoded(*waiting.popleft())
        while waiting:
            yield _decoded(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _decoded(datum: int, future: Future[NDArray[np.uint8]]) -> tuple[int, NDArray[np.uint8] | DataError]:
    try:
        return datum, future.result()
    except DataError as error:
        return datum, error


def nonfinite_latents_error(names: Sequence[str]) -> DataError:
    """The error for pictures that the VAE turns into NaN or infinity, which the official SDXL VAE does in fp16."""
    return DataError(
        f"the VAE gives latents with NaN or infinity for {listed(list(names))}: set no_half_vae = true to run it in float32, "
        "or name a repaired VAE in vae"
    )


def as_vae_input(pixels: Tensor) -> Tensor:
    """uint8 pixels as the VAE takes them: [-1, 1], float32, same shape."""
    return pixels.float() / 127.5 - 1


def encode_pixels(vae: AutoencoderKL, pixels: Tensor, places: Sequence[bytes], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Encode the pictures of a batch in a step; the posterior draw of each comes from its place in the run.

    Args:
        pixels: [B, 3, 8h, 8w] uint8, on `device`.
        places: `Batch.places`.
    Returns:
        Scaled latents, [B, 4, h, w] float32, and whether those of each sample are finite, [B] bool; both on `device` and possibly still
        being computed. Where one is not finite, raise `nonfinite_latents_error`.
    """
    import torch

    from sdxl_train.model.sdxl import encode_latents

    height, width = (side // PX_PER_LATENT for side in pixels.shape[-2:])
    noise = StepRandom(places, "vae", device).normal(LATENT_CHANNELS, height, width)
    latents = encode_latents(vae, as_vae_input(pixels), noise)
    return latents, torch.isfinite(latents).flatten(1).all(1)


class _Encoder:
    """Encodes batches into a store. The results of one encode are awaited after the next one is queued, so a device never waits for us."""

    def __init__(self, index: Index, vae: AutoencoderKL, device: torch.device | str, seed: int, latents: MemoryLatents) -> None:
        self._index = index
        self._vae = vae
        self._device = device
        self._seed = seed
        self._latents = latents
        self._keep_last: Callable[[], None] | None = None

    def queue(self, data: list[int], pixels: NDArray[np.uint8], flipped: bool) -> None:
        """Encode pictures of one bucket, [B, 8h, 8w, 3], mirrored first if `flipped`."""
        import torch

        from sdxl_train.model.sdxl import encode_latents

        height, width = (side // PX_PER_LATENT for side in pixels.shape[1:3])
        shape = (LATENT_CHANNELS, height, width)
        draws = [
            generator("vae", self._seed, self._index.key(datum), ORIENTATIONS[flipped]).standard_normal(shape, np.float32) for datum in data
        ]
        noise = to_device(torch.from_numpy(np.stack(draws)), self._device)
        on_device = to_device(torch.from_numpy(pixels), self._device).permute(0, 3, 1, 2)  # [B, 3, 8h, 8w]
        latents = encode_latents(self._vae, as_vae_input(on_device.flip(-1) if flipped else on_device), noise, scaled=False)
        copy = HostCopy(latents)
        self.finish()
        self._keep_last = lambda: self._keep(data, flipped, copy.wait().numpy())

    def finish(self) -> None:
        """Wait for what was queued last and keep it."""
        if self._keep_last is not None:
            self._keep_last()
            self._keep_last = None

    def _keep(self, data: list[int], flipped: bool, latents: NDArray[np.float32]) -> None:
        finite = np.isfinite(latents).reshape(len(data), -1).all(1)
        if not finite.all():
            raise nonfinite_latents_error([self._index.image_path(data[row]) for row in np.flatnonzero(~finite)])
        self._latents.write(data, flipped, latents)


def _bucket(index: Index, datum: int) -> tuple[int, int]:
    width, height = index.bucket_sizes[datum]
    return int(width), int(height)
