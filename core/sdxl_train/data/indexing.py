"""Builds the index: finds the data, checks every file's header, counts, asks for the repeats, and places the pictures in buckets.

What an earlier start found out is used again wherever the file it was found out about is unchanged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.buckets import choose_buckets
from sdxl_train.data.columns import NameColumn, TextColumn
from sdxl_train.data.counter import count_tags
from sdxl_train.data.file_stamps import file_stamps
from sdxl_train.data.image_headers import BadImage
from sdxl_train.data.images import image_header
from sdxl_train.data.index import Caches, Index, Stamps
from sdxl_train.data.latent_file import BadCache, read_header
from sdxl_train.data.sharing import sharing_problems
from sdxl_train.data.sources import Candidates, Inputs, captions_digest, find_candidates
from sdxl_train.errors import Problem
from sdxl_train.text_display import listed

if TYPE_CHECKING:
    from sdxl_train.data.records import KnownSize, Records
    from sdxl_train.keys import Config
    from sdxl_train.plugins import Plugins

Warn = Callable[[str], None]
_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")

_FILES_AT_ONCE = 256  # of one piece of work for a thread
_LISTED = 20  # names in a warning


@dataclass(frozen=True)
class Indexed:
    """
    Attributes:
        index: the data; a part of them where there are problems.
        inputs: what it was made from.
        is_new: something differs from what the records hold.
    """

    index: Index
    inputs: Inputs
    is_new: bool


def build_index(config: Config, plugins: Plugins, known: Records | None, warn: Warn, problems: list[Problem]) -> Indexed:
    """Find the data, check every file's header, count, ask `count_repeats` once for each datum, and place the pictures.

    Args:
        known: what an earlier start found out.
        warn: is told once about missing pictures and folders of runs, and about each picture skipped.
        problems: gets every problem of the data, also that nothing is left to train; the index then holds what is without problems.
    Raises:
        PluginError: from `count_repeats`.
    """
    index, inputs, stamps, is_new = _find(config, known, problems)
    _choose_sizes_anew(index, config)
    changed = _check_files(index, stamps, config, known.sizes if known else {}, warn, problems) or is_new
    if changed:
        index.original_sizes = np.where(index.given_sizes > 0, index.given_sizes, index.image_sizes)
        index.counter = _count(index)
    _place(index, config, everything=changed)
    changed |= _ask_repeats(index, plugins)
    if config.cache_latents and config.cache_latents_to_disk:
        problems += sharing_problems(index)
    _tell(index, warn)
    if not problems and not index.num_repeats.any():
        problems.append(nothing_to_train(config, index))
    return Indexed(index, inputs, changed)


def _find(config: Config, known: Records | None, problems: list[Problem]) -> tuple[Index, Inputs, Stamps, bool]:
    """The data with what is known about them, what they were found by, the stamps of their files, and whether they are not those known."""
    if known is not None and known.index is not None and known.inputs.still_hold(config) and _same_captions(known.index, known.inputs):
        stamps = _stamps(known.index, config)
        if stamps.any(axis=1).all():
            return known.index, known.inputs, stamps, False
    candidates = find_candidates(config, problems, known)
    for path in candidates.doubtful if config.bad_images == "error" else ():  # what is wrong with them belongs into the one report
        answer = _check_image(path, None, None, config)
        problems += [answer] if isinstance(answer, Problem) else []
    index = _from_candidates(candidates)
    if known is not None and known.index is not None:
        _remember(index, known.index)
    return index, candidates.inputs, _stamps(index, config), True


def _same_captions(index: Index, inputs: Inputs) -> bool:
    return not inputs.captions or inputs.captions == captions_digest(index.keys, map(index.source_path, range(len(index))))


def _from_candidates(found: Candidates) -> Index:
    """The columns, with nothing known about the files yet."""
    rows, count = found.rows, len(found.rows.keys)
    return Index(
        keys=rows.keys,
        image_paths=found.image_paths,
        cache_paths=found.cache_paths,
        texts=rows.texts,
        artists=rows.artists,
        characters=rows.characters,
        styles=rows.styles,
        qualities=rows.qualities,
        folders=_folders(found.image_paths),
        image_sizes=np.zeros((count, 2), np.int32),
        given_sizes=rows.original_sizes,
        original_sizes=np.zeros((count, 2), np.int32),
        bucket_sizes=np.zeros((count, 2), np.int32),
        num_repeats=np.zeros(count, np.int32),
        has_caption=rows.has_caption,
        has_description=rows.has_description,
        max_tokens=rows.max_tokens,
        num_tokens=np.full(count, -1, np.int32),
        stamps=np.zeros((count, 4), np.int64),
        is_bad=np.zeros(count, bool),
        is_decoded=np.zeros(count, bool),
        caches=Caches.unknown(count),
        shares=found.shares,
        missing=found.missing,
        hidden=found.hidden,
        run_folders=found.run_folders,
    )


def _folders(image_paths: TextColumn) -> NameColumn:
    """The name of the folder of each picture; none for '' (a cache alone)."""
    names: dict[str, int] = {}
    code_of: dict[str, int] = {}
    codes: list[int] = []
    for path in image_paths:
        folder = path.rpartition(os.sep)[0]
        if path and folder not in code_of:  # several folders may have one name
            code_of[folder] = names.setdefault(os.path.basename(os.path.abspath(folder)), len(names))
        codes.append(code_of[folder] if path else -1)
    return NameColumn(list(names), np.array(codes, np.int32))


def _remember(index: Index, known: Index) -> None:
    """Take over what is known of the data that are found again at the same paths."""
    row_of = {key: row for row, key in enumerate(known.keys)}
    old = [row_of.get(key, -1) for key in index.keys]
    pairs = [
        (new, row)
        for new, row in enumerate(old)
        if row >= 0
        and index.image_paths.raw(new) == known.image_paths.raw(row)
        and (index.image_paths.raw(new) or index.cache_paths.raw(new) == known.cache_paths.raw(row))
    ]
    if not pairs:
        return
    here, there = (np.array(rows, np.int64) for rows in zip(*pairs, strict=True))
    for name in ("image_sizes", "bucket_sizes", "stamps", "is_bad", "is_decoded"):
        getattr(index, name)[here] = getattr(known, name)[there]
    for name in ("stamps", "is_verified", "offsets", "sizes", "crops", "has_flipped", "has_several", "places"):
        getattr(index.caches, name)[here] = getattr(known.caches, name)[there]
    # A cache is valid for the picture's size or the metadata's.
    index.caches.is_verified[here[(index.given_sizes[here] != known.given_sizes[there]).any(axis=1)]] = False
    index.placed_for, index.sizes_chosen_for, index.vae_digest = known.placed_for, known.sizes_chosen_for, known.vae_digest
    same_text = [i for i, (new, row) in enumerate(pairs) if index.texts.raw(new) == known.texts.raw(row)]
    index.num_tokens[here[same_text]] = known.num_tokens[there[same_text]]


def _stamps(index: Index, config: Config) -> Stamps:
    """Of each picture's file, or of the cache where there is no picture; zeros where there is none."""
    paths = [image or cache for image, cache in zip(index.image_paths.raws(), index.cache_paths.raws(), strict=True)]
    return np.concatenate(_in_threads(file_stamps, paths, config) or [np.zeros((0, 4), np.int64)])


