"""Gets the latents of all data ready before training: valid caches are used, the other pictures are encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.cache_writer import CacheWriter, prepare_folders
from sdxl_train.data.caches import CacheCheck, CheckStop, OnProgress, check_caches
from sdxl_train.data.encoding import check_pictures, encode_pictures
from sdxl_train.data.images import SourceFile
from sdxl_train.data.index import Index
from sdxl_train.data.indexing import warn_of_silent_data
from sdxl_train.data.latents import DiskLatents, LatentStore, MemoryLatents
from sdxl_train.data.problems import refuse
from sdxl_train.data.sharing import SharedCaches, sharing_problems
from sdxl_train.errors import DataError, Problem
from sdxl_train.text_display import listed

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from sdxl_train.keys import Config


_MANY = 1000  # data; fewer are read in seconds


@dataclass(frozen=True)
class Work:
    """How a long piece of work before training is watched.

    Attributes:
        warn: is told what the user must know.
        check_stop: called often; what it raises ends the work.
        progress: the function that is told how much of a piece of work is done, made from the work's name and length.
    """

    warn: Callable[[str], None]
    check_stop: CheckStop
    progress: Callable[[str, int], OnProgress]


@dataclass(frozen=True)
class VaeInUse:
    """The VAE on its device, in the dtype it runs in; the digest of its encoder's weights; the name of its precision."""

    module: AutoencoderKL
    device: torch.device
    digest: bytes
    precision: str


@dataclass(frozen=True)
class PreparedLatents:
    """
    Attributes:
        store: where batches get them from.
        check: what was found out about the caches that were there.
        num_encoded: pictures that were encoded now.
        num_ignored_profiles: of these, how many have a colour profile that could not be used.
    """

    store: LatentStore
    check: CacheCheck
    num_encoded: int
    num_ignored_profiles: int


def prepare_latents(index: Index, vae: VaeInUse, config: Config, work: Work, to_disk: bool, in_memory: bool) -> PreparedLatents:
    """Check the caches that are there, encode what has none, and read what is to be kept.

    Args:
        to_disk: write caches beside the pictures.
        in_memory: keep all latents; needed where `to_disk` is False.
    Raises:
        DataError: bad pictures or caches, all named; a folder or a cache that cannot be written; a latent that is not finite.
    """
    problems = list(sharing_problems(index)) if to_disk else []
    data = np.flatnonzero(index.num_repeats)
    check = check_caches(index, config, vae.digest, problems, work.check_stop, work.progress("checking caches", len(data)))
    if check.invalid:
        work.warn(f"{len(check.invalid)} caches are not valid and are made again: {listed(check.invalid, 5)}")
    if to_disk:
        prepare_folders(index, check.missing)
    shared = SharedCaches(index, check.missing, to_disk)
    memory = MemoryLatents(index, data, config.flip_aug) if in_memory else None
    writer = CacheWriter(index, config.flip_aug, vae.digest, vae.precision, config.async_cache, shared) if to_disk else None
    profiles = set[int]()

    def keep(rows: list[int], flipped: bool, latents: NDArray[np.float32], sources: list[SourceFile]) -> None:
        for row, one in zip(rows, latents, strict=True):
            same = shared.all_of(row)
            index.is_decoded[same] = True
            if memory is not None:
                memory.write(same, flipped, one)
        if writer is not None:
            writer.write(rows, flipped, latents, sources)
        profiles.update(row for row, source in zip(rows, sources, strict=True) if source.ignored_profile)

    try:
        if problems:  # nothing is encoded any more: only the report is made complete
            bad = _check_rest(index, config, work)
        else:
            progress = work.progress("encoding pictures", len(shared.to_encode))
            bad = encode_pictures(index, shared.to_encode, vae.module, config, vae.device, keep, work.check_stop, progress)
        if writer is not None:
            writer.finish()
    finally:
        if writer is not None:
            writer.close()
    num_encoded = len(shared.to_encode) - len(bad)
    bad |= {same: problem for row, problem in bad.items() for same in shared.all_of(row)}
    settle_bad_pictures(index, config, bad, work.warn, problems)
    store = DiskLatents(index, is_trusted=config.check_cache_validity)
    if memory is not None:
        cached = np.setdiff1d(data, shared.missing)
        memory.fill(cached, store, work.check_stop, work.progress("reading caches", len(cached)))
    return PreparedLatents(memory or store, check, num_encoded, len(profiles))


def prepare_pictures(index: Index, config: Config, work: Work) -> None:
    """Decode every picture once that no earlier start has decoded, for runs that encode in every step.

    Raises:
        DataError: bad pictures, all named; or data that have only a cache.
    """
    refuse(missing_pictures(index))
    settle_bad_pictures(index, config, _check_rest(index, config, work), work.warn, [])


def missing_pictures(index: Index) -> list[Problem]:
    """What stands against cache_latents = false: data that have only a cache."""
    keys = [index.key(row) for row in np.flatnonzero((index.num_repeats > 0) & (index.image_paths.lengths == 0)).tolist()]
    message = f"cache_latents = false needs pictures, and {len(keys)} data have only a cache: {listed(keys)}"
    return [Problem("data", message, key="cache_latents")] if keys else []


def complete_report(index: Index, config: Config, work: Work, problems: Sequence[Problem]) -> None:
    """Where the data have problems, look for those too that only reading whole files finds, and refuse them all together.

    Raises:
        DataError: there are problems.
    """
    if not problems:
        return
    if len(index) > _MANY:  # that takes a while: what is known should be read first
        try:
            refuse(problems)
        except DataError as so_far:
            work.warn(f"{so_far}\nPictures are decoded and caches read now, to find what else is wrong; Ctrl-C ends this.")
    others: list[Problem] = []
    if config.cache_latents:
        check_caches(index, config, None, others, work.check_stop, work.progress("checking caches", len(index)), only_caches=True)
    bad = _check_rest(index, config, work)
    refuse([*problems, *others, *(bad.values() if config.bad_images == "error" else ())])


def settle_bad_pictures(
    index: Index, config: Config, bad: dict[int, Problem], warn: Callable[[str], None], problems: list[Problem]
) -> None:
    """Leave bad pictures out of the training and warn of the silent ones that remain, or refuse the bad ones with all other problems, as
    `bad_images` says.

    Raises:
        DataError: with bad_images = "error" and bad pictures; other problems; or nothing is left to train.
    """
    if config.bad_images == "error":
        refuse([*problems, *bad.values()])
    refuse(problems)
    for problem in bad.values():
        warn(f"left out (bad_images = skip): {problem.message}")
    if bad:
        index.leave_out(list(bad))
    if config.bad_images == "skip":  # else they were counted at once, since no bad one is left out
        warn_of_silent_data(index, warn)


def _check_rest(index: Index, config: Config, work: Work) -> dict[int, Problem]:
    """Decode what was never decoded and has no valid cache."""
    unknown = (index.num_repeats > 0) & (index.image_paths.lengths > 0) & ~index.is_decoded
    if config.cache_latents:
        unknown &= ~(index.caches.is_verified & index.caches.stamps.any(axis=1))
    rows = np.flatnonzero(unknown).tolist()
    return check_pictures(index, rows, config, work.check_stop, work.progress("checking pictures", len(rows)))
