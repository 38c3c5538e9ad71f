"""The data set as columns: what there is, how large it is, which bucket it goes to and how often it is trained."""

from __future__ import annotations

import json
import os
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sdxl_train.data.buckets import Placement, choose_buckets, cover
from sdxl_train.data.counter import Counter, count_tags
from sdxl_train.data.image_headers import BadImage
from sdxl_train.data.image_info import ImageInfo
from sdxl_train.data.images import image_header
from sdxl_train.data.metadata import complete, problem_list
from sdxl_train.data.sources import Candidates, find_candidates
from sdxl_train.errors import DataError
from sdxl_train.model.architecture import PX_PER_LATENT
from sdxl_train.text_display import listed

if TYPE_CHECKING:
    from sdxl_train.hookspecs import HookSpecs
    from sdxl_train.keys import Config

_HEADERS_AT_ONCE = 256  # files of one piece of work for a thread


@dataclass(frozen=True)
class Summary:
    """What became of the data, in pictures.

    Attributes:
        images: that are trained.
        captioned, described, without_text: of these, how many have a tag caption, a description, neither.
        missing: in the metadata, but without a file.
        dropped: by a repeat count of 0.
        bad: left out as `bad_images = "skip"` says.
        hidden, run_folders: names left out of the search because they start with a dot, and folders that hold a training run.
        samples_per_epoch: the sum of the repeats.
        buckets: pictures of each bucket (w, h), sorted.
    """

    images: int = 0
    captioned: int = 0
    described: int = 0
    without_text: int = 0
    missing: int = 0
    dropped: int = 0
    bad: int = 0
    hidden: int = 0
    run_folders: int = 0
    samples_per_epoch: int = 0
    buckets: dict[tuple[int, int], int] = field(default_factory=dict)