def _choose_sizes_anew(index: Index, config: Config) -> None:
    """Of caches with several sizes another one may be the right one now: they are read again."""
    chosen_for = (config.resolution, config.bucket_reso_step)
    if index.sizes_chosen_for != chosen_for:
        index.caches.forget(index.caches.has_several)
        index.stamps[index.caches.has_several & (index.image_paths.lengths == 0)] = 0
        index.sizes_chosen_for = chosen_for


def _check_files(
    index: Index, stamps: Stamps, config: Config, known_sizes: Mapping[str, KnownSize], warn: Warn, problems: list[Problem]
) -> bool:
    """Read the headers of all files that are not as they were; whether there were any."""
    differs = (stamps != index.stamps).any(axis=1) | ~stamps.any(axis=1)
    has_image = index.image_paths.lengths > 0
    differs |= has_image & (index.image_sizes.prod(axis=1, dtype=np.int64) > config.max_image_pixels)
    rows = np.flatnonzero(differs)

    def check(row: int) -> _Size | Problem:
        path = index.source_path(row)
        return _check_image(path, stamps[row], known_sizes.get(path), config) if has_image[row] else _check_cache(index, row, path, config)

    answers = _in_threads(lambda piece: list(map(check, piece)), rows.tolist(), config)
    for row, answer in zip(rows.tolist(), chain.from_iterable(answers), strict=True):
        index.is_bad[row] = isinstance(answer, Problem)
        index.is_decoded[row] = False
        index.stamps[row] = 0 if isinstance(answer, Problem) else stamps[row]
        if has_image[row]:
            index.caches.forget(row)
        if not isinstance(answer, Problem):
            index.image_sizes[row] = answer
        elif answer.kind == "image" and config.bad_images == "skip":
            warn(f"left out, {answer.message}")
        else:
            problems.append(answer)
    return len(rows) > 0


