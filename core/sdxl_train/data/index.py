"""The data set as columns: what there is, how large it is, which bucket it goes to and how often it is trained."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.buckets import Placement, cover
from sdxl_train.data.columns import NameColumn, TextColumn
from sdxl_train.data.counter import Counter
from sdxl_train.data.image_info import ImageInfo
from sdxl_train.data.latent_file import cache_path_of, sd_scripts_cache_name
from sdxl_train.data.metadata import complete
from sdxl_train.data.rows import Rows
from sdxl_train.errors import DataError
from sdxl_train.model.architecture import PX_PER_LATENT

Ints = NDArray[np.int32]
Stamps = NDArray[np.int64]  # [N, 4]: size in bytes, mtime_ns, ctime_ns and inode of a file; zeros where nothing is known of it

# Where the cache of a picture is: named after it beside it, at its `cache_paths`, or beside it with its size in the name.
BESIDE, ELSEWHERE, SIZED = 0, 1, 2


@dataclass(frozen=True)
class Summary:
    """What became of the data, in data (not samples).

    Attributes:
        images: that are trained, caches without a picture included.
        captioned, described, without_text: of these, how many have a tag caption, a description, neither.
        missing: in the metadata, but without a file.
        dropped: by a repeat count of 0.
        bad: left out as `bad_images = "skip"` says.
        hidden, run_folders: names left out of the search because they start with a dot, and folders that hold a training run.
        samples_per_epoch: the sum of the repeats.
        buckets: data of each bucket (w, h), sorted.
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


@dataclass
class Caches:
    """What was found out about the cache of each datum, when its stamp was as it is here.

    Attributes:
        stamps: of the file; zeros where there is none, or none that can be used. [N, 4]
        is_verified: its values and its origin were checked, not only its header. [N] bool
        offsets: where the latents and the flipped latents start in it, in bytes; -1 where they cannot be read as they lie. [N, 2] int64
        sizes: the bucket (w, h) in px that its latents fill. [N, 2]
        crops: left, top, and left once flipped, that it stores, in px of the resized picture. [N, 3]
        has_flipped: whether it holds flipped latents. [N] bool
        has_several: whether it holds latents of several sizes, of which one was chosen. [N] bool
        places: BESIDE, ELSEWHERE or SIZED. [N] int8
    """

    stamps: Stamps
    is_verified: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    sizes: Ints
    crops: Ints
    has_flipped: NDArray[np.bool_]
    has_several: NDArray[np.bool_]
    places: NDArray[np.int8]

    @classmethod
    def unknown(cls, count: int) -> Caches:
        """Nothing is known of any."""
        return cls(
            np.zeros((count, 4), np.int64),
            np.zeros(count, bool),
            np.full((count, 2), -1, np.int64),
            np.zeros((count, 2), np.int32),
            np.zeros((count, 3), np.int32),
            np.zeros(count, bool),
            np.zeros(count, bool),
            np.zeros(count, np.int8),
        )

    def forget(self, rows: Any) -> None:
        """These have changed."""
        self.stamps[rows] = 0
        self.is_verified[rows] = False