class TextColumn:
    """N texts in one buffer: 8 bytes each beside their own."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._buffer = b"".join(encoded)
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        start = self._ends[i - 1] if i > 0 else 0
        return self._buffer[start : self._ends[i]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class Index:
    """The N pictures to train, sorted by key. Metadata and `ImageInfo` are made afresh when they are asked for.

    Attributes:
        image_sizes: upright (w, h) of each picture in px. [N, 2] int32
        original_sizes: the metadata's `original_size`, else the picture's. [N, 2] int32
        bucket_sizes: (w, h) of its bucket in px. [N, 2] int32
        num_repeats: how often it is trained per epoch, >= 1; 0 once it is left out. [N] int32
        has_caption, has_description: whether it has that text. [N] bool
        counter: as in `count_repeats`, with the aliases `character` and `style`; pictures dropped by 0 repeats are counted too.
        summary: what became of the data.
    """

    def __init__(
        self,
        keys: Iterable[str],
        image_paths: Iterable[str],
        rows: Iterable[str],
        image_sizes: np.ndarray,
        original_sizes: np.ndarray,
        bucket_sizes: np.ndarray,
        num_repeats: np.ndarray,
        has_caption: np.ndarray,
        has_description: np.ndarray,
        counter: Counter,
        left_out: Summary,
    ) -> None:
        """The arguments are the columns; `left_out` counts what is not in them."""
        self._keys = TextColumn(keys)
        self._image_paths = TextColumn(image_paths)
        self._rows = TextColumn(rows)  # the fields as JSON
        self.image_sizes = image_sizes.astype(np.int32)
        self.original_sizes = original_sizes.astype(np.int32)
        self.bucket_sizes = bucket_sizes.astype(np.int32)
        self.num_repeats = num_repeats.astype(np.int32)
        self.has_caption = has_caption
        self.has_description = has_description
        self.counter = counter
        self.summary = self._count(left_out)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        """The file name without extension."""
        return self._keys[i]

    def image_path(self, i: int) -> str:
        """The picture's file, as found."""
        return self._image_paths[i]

    def metadata(self, i: int) -> dict[str, Any]:
        """Every documented field (None when absent) and all further ones, as a fresh dict."""
        return complete(json.loads(self._rows[i]), self._image_paths[i])

    def placement(self, i: int) -> Placement:
        """How the picture is resized and cropped for its bucket."""
        return cover(_pair(self.image_sizes[i]), _pair(self.bucket_sizes[i]))

    def info(self, i: int) -> ImageInfo:
        """What caption hooks are told; a fresh view each time."""
        metadata = self.metadata(i)
        width, height = _pair(self.bucket_sizes[i])
        return ImageInfo(
            key=self._keys[i],
            metadata=metadata,
            caption=metadata["caption"],
            description=metadata["description"],
            image_size=_pair(self.image_sizes[i]),
            original_size=_pair(self.original_sizes[i]),
            latent_size=(width // PX_PER_LATENT, height // PX_PER_LATENT),
            bucket_size=(width, height),
            num_repeats=int(self.num_repeats[i]),
            npz_path=None,
            image_path=self._image_paths[i],
        )

    def leave_out(self, data: Sequence[int]) -> None:
        """Train these pictures no longer, since they proved bad when they were decoded. Their rows stay, with 0 repeats.

        Raises:
            DataError: no picture is left.
        """
        self.num_repeats[list(data)] = 0
        self.summary = self._count(replace(self.summary, bad=self.summary.bad + len(data)))
        if not self.summary.images:
            raise DataError(f"no picture is left to train: all {len(self)} are bad")

    def _count(self, left_out: Summary) -> Summary:
        """The counts of `left_out`, completed by those of the pictures that are trained."""
        trained = self.num_repeats > 0
        texts = np.stack([self.has_caption, self.has_description])[:, trained]
        return replace(
            left_out,
            images=int(trained.sum()),
            captioned=int(texts[0].sum()),
            described=int(texts[1].sum()),
            without_text=int((~texts.any(axis=0)).sum()),
            samples_per_epoch=int(self.num_repeats.sum(dtype=np.int64)),
            buckets=dict(sorted(Tally(map(tuple, self.bucket_sizes[trained].tolist())).items())),
        )


def build_index(config: Config, hooks: HookSpecs, warn: Callable[[str], None]) -> Index:
    """Find the data, check every picture's header, count, ask `count_repeats` once for each picture, and place the pictures.

    Args:
        hooks: `count_repeats` is asked.
        warn: is told once about missing pictures, folders of runs, pictures without text, and about each picture skipped.
    Raises:
        DataError: all problems of the first stage that finds any: metadata and texts, names, pictures; or nothing is left to train.
        PluginError: from `count_repeats`.
    """
    found = find_candidates(config)
    sizes, bad = _check_headers(found.image_paths, config)
    if bad and config.bad_images == "error":
        heading = 'bad pictures; mend or remove them, or set bad_images = "skip" to train without them'
        raise DataError(problem_list(heading, list(bad.values())))
    if found.missing:
        warn(f"{len(found.missing)} pictures of metadata_files have no file and are left out: {listed(found.missing)}")
    if found.run_folders:
        warn(f"{len(found.run_folders)} folders hold a training run and are no data: {listed(found.run_folders)}")
    for problem in bad.values():
        warn(f"left out, {problem}")

    good = [i for i in range(len(found.keys)) if i not in bad]
    counter = count_tags(_metadata(found, i) for i in good)
    repeats = np.array([hooks.count_repeats(img_key=found.keys[i], img_md=_metadata(found, i), counter=counter) for i in good], np.int64)
    kept = [i for i, count in zip(good, repeats, strict=True) if count > 0]
    left_out = Summary(
        missing=len(found.missing), dropped=len(good) - len(kept), bad=len(bad), hidden=found.hidden, run_folders=len(found.run_folders)
    )
    if not kept:
        raise DataError(_nothing_to_train(config, found, left_out))
    return _assemble(config, found, kept, sizes[kept], repeats[repeats > 0], counter, left_out, warn)


def _assemble(
    config: Config,
    found: Candidates,
    kept: list[int],
    sizes: np.ndarray,
    repeats: np.ndarray,
    counter: Counter,
    left_out: Summary,
    warn: Callable[[str], None],
) -> Index:
    """The index of the pictures `kept`, of which `sizes` and `repeats` are given."""
    original_sizes = sizes.copy()
    has_caption, has_description = np.zeros(len(kept), bool), np.zeros(len(kept), bool)
    for row, i in enumerate(kept):
        metadata = _metadata(found, i)
        original_sizes[row] = metadata["original_size"] or sizes[row]
        has_caption[row], has_description[row] = bool(metadata["caption"]), bool(metadata["description"])
    buckets = choose_buckets(sizes, config.resolution, config.bucket_reso_step)
    keys, paths, rows = ([column[i] for i in kept] for column in (found.keys, found.image_paths, found.rows))
    without_text = [keys[row] for row in np.flatnonzero(~has_caption & ~has_description)]
    if without_text:
        warn(f"{len(without_text)} pictures have neither caption nor description and are trained on the empty text: {listed(without_text)}")
    return Index(keys, paths, rows, sizes, original_sizes, buckets, repeats, has_caption, has_description, counter, left_out)


def _metadata(found: Candidates, i: int) -> dict[str, Any]:
    return complete(json.loads(found.rows[i]), found.image_paths[i])


def _check_headers(paths: list[str], config: Config) -> tuple[np.ndarray, dict[int, str]]:
    """Upright (w, h) of each picture [N, 2], and the problem of each bad one by its position, in order."""

    def check(start: int) -> list[tuple[int, int] | str]:
        answers: list[tuple[int, int] | str] = []
        for path in paths[start : start + _HEADERS_AT_ONCE]:
            try:
                answers.append(image_header(path, config.max_image_pixels))
            except BadImage as problem:
                answers.append(str(problem))
        return answers

    starts = range(0, len(paths), _HEADERS_AT_ONCE)
    num_threads = max(1, min(config.max_dataset_n_workers, (os.cpu_count() or 1) - 1))
    if num_threads == 1:
        checked = [answer for start in starts for answer in check(start)]
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            checked = [answer for answers in pool.map(check, starts) for answer in answers]
    bad = {i: answer for i, answer in enumerate(checked) if isinstance(answer, str)}
    sizes = [(0, 0) if isinstance(answer, str) else answer for answer in checked]
    return np.array(sizes, np.int64).reshape(-1, 2), bad


def _nothing_to_train(config: Config, found: Candidates, left_out: Summary) -> str:
    where = listed(config.metadata_files or config.image_dirs)
    reasons = {
        "without a file": left_out.missing,
        "bad": left_out.bad,
        "dropped by num_repeats_getter (0 repeats)": left_out.dropped,
        "names left out because they start with a dot": left_out.hidden,
        "folders left out because they hold a training run": left_out.run_folders,
    }
    counts = "; ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    return f"no picture is left to train: {len(found.keys) + left_out.missing} found in {where}" + (f" ({counts})" if counts else "")


def _pair(row: np.ndarray) -> tuple[int, int]:
    width, height = row.tolist()
    return width, height
