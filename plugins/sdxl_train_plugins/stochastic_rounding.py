"""Rounding float32 to bfloat16 up or down with the probability that keeps the mean: small updates of bfloat16 weights are not lost.

The random bits are a hash of (name of the tensor, step key, place in the tensor) and of nothing else, so it does not matter which
tensors are updated together, when, or in which process. Imported by the optimizers when they are built.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

# Multipliers of Chris Wellons' lowbias32 (github.com/skeeto/hash-prospector, public domain), as signed 32-bit integers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
# Makes further words of a word: 2**32 / golden ratio, odd (Knuth, The Art of Computer Programming, 6.4).
_NEXT = 0x9E3779B9 - 2**32


def name_keys(names: Sequence[str], device: torch.device) -> Tensor:
    """64 bits that stand for each name. [n, 2] int32."""
    digests = b"".join(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names)
    return torch.frombuffer(bytearray(digests), dtype=torch.int32).view(-1, 2).to(device)


def keys_of_step(keys: Tensor, step_key: bytes) -> Tensor:
    """The keys of the names in one step. No value is sent to the device but as an argument of its operations.

    Args:
        keys: from `name_keys`. [n, 2] int32.
        step_key: 16 bytes that stand for seed and step.
    Returns:
        [n, 2] int32.
    """
    words = [int.from_bytes(step_key[i : i + 4], "little", signed=True) for i in range(0, 16, 4)]
    first, second = keys.unbind(1)
    first = _mixed(_mixed(first ^ words[0]) + words[1])
    second = _mixed(_mixed(second ^ words[2]) + words[3])
    return torch.stack([first, second], 1)


def random_words(keys: Tensor, num_elements: int) -> Tensor:
    """32 random bits for each element of each tensor. [n, num_elements] int32.

    Args:
        keys: from `keys_of_step`. [n, 2] int32.
        num_elements: of each tensor; element i is the i-th in row-major order of the tensor's shape, whatever its strides.
    """
    place = torch.arange(num_elements, dtype=torch.int32, device=keys.device)
    words = place ^ keys[:, :1]  # [n, num_elements]
    words = (words ^ _shifted(words, 16)) * _FIRST + keys[:, 1:]
    words = (words ^ _shifted(words, 15)) * _SECOND
    return words ^ _shifted(words, 16)


def next_words(words: Tensor) -> Tensor:
    """Further random bits for the same elements."""
    return words * _NEXT


def rounded_to_bfloat16(values: Tensor, words: Tensor) -> Tensor:
    """Stochastic rounding: up with a probability of (value - lower neighbour) / (upper - lower). NaN, inf and exact values are kept.

    Args:
        values: float32.
        words: random bits, of which the upper 16 are used. int32, of the same shape.
    Returns:
        bfloat16, of the same shape.
    """
    # A bfloat16 is the upper half of a float32: what is added to the lower half carries over as often as that half is large.
    bits = (values.view(torch.int32) + _shifted(words, 16)) & -0x10000
    rounded = bits.view(torch.float32)
    # The carry would turn a NaN whose bits are all ones, as CUDA makes them, into a zero.
    return torch.where(values != values, values, rounded).to(torch.bfloat16)


def _mixed(words: Tensor) -> Tensor:
    words = (words ^ _shifted(words, 16)) * _FIRST
    words = (words ^ _shifted(words, 15)) * _SECOND
    return words ^ _shifted(words, 16)


def _shifted(words: Tensor, by: int) -> Tensor:
    """Logical shift to the right: int32 has only the one that copies the sign."""
    return (words >> by) & ((1 << (32 - by)) - 1)
