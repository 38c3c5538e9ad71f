"""Every random draw as a function of the seed and its place in the run; no generator has a state that outlives its place.

A sample's place is (seed, epoch, datum key, occurrence); each purpose has its own stream. Streams are Philox counters keyed with 128 bits
of BLAKE2b, so a hundred million samples share none (torch's CPU generator keeps only 32 bits of its seed).
"""

from __future__ import annotations

import random as python_random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

from sdxl_train.devices import to_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def stream_key(*place: object) -> bytes:
    """128 bits that stand for a place: equal places give equal bits, on every machine. Parts are ints, strings or bytes."""
    digest = blake2b(digest_size=16)
    for part in place:
        raw = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


class _Key(ISeedSequence):
    """The key of a Philox stream. `Philox(key=...)` gives the same stream, but asks the system for entropy first, and drops it."""

    def __init__(self, key: bytes) -> None:
        self._key = np.frombuffer(key, np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        assert n_words == len(self._key) and dtype is self._key.dtype.type, "Philox has keys of two 64-bit words"
        return self._key


def generator(*place: object) -> np.random.Generator:
    """A numpy generator at the start of the stream of a place."""
    return np.random.Generator(np.random.Philox(_Key(stream_key(*place))))  # pyright: ignore[reportArgumentType]


def sample_place(seed: int, epoch: int, datum_key: str, occurrence: int) -> bytes:
    """The place of one sample: epoch counted from 1, occurrence 0 ... num_repeats - 1."""
    return stream_key("sample", seed, epoch, datum_key, occurrence)


class FetchRandom(python_random.Random):
    """The `random.Random` of one fetch, as caption hooks get it."""

    def __init__(self, *place: object) -> None:
        self.place = stream_key(*place)
        super().__init__(int.from_bytes(self.place, "little"))

    def stream(self, name: str) -> FetchRandom:
        """An independent stream of this fetch; equal names give equal streams."""
        return FetchRandom(self.place, "stream", name)


class StepRandom:
    """The draws of a step hook: row i of every tensor comes from the stream of sample i.

    Args:
        places: the place of each sample (`sample_place`), B of them.
        name: the stream, such as the hook's name.
        device: where the tensors go; they are always drawn on the CPU.
    """

    def __init__(self, places: Sequence[bytes], name: str, device: torch.device | str = "cpu") -> None:
        self._places = places
        self._name = name
        self._device = device
        self._generators: list[np.random.Generator | None] = [None] * len(places)
        self._streams: dict[str, StepRandom] = {}

    @property
    def place(self) -> bytes:
        """Stands for the samples and the stream together."""
        return stream_key(self._name, *self._places)

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1). [B, *shape] float32."""
        return self._rows(shape, np.float32, lambda g: g.standard_normal(shape, np.float32))

    def uniform(self, *shape: int) -> Tensor:
        """U[0, 1). [B, *shape] float32."""
        return self._rows(shape, np.float32, lambda g: g.random(shape, np.float32))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform on the integers of [low, high). [B, *shape] int64."""
        return self._rows(shape, np.int64, lambda g: g.integers(low, high, shape, np.int64))

    def beta(self, alpha: float, beta: float, *shape: int) -> Tensor:
        """The beta distribution on [0, 1], alpha and beta > 0. [B, *shape] float32; near an end it may round to the end itself."""
        return self._rows(shape, np.float32, lambda g: g.beta(alpha, beta, shape))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> StepRandom:
        """Sample i alone (B = 1), going on in the same stream that row i of this object uses."""
        one = StepRandom([self._places[i]], self._name, self._device)
        one._generators = [self._generator(i)]
        return one

    def cpu(self) -> StepRandom:
        """The same stream with its tensors on the CPU, for draws that the host needs (sizes, say); it goes on where this one is."""
        here = StepRandom(self._places, self._name)
        here._generators = self._generators
        return here

    def stream(self, name: str) -> StepRandom:
        """An independent stream; asking again for a name goes on in the same stream."""
        if name not in self._streams:
            self._streams[name] = StepRandom(self._places, f"{self._name}/{name}", self._device)
        return self._streams[name]

    def _generator(self, i: int) -> np.random.Generator:
        made = self._generators[i]
        if made is None:
            made = self._generators[i] = generator(self._places[i], self._name)
        return made

    def _rows(self, shape: tuple[int, ...], dtype: type, draw) -> Tensor:
        import torch

        rows = np.empty((len(self._places), *shape), dtype)
        for i in range(len(self._places)):
            rows[i] = draw(self._generator(i))
        return to_device(torch.from_numpy(rows), self._device)


def seed_global_generators(*place: object) -> None:
    """Seed `random` and `numpy.random` from a place, for a plain plugin function that uses them; their draws have nothing in common."""
    key = stream_key(*place)
    python_random.seed(int.from_bytes(key, "little"))
    np.random.seed(np.frombuffer(stream_key(key, "numpy"), np.uint32))


@contextmanager
def kept_global_generators() -> Iterator[None]:
    """Put `random` and `numpy.random` back afterwards. That takes 100 us, ten times as long as to seed them."""
    python_state, numpy_state = python_random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        python_random.setstate(python_state)
        np.random.set_state(numpy_state)
