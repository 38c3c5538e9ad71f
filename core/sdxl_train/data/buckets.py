"""Which bucket a picture goes to, how it is resized to cover it, and what is cropped. Integer arithmetic; sizes are (w, h) in px."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

Size = tuple[int, int]
Sizes = np.ndarray[Any, np.dtype[np.int64]]  # [N, 2] of (w, h)


@dataclass(frozen=True)
class Placement:
    """How a picture fills its bucket: resized to `resized`, then a window of `bucket` is cut out at `crop`. All in px.

    Attributes:
        bucket: (w, h).
        resized: (w, h), each side at least the bucket's; the picture's shape is kept.
        crop: (left, top) of the window in the resized picture.
    """

    bucket: Size
    resized: Size
    crop: tuple[int, int]

    @property
    def flipped_crop(self) -> tuple[int, int]:
        """(left, top) of the same window once the resized picture is mirrored: what was cut off on the right is now on the left."""
        return self.resized[0] - self.bucket[0] - self.crop[0], self.crop[1]


def bucket_list(resolution: int, step: int) -> list[Size]:
    """All buckets of area <= resolution^2 with sides that are multiples of `step` px between resolution / 2 and 2 resolution; sorted."""
    lowest = max(step, _floor(resolution // 2, step))
    highest = _floor(2 * resolution, step)
    square = _floor(resolution, step)
    buckets = {(square, square)}
    for width in range(lowest, highest + 1, step):
        height = min(highest, _floor(resolution * resolution // width, step))
        if height >= lowest:
            buckets |= {(width, height), (height, width)}
    return sorted(buckets)


def place(image_size: Size, resolution: int, step: int) -> Placement:
    """Where a picture of `image_size` goes. See `choose_buckets` and `cover`."""
    width, height = choose_buckets(np.array([image_size], np.int64), resolution, step)[0].tolist()
    return cover(image_size, (width, height))


def cover(image_size: Size, bucket: Size) -> Placement:
    """The smallest size of the picture's shape that covers the bucket, and the centred window."""
    (width, height), (bucket_width, bucket_height) = image_size, bucket
    if bucket_width * height >= bucket_height * width:
        resized = bucket_width, max(bucket_height, (2 * height * bucket_width + width) // (2 * width))
    else:
        resized = max(bucket_width, (2 * width * bucket_height + height) // (2 * height)), bucket_height
    return Placement(bucket, resized, ((resized[0] - bucket_width) // 2, (resized[1] - bucket_height) // 2))


def choose_buckets(image_sizes: Sizes, resolution: int, step: int) -> Sizes:
    """The bucket of each picture. [N, 2] (w, h) -> [N, 2] (w, h), int64.

    It is the one of `bucket_list` with the nearest aspect ratio; a picture that would have to be enlarged for it gets a bucket of its own.
    """
    buckets = _nearest(image_sizes, resolution, step)
    enlarged = (buckets > image_sizes).any(axis=1)
    buckets[enlarged] = _own(image_sizes[enlarged], resolution, step)
    return buckets


@lru_cache(maxsize=8)
def _ranked(resolution: int, step: int) -> tuple[Sizes, np.ndarray, np.ndarray]:
    """The buckets by aspect ratio, one for each ratio: sizes [K, 2], log ratios [K], and ranks [K] that decide ties (lower wins)."""
    by_rank = sorted(bucket_list(resolution, step), key=lambda size: (-size[0] * size[1], size))
    best: dict[float, tuple[int, Size]] = {}
    for rank, size in enumerate(by_rank):
        best.setdefault(math.log(size[0] / size[1]), (rank, size))
    logs = sorted(best)
    sizes = np.array([best[log][1] for log in logs], np.int64)
    return sizes, np.array(logs), np.array([best[log][0] for log in logs])


def _nearest(image_sizes: Sizes, resolution: int, step: int) -> Sizes:
    """argmin over the list of |ln(bucket ratio) - ln(picture ratio)|, rounded to 12 decimals; ties: larger area, then smaller (w, h)."""
    sizes, logs, ranks = _ranked(resolution, step)
    # math.log, since numpy's may differ from it in the last place. Only the two neighbours in ratio can be nearest.
    wanted = np.fromiter(map(math.log, (image_sizes[:, 0] / image_sizes[:, 1]).tolist()), np.float64, len(image_sizes))
    above = np.minimum(np.searchsorted(logs, wanted), len(logs) - 1)
    below = np.maximum(above - 1, 0)
    far_above, far_below = (np.round(np.abs(logs[side] - wanted), 12) for side in (above, below))
    take_below = (far_below < far_above) | ((far_below == far_above) & (ranks[below] < ranks[above]))
    return sizes[np.where(take_below, below, above)]


def _own(image_sizes: Sizes, resolution: int, step: int) -> Sizes:
    """A bucket of the picture's own size, or of its shape at the area cap, with sides floored to the step (at least one step)."""
    cap = resolution * resolution
    width, height = image_sizes[:, 0], image_sizes[:, 1]
    too_large = width * height > cap
    capped = np.stack([_isqrt(cap * width // height), _isqrt(cap * height // width)], axis=1)
    fitted = np.where(too_large[:, None], capped, image_sizes)
    sides = np.maximum(step, fitted // step * step)  # [N, 2]
    shorter = sides.min(axis=1)
    longer = np.where(sides.prod(axis=1) > cap, cap // shorter // step * step, sides.max(axis=1))
    return np.where(sides == shorter[:, None], shorter[:, None], longer[:, None])


def _floor(value: int, step: int) -> int:
    return value // step * step


def _isqrt(values: np.ndarray) -> np.ndarray:
    """The integer square root, exact: float64's is off by at most one here."""
    root = np.sqrt(values.astype(np.float64)).astype(np.int64)
    root -= root * root > values
    root += (root + 1) ** 2 <= values
    return root
