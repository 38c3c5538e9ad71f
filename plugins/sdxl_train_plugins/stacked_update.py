"""The arithmetic of one update of stacked parameters, from tensors to tensors alone, so that it can be compiled as a whole.

Imported by the optimizers when they are built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdxl_train_plugins.shape_stacks import end_to_end
from sdxl_train_plugins.stochastic_rounding import next_words, random_words, rounded_to_bfloat16

State = dict[str, Tensor]
# (weights, grads, state, shapes, group, coefficients) -> new weights and state; see `StackedOptimizer._updated`.
Rule = Callable[[Tensor, Tensor, State, list[tuple[int, ...]], dict[str, Any], Any], tuple[Tensor, State]]


def update_values(
    rule: Rule,
    weights: Tensor,
    grads: Tensor,
    state: State,
    shapes: list[tuple[int, ...]],
    group: dict[str, Any],
    coefficients: Any,
    keys: Sequence[Tensor] | None,
    grad_scale: Tensor | None,
    skip: Tensor | None,
) -> Tensor:
    """Change `state` in place, and return the new weights, rounded to the dtype in which they are kept.

    Args:
        rule: the optimizer's own formula, in float32.
        weights, grads: stacks end to end. [elements].
        state: that of the stacks, by name, likewise.
        shapes: [n, *row shape] of each stack.
        keys: for random bits, [n, 2] int32 of each stack; None: round to nearest.
        grad_scale: gradients are divided by it; None counts as 1. 0-dim float32.
        skip: where it is true, nothing changes; None counts as false. 0-dim bool.
    """
    scaled = grads.float() if grad_scale is None else grads.float() / grad_scale
    new_weights, new_state = rule(weights.float(), scaled, state, shapes, group, coefficients)
    del scaled
    words = None
    if keys is not None:
        words = end_to_end([random_words(of_stack, math.prod(shape[1:])) for of_stack, shape in zip(keys, shapes, strict=True)])
    new_weights = _kept(weights, new_weights, words, skip)
    for name, new in new_state.items():
        words = None if words is None else next_words(words)
        state[name].copy_(_kept(state[name], new, words, skip))
    return new_weights


def _kept(old: Tensor, new: Tensor, words: Tensor | None, skip: Tensor | None) -> Tensor:
    """float32 values in the dtype of the old ones; or these where the step is skipped. `words`: random bits for bfloat16."""
    new = new.to(old.dtype) if words is None or old.dtype != torch.bfloat16 else rounded_to_bfloat16(new, words.view(new.shape))
    return new if skip is None else torch.where(skip, old, new)


def as_tensor(number: float | Tensor, device: torch.device) -> Tensor:
    """0-dim float32: compiled code depends on the values of numbers, but not on those of tensors."""
    return number if isinstance(number, Tensor) else torch.full((), number, device=device)
