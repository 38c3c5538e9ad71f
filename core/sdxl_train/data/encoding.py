"""Encodes pictures to latents: all that have no cache before training, or those of one batch in a step.

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
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.caches import CheckStop, OnProgress
from sdxl_train.data.images import SourceFile, load_pixels_and_source
from sdxl_train.data.index import Index, pair
from sdxl_train.data.latents import ORIENTATIONS, nonfinite_latents_error
from sdxl_train.devices import HostCopy, to_device
from sdxl_train.errors import DataError, Problem
from sdxl_train.keys import Config
from sdxl_train.model.architecture import LATENT_CHANNELS, PX_PER_LATENT
from sdxl_train.randomness import StepRandom, generator

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from torch import Tensor

MAX_DECODE_THREADS = 16


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        pixels: as trained: resized and cropped to its bucket. [8h, 8w, 3] uint8.
        source: the file it was decoded from.
    """

    pixels: NDArray[np.uint8]
    source: SourceFile


Keep = Callable[[list[int], bool, NDArray[np.float32], list[SourceFile]], None]  # (data, flipped, [B, 4, h, w], their files)


def encode_pictures(
    index: Index,
    data: Sequence[int],
    vae: AutoencoderKL,
    config: Config,
    device: torch.device | str,
    keep: Keep,
    check_stop: CheckStop,
    on_progress: OnProgress,
) -> dict[int, Problem]:
    """Encode these pictures once each, or once in each orientation with `flip_aug`.

    Pictures are decoded by threads while the VAE encodes those before them. After the first bad picture, with bad_images = "error",
    nothing more is encoded and the others are only decoded, so that all bad ones become known.

    Args:
        vae: on `device`, in the dtype it is to run in.
        keep: is given the latents of each encode, all finite.
        check_stop: called between encodes; what it raises ends the work.
    Returns:
        what is wrong with each bad picture, by its row.
    Raises:
        DataError: a latent that is not finite.
    """
    chunks = encode_chunks(index, data, config.vae_batch_size)
    encoder = _Encoder(index, vae, device, config.seed, keep)
    order = [datum for chunk in chunks for datum in chunk]
    bad: dict[int, Problem] = {}
    num_done = 0
    with closing(decode_ahead(index, order, config.max_image_pixels, config.vae_batch_size)) as pictures:
        for chunk in chunks:
            good: dict[int, Picture] = {}
            for datum, picture in islice(pictures, len(chunk)):
                check_stop()
                if isinstance(picture, Problem):
                    bad[datum] = picture
                else:
                    good[datum] = picture
                    index.is_decoded[datum] = True
            if good and (not bad or config.bad_images == "skip"):
                for flipped in (False, True) if config.flip_aug else (False,):
                    check_stop()
                    encoder.queue(list(good), list(good.values()), flipped)
            num_done += len(chunk)
            on_progress(num_done, len(order))
    encoder.finish()
    return bad


def check_pictures(
    index: Index, data: Sequence[int], config: Config, check_stop: CheckStop, on_progress: OnProgress
) -> dict[int, Problem]:
    """Decode these pictures once, where no encode does it; what is wrong with each bad one, by its row."""
    bad: dict[int, Problem] = {}
    with closing(decode_ahead(index, data, config.max_image_pixels, 1)) as pictures:
        for num_done, (datum, picture) in enumerate(pictures, 1):
            check_stop()
            if isinstance(picture, Problem):
                bad[datum] = picture
            else:
                index.is_decoded[datum] = True
            on_progress(num_done, len(data))
    return bad


def encode_chunks(index: Index, data: Sequence[int], vae_batch_size: int) -> list[list[int]]:
    """The data of each encode: sorted by bucket, at most `vae_batch_size` of one bucket together."""
    of_bucket: dict[tuple[int, int], list[int]] = {}
    for datum in data:
        of_bucket.setdefault(pair(index.bucket_sizes[datum]), []).append(datum)
    return [
        of_one[first : first + vae_batch_size] for _, of_one in sorted(of_bucket.items()) for first in range(0, len(of_one), vae_batch_size)
    ]


def decode_ahead(
    index: Index, data: Sequence[int], max_image_pixels: int, num_wanted_together: int
) -> Generator[tuple[int, Picture | Problem], None, None]:
    """Each datum in order with its picture, or with what is wrong with it.

    Threads decode the pictures that come next (Pillow and numpy let them run at once); memory is bounded to a few pictures a thread.
    """
    num_threads = max(1, min(MAX_DECODE_THREADS, os.cpu_count() or 1))
    depth = 2 * num_threads + num_wanted_together
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    waiting: deque[tuple[int, Future[Picture | Problem]]] = deque()
    try:
        for datum in data:
            waiting.append((datum, pool.submit(_decode, index, datum, max_image_pixels)))
            if len(waiting) >= depth:
                datum, future = waiting.popleft()
                yield datum, future.result()
        for datum, future in waiting:
            yield datum, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(index: Index, datum: int, max_image_pixels: int) -> Picture | Problem:
    path = index.image_paths[datum]
    try:
        return Picture(*load_pixels_and_source(path, index.placement(datum), max_image_pixels))
    except DataError as error:
        return Problem("image", str(error), path=path)


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
    """Encodes batches. The results of one encode are awaited after the next one is queued, so a device never waits for us."""

    def __init__(self, index: Index, vae: AutoencoderKL, device: torch.device | str, seed: int, keep: Keep) -> None:
        self._index = index
        self._vae = vae
        self._device = device
        self._seed = seed
        self._keep = keep
        self._keep_last: Callable[[], None] | None = None

    def queue(self, data: list[int], pictures: list[Picture], flipped: bool) -> None:
        """Encode pictures of one bucket, mirrored first if `flipped`."""
        import torch

        from sdxl_train.model.sdxl import encode_latents

        pixels = np.stack([picture.pixels for picture in pictures])  # [B, 8h, 8w, 3]
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
        sources = [picture.source for picture in pictures]
        self._keep_last = lambda: self._check_and_keep(data, flipped, copy.wait().numpy(), sources)

    def finish(self) -> None:
        """Wait for what was queued last and keep it."""
        if self._keep_last is not None:
            self._keep_last()
            self._keep_last = None

    def _check_and_keep(self, data: list[int], flipped: bool, latents: NDArray[np.float32], sources: list[SourceFile]) -> None:
        finite = np.isfinite(latents).reshape(len(data), -1).all(1)
        if not finite.all():
            raise nonfinite_latents_error([self._index.image_paths[data[row]] for row in np.flatnonzero(~finite)])
        self._keep(data, flipped, latents, sources)
