"""Tensors of one shape, put together so that one operation serves them all. Imported by the optimizers when they are built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def stacks_of(parameters: Sequence[Tensor], max_elements: int) -> list[list[int]]:
    """Which of the parameters are stacked: lists of their positions, equal in shape, dtype and device, in order of first appearance.

    Args:
        max_elements: of one stack, so that the memory an update needs is bounded. A tensor with more of them is alone.
    """
    full: list[list[int]] = []
    open_stacks: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for place, parameter in enumerate(parameters):
        alike = (parameter.shape, parameter.dtype, parameter.device)
        stack = open_stacks.get(alike)
        if stack is None or (len(stack) + 1) * parameter.numel() > max_elements:
            stack = open_stacks[alike] = []
            full.append(stack)
        stack.append(place)
    return full


def end_to_end(stacks: Sequence[Tensor]) -> Tensor:
    """All elements one after the other; a view where one contiguous tensor is all there is. [elements]."""
    return torch.cat([stack.view(-1) for stack in stacks]) if len(stacks) > 1 else stacks[0].view(-1)


def split(elements: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The stacks that lie end to end, as views of these shapes."""
    parts = elements.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def gathered(tensors: Sequence[Any]) -> Tensor:
    """[n, *shape], contiguous whatever the strides of the tensors. A view where one contiguous tensor is all there is."""
    stack = torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)
    return stack.contiguous()  # torch stacks channels_last tensors in their own order


def scatter(stack: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write the rows of a stack, [n, any shape of as many elements], into the tensors."""
    rows = stack.view(len(tensors), *tensors[0].shape)
    if len(tensors) > 1:
        torch._foreach_copy_(list(tensors), list(rows.unbind(0)))  # pyright: ignore[reportPrivateImportUsage]
    else:
        tensors[0].copy_(rows[0])
