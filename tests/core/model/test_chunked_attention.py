"""Attention in chunks: the values and gradients of plain attention, without its memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdxl_train.model import chunked_attention as module
from sdxl_train.model.chunked_attention import chunked_attention

SCALE = 0.3


def drawn(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=draw).to(dtype).requires_grad_() for size in sizes]


def in_float64(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    scores = SCALE * query @ key.mT
    weights = scores.sub(scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2)


def both(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """What chunks give and what float64 gives: the output, then the three gradients."""
    batch, queries, keys, heads, channels = sizes
    inputs = drawn((batch, queries, heads, channels), (batch, keys, heads, channels), (batch, keys, heads, channels), dtype=dtype)
    direction = torch.randn(batch, queries, heads, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = [chunked_attention(*inputs, SCALE), in_float64(*inputs)]
    grads = [torch.autograd.grad(output, inputs, direction.to(output.dtype)) for output in outputs]
    assert outputs[0].dtype == dtype
    yield outputs[0], outputs[1]
    yield from zip(*grads, strict=True)


# Whole chunks, parts of chunks, one query, fewer keys than a chunk.
SIZES = [(2, 16, 24, 3, 8), (1, 13, 9, 2, 4), (2, 1, 17, 1, 8), (1, 40, 3, 2, 8)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_are_those_of_whole_attention(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(module, "KEY_CHUNK", 8)
    monkeypatch.setattr(module, "MAX_SCORES", 8 * 5 * sizes[0] * sizes[3])  # five queries at once
    for ours, exact in both(sizes, dtype):
        assert torch.allclose(ours.double(), exact.double(), atol=tolerance, rtol=tolerance)


def test_real_chunk_sizes_agree_too() -> None:
    for ours, exact in both((1, 300, 2100, 1, 8), torch.float32):
        assert torch.allclose(ours.double(), exact.double(), atol=1e-5, rtol=1e-5)


def test_scores_that_overflow_an_exponential_are_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEY_CHUNK", 2)
    query, key = torch.full((1, 1, 1, 1), 100.0), torch.tensor([-9.0, 8, 9, -9, 10, 7]).reshape(1, 6, 1, 1)
    value = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert chunked_attention(query, key, value, 1.0).item() == pytest.approx(4.0)  # exp(1000) would be infinite
    assert chunked_attention(query, key, value, 0.01).item() == pytest.approx(
        sum(i * math.exp(k) for i, k in enumerate([-9, 8, 9, -9, 10, 7])) / sum(math.exp(k) for k in [-9, 8, 9, -9, 10, 7]), rel=1e-5
    )


def test_autocast_does_not_round_float32_attention() -> None:
    query, key, value = drawn((1, 20, 2, 8), (1, 20, 2, 8), (1, 20, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        inside = chunked_attention(query, key, value, SCALE)
    assert torch.equal(inside, chunked_attention(query, key, value, SCALE))


class Largest(TorchDispatchMode):
    """The most bytes that one tensor had, and the saved ones' sum."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.num_bytes = max(self.num_bytes, tensor.numel() * tensor.element_size())
        return made


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    found: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def test_no_tensor_of_all_scores_is_made_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEY_CHUNK", 32)
    monkeypatch.setattr(module, "MAX_SCORES", 32 * 16 * 4)
    inputs = drawn((2, 512, 2, 8), (2, 512, 2, 8), (2, 512, 2, 8))
    largest_argument = inputs[0].numel() * 4
    all_scores = 2 * 2 * 512 * 512 * 4
    with Largest() as largest, saved_bytes() as saved:
        chunked_attention(*inputs, SCALE).sum().backward()
    assert largest.num_bytes == largest_argument < all_scores / 50
    assert sum(saved) == 4 * largest_argument + 2 * 512 * 2 * 4  # the arguments, the output, one number a query and head
