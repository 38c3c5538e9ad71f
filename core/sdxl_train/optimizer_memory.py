"""What optimizers keep beside the weights, by their names in `optimizer_type`. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FLOAT32, BFLOAT16 = 4, 2
STACK_ELEMENTS = 2**24  # AdaFactor and AdamW update stacks of tensors of up to so many numbers in all
# Weights, gradients, means, update and, for stochastic rounding, random bits of what is updated at once; measured by the tracker.
_FACTORED_UPDATE, _UPDATE, _ROUNDED_UPDATE = 25.0, 24.0, 38.0
_QUANTISED = 1 + 4 / 256  # bytes of a number in bitsandbytes: one, and a scale for 256 of them
_UNKNOWN = 8.0  # two running means in float32


@dataclass(frozen=True)
class OptimizerMemory:
    """
    Attributes:
        state: bytes for a tensor of a shape.
        update: bytes of a number while it is updated.
        stack: so many numbers are updated at once, or those of the largest tensor.
        is_known: False where `state` is assumed.
    """

    state: Callable[[Sequence[int]], float]
    update: float = 0.0
    stack: int = 0
    is_known: bool = True


def optimizer_memory(name: str, options: Mapping[str, Any], weight_bytes: int) -> OptimizerMemory:
    """
    Args:
        name: of `optimizer_type`, in any case of letters.
        options: those that were given; the others have their defaults.
        weight_bytes: of a number in the trained weights.
    """
    rounds = weight_bytes == BFLOAT16 and options.get("stochastic_rounding", True)
    name = name.lower()
    if name == "adafactor":
        mean = FLOAT32 if options.get("beta1") is not None else 0
        return OptimizerMemory(lambda shape: _factored(shape) + mean * math.prod(shape), _FACTORED_UPDATE, STACK_ELEMENTS)
    if name == "adamw":
        dtype = str(options.get("state_dtype") or ("bfloat16" if rounds else "float32"))
        of_one = BFLOAT16 if dtype.endswith(("bf16", "bfloat16")) else FLOAT32
        number = 3 if options.get("amsgrad") else 2
        if weight_bytes == of_one == FLOAT32:  # by torch's kernel, in place
            return _per_element(number * FLOAT32)
        return OptimizerMemory(lambda shape: number * of_one * math.prod(shape), _ROUNDED_UPDATE if rounds else _UPDATE, STACK_ELEMENTS)
    # Paged state lies in the memory of the host when the device's is short.
    known = {"adamw8bit": 2 * _QUANTISED, "pagedadamw8bit": 2 * _QUANTISED, "pagedadamw32bit": 2.0 * FLOAT32}
    known |= {"lion8bit": _QUANTISED, "pagedlion8bit": _QUANTISED, "sgdnesterov8bit": _QUANTISED}
    known |= {"lion": float(weight_bytes), "sgdnesterov": float(weight_bytes)}
    if name in known:
        return _per_element(known[name])
    return _per_element(_UNKNOWN, is_known=False)


def _per_element(of_one: float, is_known: bool = True) -> OptimizerMemory:
    return OptimizerMemory(lambda shape: of_one * math.prod(shape), is_known=is_known)


def _factored(shape: Sequence[int]) -> float:
    """A row and a column of the matrix [first dimension, all others]; a vector as it is."""
    return FLOAT32 * (shape[0] + math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape))
