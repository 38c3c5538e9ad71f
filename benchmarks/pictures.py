"""C8: JPEGs decoded and resized into their buckets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
_ROUNDS = 5  # over the pictures


def decode_lines(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """C8."""
    for width, height in _SIZES:
        yield from _lines_of((width // sizes.shrink, height // sizes.shrink), RESOLUTION // sizes.shrink, folder, sizes)


def _lines_of(size: tuple[int, int], resolution: int, folder: Path, sizes: Sizes) -> Iterator[Line]:
    paths = photographs(folder, size, sizes.photographs)
    ours, plain = interleaved(
        sizes.repeats, lambda: in_own_process(decode, paths, resolution), lambda: in_own_process(decode_in_full, paths, resolution)
    )
    what, alone = f"decode and resize of a JPEG {size[0]}x{size[1]}", "Pillow: full decode, the same resize"
    yield Line("C8", what, len(paths), median(ours), "CPU ms", median(plain), alone, Goal(0.55, of_ratio=True))
    psnr = in_own_process(least_psnr, paths, resolution)
    yield Line("C8", "the worst of them against the full decode", len(paths), psnr, "dB", goal=Goal(45, at_least=True))


# ---- each of these runs in a process of its own: how often memory has to be mapped anew depends on what was decoded before ----


def decode(paths: list[Path], resolution: int) -> float:
    """CPU ms a picture of ours, as for the next picture of many."""
    from sdxl_train.data.images import load_pixels

    return _cpu_ms(partial(load_pixels, max_pixels=_MAX_PIXELS), list(map(str, paths)), resolution)


def decode_in_full(paths: list[Path], resolution: int) -> float:
    """The same of a full decode."""
    return _cpu_ms(_full_decode, list(map(str, paths)), resolution)


def least_psnr(paths: list[Path], resolution: int) -> float:
    """The worst picture of ours against the full decode, in dB."""
    from sdxl_train.data.images import load_pixels

    placement = _placement(str(paths[0]), resolution)
    return min(_psnr(load_pixels(str(path), placement, _MAX_PIXELS), _full_decode(str(path), placement)) for path in paths)


def _cpu_ms(work: Callable[[str, Placement], object], paths: list[str], resolution: int) -> float:
    placement = _placement(paths[0], resolution)
    for path in paths:
        work(path, placement)
    return 1000 * median(cpu_s(partial(work, path, placement)) for _ in range(_ROUNDS) for path in paths)


def _placement(path: str, resolution: int) -> Placement:
    from sdxl_train.data.buckets import place

    with Image.open(path) as image:
        return place(image.size, resolution, STEP)


def _full_decode(path: str, placement: Placement) -> NDArray[np.uint8]:
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
