"""C8: JPEGs decoded and resized into their buckets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from made_data import photographs
from measuring import Goal, Line, Sizes, cpu_s, in_own_process, interleaved

if TYPE_CHECKING:
    from sdxl_train.data.buckets import Placement
from numpy.typing import NDArray
from PIL import Image

_SIZES = ((2048, 2048), (3000, 2000), (4000, 3000))
_MAX_PIXELS = 200_000_000
RESOLUTION, STEP = 1024, 32  # as by default


def decode_lines(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """C8."""
    for full in _SIZES:
        size = full[0] // sizes.shrink, full[1] // sizes.shrink
        paths = photographs(folder, size, sizes.photographs)
        ours, plain, psnr = in_own_process(decode, paths, RESOLUTION // sizes.shrink, 2 * sizes.repeats - 1)
        what = f"decode and resize of a JPEG {size[0]}x{size[1]}"
        yield Line("C8", what, len(paths), ours, "CPU ms", plain, "Pillow: full decode, the same resize", Goal(0.55, of_ratio=True))
        yield Line("C8", "the worst of them against the full decode", len(paths), psnr, "dB", goal=Goal(45, at_least=True))


def decode(paths: list[Path], resolution: int, repeats: int) -> tuple[float, float, float]:
    """CPU ms a picture of ours and of a full decode (medians), and the least PSNR between both. Runs in a process of its own."""
    from sdxl_train.data.buckets import place
    from sdxl_train.data.images import load_pixels

    with Image.open(paths[0]) as first:
        placement = place(first.size, resolution, STEP)
    least = min(_psnr(load_pixels(str(path), placement, _MAX_PIXELS), _full_decode(path, placement)) for path in paths)
    taken: list[list[float]] = []
    for path in paths:
        load, full = partial(load_pixels, str(path), placement, _MAX_PIXELS), partial(_full_decode, path, placement)
        taken.append([1000 * median(times) for times in interleaved(repeats, partial(cpu_s, load), partial(cpu_s, full))])
    ours, plain = np.mean(taken, axis=0).tolist()
    return ours, plain, least


def _full_decode(path: Path, placement: Placement) -> NDArray[np.uint8]:
    """Every pixel decoded, then the resize of the product: blocks of 2, 4, ... px averaged, the rest by Hamming's filter."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    (width, height), (left, top), (resized_width, resized_height) = placement.bucket, placement.crop, placement.resized
    across, down = rgb.width / resized_width, rgb.height / resized_height
    window = left * across, top * down, (left + width) * across, (top + height) * down
    factor = min((window[2] - window[0]) / width, (window[3] - window[1]) / height)
    blocks = 1 << (int(factor).bit_length() - 1)
    reduced = rgb.reduce(blocks)
    right, bottom = min(window[2] / blocks, reduced.width), min(window[3] / blocks, reduced.height)
    return np.array(reduced.resize((width, height), Image.Resampling.HAMMING, (window[0] / blocks, window[1] / blocks, right, bottom)))


def _psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    squares = (one.astype(np.float64) - other) ** 2
    return float(10 * np.log10(255**2 / max(1e-9, squares.mean())))