_Size = tuple[int, int]


def _check_image(path: str, stamp: NDArray[np.int64] | None, known: KnownSize | None, config: Config) -> _Size | Problem:
    """Upright (w, h) of a picture."""
    is_small = known is not None and math.prod(known.size) <= config.max_image_pixels
    if known and is_small and stamp is not None and (known.num_bytes, known.mtime_ns) == (stamp[0], stamp[1]):
        return known.size
    try:
        return image_header(path, config.max_image_pixels)
    except BadImage as problem:
        return Problem("image", str(problem), path=path)


def _check_cache(index: Index, row: int, path: str, config: Config) -> _Size | Problem:
    """Original (w, h) that a cache without a picture stores, else of its bucket; the bucket is noted."""
    try:
        header = read_header(path, None, (config.resolution, config.bucket_reso_step))
    except BadCache as problem:
        return Problem("cache", str(problem), path=path)
    index.bucket_sizes[row] = header.bucket
    index.caches.forget(row)
    index.caches.crops[row] = header.crop
    index.caches.has_several[row] = header.has_several
    return header.original_size or header.bucket


def _count(index: Index) -> dict[str, dict[str, int]]:
    return count_tags(index.artists, index.characters, index.styles, index.qualities, index.folders, ~index.is_bad)


def _place(index: Index, config: Config, everything: bool) -> None:
    """Choose the bucket of every picture; that of a cache alone is given."""
    placed_for = (config.resolution, config.bucket_reso_step)
    if everything or index.placed_for != placed_for:
        rows = np.flatnonzero((index.image_paths.lengths > 0) & ~index.is_bad)
        index.bucket_sizes[rows] = choose_buckets(index.image_sizes[rows].astype(np.int64), *placed_for)
        index.placed_for = placed_for


def _ask_repeats(index: Index, plugins: Plugins) -> bool:
    """The repeats of each datum that can be trained, from `count_repeats`; whether they are not those known."""
    if plugins.only_default_answers("num_repeats_getter", "count_repeats"):  # a million calls of a constant
        repeats = (~index.is_bad).astype(np.int32)
    else:
        repeats = np.zeros(len(index), np.int32)
        with plugins.many_calls("num_repeats_getter"):
            for row in np.flatnonzero(~index.is_bad).tolist():
                repeats[row] = plugins.hooks.count_repeats(img_key=index.key(row), img_md=index.metadata(row), counter=index.counter)
    if np.array_equal(repeats, index.num_repeats):
        return False
    index.num_repeats = repeats
    return True


def _tell(index: Index, warn: Warn) -> None:
    if index.missing:
        warn(f"{len(index.missing)} pictures of metadata_files have no file and are left out: {listed(index.missing)}")
    if index.run_folders:
        warn(f"{len(index.run_folders)} folders hold a training run and are no data: {listed(index.run_folders)}")


def warn_of_silent_data(index: Index, warn: Warn) -> None:
    """Tell once how many of the data that are trained have no text; to be asked when no bad picture is among them any more."""
    silent = np.flatnonzero((index.num_repeats > 0) & ~index.has_caption & ~index.has_description)
    if len(silent):
        names = listed([index.key(row) for row in silent[:_LISTED].tolist()], _LISTED, len(silent))
        warn(f"{len(silent)} pictures have neither caption nor description and are trained on the empty text: {names}")


def nothing_to_train(config: Config, index: Index) -> Problem:
    """That no datum is left, with the counts per reason."""
    summary = index.summary
    reasons = {
        "without a file": summary.missing,
        "bad": summary.bad,
        "dropped by num_repeats_getter (0 repeats)": summary.dropped,
        "names left out because they start with a dot": summary.hidden,
        "folders left out because they hold a training run": summary.run_folders,
    }
    counts = "; ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    where = listed(config.metadata_files or config.image_dirs)
    found = f"no picture is left to train: {len(index) + summary.missing} found in {where}"
    return Problem("data", found + (f" ({counts})" if counts else ""))


def _in_threads(work: Callable[[Sequence[_Item]], _Answer], items: Sequence[_Item], config: Config) -> list[_Answer]:
    """`work` on pieces of the items, in order; by `max_dataset_n_workers` threads, which helps where the system is waited for."""
    pieces = [items[start : start + _FILES_AT_ONCE] for start in range(0, len(items), _FILES_AT_ONCE)]
    num_threads = max(1, min(config.max_dataset_n_workers, (os.cpu_count() or 1) - 1))
    if num_threads == 1:
        return list(map(work, pieces))
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(work, pieces))