@dataclass
class Index:
    """N data, sorted by key. Metadata and `ImageInfo` are made afresh when they are asked for.

    Attributes:
        keys: file names without extension.
        image_paths: the picture's file, as found; '' where there is only a cache.
        cache_paths: the cache's file, where it is not found by the picture's name; else ''.
        texts: the fields of the metadata as JSON.
        artists, characters, styles, qualities: these fields, as given.
        folders: the name of the picture's folder.
        image_sizes: upright (w, h) of each picture in px; of a cache alone the stored original size, else its bucket. [N, 2]
        given_sizes: the metadata's `original_size`, else 0. [N, 2]
        original_sizes: the metadata's `original_size`, else the picture's. [N, 2]
        bucket_sizes: (w, h) of its bucket in px. [N, 2]
        num_repeats: how often it is trained per epoch; 0 where it is left out. [N]
        has_caption, has_description: whether it has that text. [N] bool
        max_tokens: how many tokens its longer text can have at most. [N]
        num_tokens: how many it has; -1 where nobody has counted. [N]
        stamps: of the picture (of the cache, where there is none) when its header was read. [N, 4]
        is_bad: it cannot be trained. [N] bool
        is_decoded: the whole picture was decoded once, without a fault. [N] bool
        caches: what is known of the caches.
        shares: the first row whose picture has its cache at the same path; -1 where no other has. [N] See `sharing`.
        counter: as in `count_repeats`, with its aliases; data dropped by 0 repeats are counted too.
        missing: keys of the metadata that have no file.
        hidden, run_folders: see `Summary`.
        placed_for: `resolution` and `bucket_reso_step` by which buckets were chosen.
        sizes_chosen_for: `resolution` and `bucket_reso_step` by which one of several sizes in a cache was chosen.
        vae_digest: of the VAE whose caches were found valid.
        uses_caches: caches were checked in this run, and latents come from them.
    """

    keys: TextColumn
    image_paths: TextColumn
    cache_paths: TextColumn
    texts: TextColumn
    artists: NameColumn
    characters: NameColumn
    styles: NameColumn
    qualities: NameColumn
    folders: NameColumn
    image_sizes: Ints
    given_sizes: Ints
    original_sizes: Ints
    bucket_sizes: Ints
    num_repeats: Ints
    has_caption: NDArray[np.bool_]
    has_description: NDArray[np.bool_]
    max_tokens: Ints
    num_tokens: Ints
    stamps: Stamps
    is_bad: NDArray[np.bool_]
    is_decoded: NDArray[np.bool_]
    caches: Caches
    shares: Ints
    counter: Counter = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    hidden: int = 0
    run_folders: list[str] = field(default_factory=list)
    placed_for: tuple[int, int] = (0, 0)
    sizes_chosen_for: tuple[int, int] = (0, 0)
    vae_digest: str = ""
    uses_caches: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, i: int) -> str:
        """The file name without extension."""
        return self.keys[i]

    def image_path(self, i: int) -> str | None:
        """The picture's file, as found; None where there is only a cache."""
        return self.image_paths[i] or None

    def cache_path(self, i: int) -> str:
        """Where the datum's cache is, or will be."""
        return self.cache_path_at(i, int(self.caches.places[i]))

    def cache_path_at(self, i: int, place: int) -> str:
        """Where the datum's cache is if it is BESIDE, ELSEWHERE or SIZED; without a picture, where it was found."""
        image, elsewhere = self.image_paths[i], self.cache_paths[i]
        if not image or (elsewhere and place == ELSEWHERE):
            return elsewhere
        if place == SIZED:
            return sd_scripts_cache_name(os.path.splitext(image)[0], pair(self.image_sizes[i]))
        return cache_path_of(image)

    def source_path(self, i: int) -> str:
        """The picture, or the cache where there is none: what to name in a message."""
        return self.image_paths[i] or self.cache_paths[i]

    def metadata(self, i: int) -> dict[str, Any]:
        """Every documented field (None when absent) and all further ones, as a fresh dict."""
        return complete(json.loads(self.texts[i]), self.image_path(i))

    def rows(self) -> Rows:
        """What captions and metadata say, as it was read; where no metadata name pictures."""
        return Rows(
            keys=self.keys,
            image_paths=TextColumn.of("" for _ in range(len(self))),
            texts=self.texts,
            original_sizes=self.given_sizes,
            has_caption=self.has_caption,
            has_description=self.has_description,
            max_tokens=self.max_tokens,
            artists=self.artists,
            characters=self.characters,
            styles=self.styles,
            qualities=self.qualities,
        )

    def placement(self, i: int) -> Placement:
        """How the picture is resized and cropped for its bucket."""
        return cover(pair(self.image_sizes[i]), pair(self.bucket_sizes[i]))

    def crop(self, i: int, flipped: bool) -> tuple[int, int]:
        """(left, top) in px of what was cut off the resized (and then flipped) picture; of a cache, as it says."""
        if self._has_cache(i):
            left, top, flipped_left = self.caches.crops[i].tolist()
            return (flipped_left if flipped else left), top
        placement = self.placement(i)
        return placement.flipped_crop if flipped else placement.crop

    def info(self, i: int) -> ImageInfo:
        """What caption hooks are told; a fresh view each time."""
        metadata = self.metadata(i)
        width, height = pair(self.bucket_sizes[i])
        return ImageInfo(
            key=self.keys[i],
            metadata=metadata,
            caption=metadata["caption"],
            description=metadata["description"],
            image_size=pair(self.image_sizes[i]),
            original_size=pair(self.original_sizes[i]),
            latent_size=(width // PX_PER_LATENT, height // PX_PER_LATENT),
            bucket_size=(width, height),
            num_repeats=int(self.num_repeats[i]),
            npz_path=self.cache_path(i) if self._has_cache(i) else None,
            image_path=self.image_path(i),
        )

    def _has_cache(self, i: int) -> bool:
        return not self.image_paths[i] or (self.uses_caches and bool(self.caches.stamps[i].any()))

    def leave_out(self, data: Sequence[int]) -> None:
        """Train these no longer, since they proved bad when they were decoded. Their rows stay, with 0 repeats.

        Raises:
            DataError: nothing is left.
        """
        rows = list(data)
        self.num_repeats[rows] = 0
        self.is_bad[rows] = True
        self.stamps[rows] = 0  # so that the next start looks at them again
        if not self.num_repeats.any():
            raise DataError(f"no picture is left to train: all {len(self)} are bad")

    @property
    def summary(self) -> Summary:
        """What became of the data."""
        trained = self.num_repeats > 0
        texts = np.stack([self.has_caption, self.has_description])[:, trained]
        packed = self.bucket_sizes[trained].astype(np.int64) @ np.array([1 << 32, 1])  # much faster than np.unique over pairs
        buckets, counts = np.unique(packed, return_counts=True)
        return Summary(
            images=int(trained.sum()),
            captioned=int(texts[0].sum()),
            described=int(texts[1].sum()),
            without_text=int((~texts.any(axis=0)).sum()),
            missing=len(self.missing),
            dropped=int((~trained & ~self.is_bad).sum()),
            bad=int(self.is_bad.sum()),
            hidden=self.hidden,
            run_folders=len(self.run_folders),
            samples_per_epoch=int(self.num_repeats.sum(dtype=np.int64)),
            buckets={divmod(bucket, 1 << 32): count for bucket, count in zip(buckets.tolist(), counts.tolist(), strict=True)},
        )


def pair(row: NDArray[Any]) -> tuple[int, int]:
    """(w, h) as plain ints."""
    width, height = row.tolist()
    return width, height
