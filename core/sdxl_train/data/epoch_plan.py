"""The batches of an epoch and their order: a pure function of the index, the seed, the epoch and the batch size, equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

from sdxl_train.randomness import generator

if TYPE_CHECKING:
    from sdxl_train.data.index import Index


@dataclass(frozen=True)
class BatchPlan:
    """One micro-batch: which data, all of one bucket.

    Attributes:
        epoch: counted from 1.
        bucket: (w, h) in px.
        data: (position in the index, occurrence in this epoch, 0 ... num_repeats - 1) of each sample.
    """

    epoch: int
    bucket: tuple[int, int]
    data: tuple[tuple[int, int], ...]


class EpochPlan(Sequence[BatchPlan]):
    """The batches of an epoch in order, held as arrays; a `BatchPlan` is made when it is asked for. A slice is a plan again."""

    def __init__(self, epoch: int, buckets: np.ndarray, samples: np.ndarray, spans: np.ndarray) -> None:
        """
        Args:
            buckets: (w, h) of each batch. [M, 2]
            samples: (position in the index, occurrence), grouped by batch. [total, 2]
            spans: first and past-the-last row of `samples` of each batch. [M, 2]
        """
        self.epoch = epoch
        self._buckets = buckets
        self._samples = samples
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, i: int) -> BatchPlan: ...
    @overload
    def __getitem__(self, i: slice) -> EpochPlan: ...
    def __getitem__(self, i: int | slice) -> BatchPlan | EpochPlan:
        if isinstance(i, slice):
            return EpochPlan(self.epoch, self._buckets[i], self._samples, self._spans[i])
        start, end = self._spans[i]
        width, height = self._buckets[i].tolist()
        return BatchPlan(self.epoch, (width, height), tuple((datum, occurrence) for datum, occurrence in self._samples[start:end].tolist()))

    def __iter__(self) -> Iterator[BatchPlan]:
        return (self[i] for i in range(len(self)))


def epoch_plan(index: Index, seed: int, epoch: int, batch_size: int) -> EpochPlan:
    """Shuffle each bucket's samples, cut them into batches (the last of a bucket may be smaller), shuffle all batches.

    Each datum is in it `num_repeats` times. `epoch` counts from 1.
    """
    random = generator("order", seed, epoch)
    data = np.repeat(np.arange(len(index)), index.num_repeats)
    first = np.cumsum(index.num_repeats, dtype=np.int64) - index.num_repeats
    occurrences = np.arange(len(data)) - np.repeat(first, index.num_repeats)
    sizes, bucket_of = _buckets(index)
    shuffled = random.permutation(len(data))
    grouped = shuffled[np.argsort(bucket_of[data[shuffled]], kind="stable")]  # by bucket, shuffled within each
    samples = np.stack([data[grouped], occurrences[grouped]], axis=1)

    counts = _samples_per_bucket(index)
    ends = np.cumsum(counts)
    batches = -(-counts // batch_size)
    batch_bucket = np.repeat(np.arange(len(counts)), batches)
    place_in_bucket = np.arange(len(batch_bucket)) - np.repeat(np.cumsum(batches) - batches, batches)
    starts = (ends - counts)[batch_bucket] + place_in_bucket * batch_size
    spans = np.stack([starts, np.minimum(starts + batch_size, ends[batch_bucket])], axis=1)
    order = random.permutation(len(spans))
    return EpochPlan(epoch, sizes[batch_bucket[order]], samples, spans[order])


def num_batches(index: Index, batch_size: int) -> int:
    """Micro-batches of an epoch over all ranks together."""
    return int((-(-_samples_per_bucket(index) // batch_size)).sum())


def steps_per_epoch(num_batches: int, accumulation: int, num_processes: int) -> int:
    """Optimizer steps of an epoch: one for every accumulation * num_processes micro-batches, the last of which may hold fewer."""
    return -(-num_batches // (accumulation * num_processes))


def _buckets(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """The distinct buckets [K, 2], sorted, and the number of each datum's. [N]"""
    packed = index.bucket_sizes[:, 0].astype(np.int64) << 32 | index.bucket_sizes[:, 1]
    distinct, bucket_of = np.unique(packed, return_inverse=True)
    return np.stack([distinct >> 32, distinct & 0xFFFFFFFF], axis=1), bucket_of


def _samples_per_bucket(index: Index) -> np.ndarray:
    """Sum of the repeats in each bucket, in the order of `_buckets`. [K] int64"""
    sizes, bucket_of = _buckets(index)
    return np.bincount(bucket_of, weights=index.num_repeats, minlength=len(sizes)).astype(np.int64)
