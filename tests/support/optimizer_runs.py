"""Parameters of many shapes, and steps over them with reproducible gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Vectors, matrices and kernels, some of one shape, of sizes that do not fill vector registers evenly.
SHAPES = [(7,), (13, 5), (13, 5), (9,), (4, 3, 3, 3), (33, 17), (6, 6, 1, 1), (1,), (), (13, 5), (7,), (4, 3, 3, 3), (257, 129), (9,)]


def parameters(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES, flat_kernels: bool = False, channels_last: bool = False
) -> list[torch.nn.Parameter]:
    """Equal values at each call; `flat_kernels`: [O, I, kh, kw] as [O, I * kh * kw]."""
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
    if flat_kernels:
        values = [value.flatten(1) if value.dim() > 2 else value for value in values]
    if channels_last:
        values = [value.to(memory_format=torch.channels_last) if value.dim() == 4 else value for value in values]
    return [torch.nn.Parameter(value) for value in values]


def set_gradients(weights: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    """The gradients of a step, from 1: normal, and of another size in each tensor. They lie in memory as the weights do."""
    random = torch.Generator().manual_seed(step)
    for i, weight in enumerate(weights):
        value = torch.randn(weight.numel(), generator=random).view(weight.shape) * scale / (i + 1)
        weight.grad = torch.empty_like(weight).copy_(value)


def run(optimizer: Any, steps: Sequence[int], scale: float = 1.0) -> list[Tensor]:
    """Make these steps; the weights afterwards."""
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        set_gradients(weights, step, scale)
        optimizer.step_key = step.to_bytes(16, "little")
        optimizer.step()
    return [weight.detach() for weight in weights]


def run_one_by_one(optimizer: Any, steps: Sequence[int]) -> list[Tensor]:
    """The same steps parameter by parameter, the last first, with no other gradient there."""
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        set_gradients(weights, step)
        gradients = [weight.grad for weight in weights]
        optimizer.zero_grad(set_to_none=True)
        optimizer.step_key = step.to_bytes(16, "little")
        optimizer.begin_step()
        for weight, gradient in reversed(list(zip(weights, gradients, strict=True))):
            weight.grad = gradient
            optimizer.step_parameter(weight)
            weight.grad = None
    return [weight.detach() for weight in weights]


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all weights and all state, in a fixed order."""
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [tensor for weight in weights for _, tensor in sorted(optimizer.state[weight].items())]
    return [tensor.detach().clone() for tensor in [*weights, *state]]


def are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Bit for bit, dtypes included; -0 is not 0."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return len(first) == len(second) and all(
        one.dtype is other.dtype and torch.equal(bits(one), bits(other)) for one, other in zip(first, second, strict=True)
    )
