"""C7, C9: latents read from their cache files, and pictures made into them while a simulated encoder waits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
from made_data import photographs, plain_pictures, write_config
from measuring import Goal, Line, Sizes, in_own_process

if TYPE_CHECKING:
    from sdxl_train.config import Settings
    from sdxl_train.data.caching import PreparedLatents, VaeInUse
    from sdxl_train.data.index import Index
    from sdxl_train.data.latents import LatentStore

    _Work = Callable[[Index, Settings], object]

_BATCH = 16
_BUCKET_PX, _PHOTOGRAPH_PX = 1024, 2048  # latents of 4x128x128
_VAE_BATCH = 4
_WARM_UP = 10  # batches


def read_lines(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """C7."""
    ours, memcpy = in_own_process(read_batches, folder, sizes)
    npz = in_own_process(read_batches_by_numpy, folder, sizes)
    side = _BUCKET_PX // sizes.shrink // 8
    what = f"batch of {_BATCH} latents 4x{side}x{side} from the disk cache, out of {sizes.latents}"
    yield Line("C7", what, sizes.reads, ours, "CPU us", memcpy, "memcpy", Goal(2, of_ratio=True))
    yield Line("C7", "the same", sizes.reads, ours, "CPU us", npz, "np.load and np.stack")


def cache_lines(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """C9."""
    for name, relation in (("half as fast as", 2.0), ("as fast as", 1.0), ("twice as fast as", 0.5)):
        rate, decode, encode, serial = in_own_process(cache_pictures, folder, sizes, relation)
        what = f"caching, the encoder {name} decoding"
        limits = f"the lesser of decoding ({decode:.1f}) and encoding ({encode:.1f}) alone"
        yield Line("C9", what, sizes.pictures, rate, "pictures/s", min(decode, encode), limits, Goal(0.85, of_ratio=True, at_least=True))
        yield Line("C9", "the same", sizes.pictures, rate, "pictures/s", serial, "one after the other")


# ---- each of these runs in a process of its own ----


def read_batches(folder: Path, sizes: Sizes) -> tuple[float, float]:
    """Median CPU us of a batch of random latents: from cache files, and from memory.

    Nothing else is measured in this process: np.load gives memory back to the system, and whatever comes after it has to map it again.
    """
    store, paths = _caches(folder, sizes)
    in_memory = np.concatenate([store.read([datum], [False]).numpy() for datum in range(len(paths))])  # far more than processors cache

    def read(data: list[int]) -> np.ndarray:
        return store.read(data, [False] * len(data)).numpy()

    def copied(data: list[int]) -> np.ndarray:
        out = np.empty((len(data), *in_memory.shape[1:]), np.float32)
        for row, datum in enumerate(data):
            out[row] = in_memory[datum]
        return out

    for _ in range(_WARM_UP):
        assert np.array_equal(read([0, 1]), copied([0, 1]))
    choose = random.Random(0)
    taken: dict[Callable[[list[int]], np.ndarray], list[float]] = {read: [], copied: []}
    for number in range(sizes.reads):
        for work in (read, copied) if number % 2 else (copied, read):
            taken[work].append(_cpu_us(work, choose.choices(range(len(paths)), k=_BATCH)))
    return median(taken[read]), median(taken[copied])


def read_batches_by_numpy(folder: Path, sizes: Sizes) -> float:
    """Median CPU us of a batch of the same files, read as trainers do that know of no offset."""
    store, paths = _caches(folder, sizes)

    def read(data: list[int]) -> np.ndarray:
        return np.stack([_load_npz(paths[datum]) for datum in data])

    assert np.array_equal(store.read([0, 1], [False, False]).numpy(), read([0, 1]))
    choose = random.Random(0)
    return median(_cpu_us(read, choose.choices(range(len(paths)), k=_BATCH)) for _ in range(sizes.reads))


def _caches(folder: Path, sizes: Sizes) -> tuple[LatentStore, list[str]]:
    import torch

    torch.set_num_threads(1)
    side = _BUCKET_PX // sizes.shrink
    index, settings = _index(plain_pictures(folder, (side, side), sizes.latents), folder, side)
    return _prepare(index, settings, _vae(0)).store, [index.cache_path(datum) for datum in range(len(index))]


def _cpu_us(work: Callable[[list[int]], np.ndarray], data: list[int]) -> float:
    start = time.process_time_ns()
    work(data)
    return (time.process_time_ns() - start) / 1000


def _load_npz(path: str) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays["latents"]


def cache_pictures(folder: Path, sizes: Sizes, relation: float) -> tuple[float, float, float, float]:
    """Pictures/s (wall): the caching, decoding alone, encoding alone, all one after the other.

    Args:
        relation: seconds that the simulated encoder takes, as a share of what decoding alone takes.
    """
    import torch

    torch.set_num_threads(1)
    side, num_different = _PHOTOGRAPH_PX // sizes.shrink, min(8, sizes.pictures)
    paths = photographs(folder, (side, side), num_different, sizes.pictures // num_different)

    def seconds(work: _Work) -> float:
        """Wall seconds of some work on the pictures without caches."""
        for path in paths:
            path.with_suffix(".npz").unlink(missing_ok=True)
        index, settings = _index(paths[0].parent, folder, _BUCKET_PX // sizes.shrink)
        assert len(index) == len(paths)
        start = time.perf_counter()
        work(index, settings)
        return time.perf_counter() - start

    # Decoding first, for the encoder's time; its median is taken again with the others.
    encode_s = relation * median(seconds(_decode_alone) for _ in range(3)) / len(paths)
    vae = _vae(encode_s)
    works: tuple[_Work, ...] = (
        lambda index, settings: _prepare(index, settings, vae),
        _decode_alone,
        _encoding_alone(vae),
        lambda index, settings: _one_after_the_other(index, settings, vae),
    )
    rounds = [[seconds(work) for work in works] for _ in range(2 * sizes.repeats + 1)]
    cached, decode, encode, serial = (len(paths) / median(times) for times in zip(*rounds, strict=True))
    return cached, decode, encode, serial


def _decode_alone(index: Index, settings: Settings) -> None:
    from sdxl_train.data.encoding import Picture, decode_ahead

    for _, picture in decode_ahead(index, range(len(index)), settings.config.max_image_pixels, _VAE_BATCH):
        assert isinstance(picture, Picture)


def _encoding_alone(vae: VaeInUse) -> _Work:
    """Encodes decoded pictures, as many as there are data."""

    def encode(index: Index, settings: Settings) -> None:
        width, height = index.bucket_sizes[0].tolist()
        pixels = np.zeros((_VAE_BATCH, height, width, 3), np.uint8)
        for _ in range(0, len(index), _VAE_BATCH):
            _encode(vae, pixels)

    return encode


def _one_after_the_other(index: Index, settings: Settings, vae: VaeInUse) -> None:
    """Decode, encode, write: the loop that one would write first."""
    from sdxl_train.data.cache_writer import CacheWriter
    from sdxl_train.data.images import load_pixels_and_source
    from sdxl_train.data.sharing import SharedCaches

    shared = SharedCaches(index, range(len(index)), to_disk=True)
    writer = CacheWriter(index, settings.config.flip_aug, vae.digest, vae.precision, in_background=False, shared=shared)
    max_pixels = settings.config.max_image_pixels
    for first in range(0, len(index), _VAE_BATCH):
        data = list(range(first, min(first + _VAE_BATCH, len(index))))
        decoded = [load_pixels_and_source(index.image_paths[datum], index.placement(datum), max_pixels) for datum in data]
        writer.write(data, False, _encode(vae, np.stack([pixels for pixels, _ in decoded])), [source for _, source in decoded])
    writer.finish()
    assert writer.num_written == len(index)


def _encode(vae: VaeInUse, pixels: np.ndarray) -> np.ndarray:
    """Latents of pixels [B, h, w, 3], as the product's encoder calls the VAE."""
    import torch

    from sdxl_train.model.sdxl import encode_latents

    noise = torch.zeros(len(pixels), 4, pixels.shape[1] // 8, pixels.shape[2] // 8)
    return encode_latents(vae.module, torch.from_numpy(pixels).permute(0, 3, 1, 2), noise, scaled=False).numpy()


def _vae(seconds: float) -> VaeInUse:
    """A VAE that waits, like one on a GPU, so many seconds a picture without holding Python's lock; its latents are pixels.

    It takes uint8: see `_on_device`.
    """
    import torch

    from sdxl_train.data.caching import VaeInUse

    def encode(pixels: torch.Tensor) -> object:
        time.sleep(seconds * len(pixels))
        mean = pixels[:, :1, ::8, ::8].expand(-1, 4, -1, -1).float()
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.full_like(mean, -30.0)))

    module: Any = SimpleNamespace(encode=encode, dtype=torch.uint8)
    return VaeInUse(module, torch.device("cpu"), bytes(16), "float32")


def _on_device() -> AbstractContextManager[object]:
    """Leave out what a GPU does beside the VAE: on the CPU, turning pixels into floats would take a core from decoding."""
    from sdxl_train.data import encoding

    return patch.object(encoding, "as_vae_input", lambda pixels: pixels)


def _index(images: Path, folder: Path, resolution: int) -> tuple[Index, Settings]:
    from sdxl_train.config import load_settings
    from sdxl_train.data.indexing import build_index

    toml = folder / f"{images.name}.toml"
    write_config(toml, [images], resolution=resolution, flip_aug=False, vae_batch_size=_VAE_BATCH)
    settings, problems = load_settings(toml, needs=("data",)), []
    index = build_index(settings.config, settings.plugins, None, lambda text: None, problems).index
    assert not problems, problems[:3]
    return index, settings


def _prepare(index: Index, settings: Settings, vae: VaeInUse) -> PreparedLatents:
    from sdxl_train.data.caching import Work, prepare_latents

    work = Work(lambda text: None, lambda: None, lambda label, total: lambda done, total: None)
    with _on_device():
        return prepare_latents(index, vae, settings.config, work, to_disk=True, in_memory=False)
