"""Adafactor over stacks of equal shapes. Imported by the plugin when it is built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl_train_plugins.shape_stacks import end_to_end, split
from sdxl_train_plugins.stacked_optimizer import StackedOptimizer
from sdxl_train_plugins.stacked_update import State, as_tensor


@dataclass(frozen=True)
class AdafactorCoefficients:
    """
    Attributes:
        rate: the learning rate, without the scale of a parameter. 0-dim float32.
        old_share: of the old running mean of squares that is kept, 1 - step ** decay_rate. 0-dim float32.
        new_share: step ** decay_rate. 0-dim float32.
    """

    rate: Tensor
    old_share: Tensor
    new_share: Tensor


def relative_rate(step: Tensor, warmup_init: bool) -> Tensor:
    """The rate that Adafactor gives itself: min(1 / sqrt(step), 1e-2), with `warmup_init` min(1 / sqrt(step), 1e-6 * step)."""
    rate = step.rsqrt()
    return torch.minimum(rate, step * 1e-6) if warmup_init else rate.clamp(max=1e-2)


def root_mean_square(stack: Tensor) -> Tensor:
    """Of each row of a stack. [n, ...] -> [n]."""
    rows = stack.view(len(stack), -1)
    return torch.linalg.vector_norm(rows, dim=1) / math.sqrt(rows.shape[1])


def factored_update(grads: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Gradients over the root of their mean square, which is the product of its means over rows and columns over the mean of both.

    Args:
        grads: [n, R, C].
        row, column: means of the squares over the last and over the last but one dimension. [n, R], [n, C].
    """
    row = row / row.mean(-1, keepdim=True)
    return (row.rsqrt_().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)).mul_(grads)


class StackedAdafactor(StackedOptimizer):
    """The Adafactor of transformers (Shazeer & Stern 2018, arXiv:1804.04235) over stacks of equal shapes, with one difference:

    a convolution kernel [O, I, kh, kw] is factored as the matrix [O, I * kh * kw], not as O * I matrices of 3x3. For SDXL's U-Net that
    is 18 MiB of state in place of 932. The state is float32. See `StackedOptimizer` for what else it does.

    Args:
        params: as torch's.
        lr: None where `relative_step` is on, and only there.
    Raises:
        ValueError: a rate is missing, or given beside `relative_step`; `warmup_init` without `relative_step`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        stochastic_rounding: bool = True,
    ) -> None:
        if warmup_init and not relative_step:
            raise ValueError("warmup_init = true needs relative_step = true")
        super().__init__(
            params,
            {
                "lr": lr,
                "eps": tuple(eps),
                "clip_threshold": clip_threshold,
                "decay_rate": decay_rate,
                "beta1": beta1,
                "weight_decay": weight_decay,
                "scale_parameter": scale_parameter,
                "relative_step": relative_step,
                "warmup_init": warmup_init,
                "stochastic_rounding": stochastic_rounding,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises a ValueError unless the group has a rate from exactly one side."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if (group["lr"] is None) is not group["relative_step"]:
            raise ValueError(f"Adafactor sets its own rate (relative_step) or gets one (lr): lr is {group['lr']}")

    def rates(self) -> list[float | Tensor]:
        """The rate of each group's last step: `lr`, or what Adafactor set itself (0-dim float32), without the scale of a parameter."""
        groups = zip(self._made_groups(), self.param_groups, strict=True)
        return [relative_rate(made.step, group["warmup_init"]) if group["relative_step"] else group["lr"] for made, group in groups]

    def _get_lr(self, param_group: dict[str, Any], param_state: dict[str, Any]) -> float | Tensor:
        """What transformers' AdafactorSchedule asks: the rate of the last step, with the scale of that parameter."""
        rate = relative_rate(param_state["step"], param_group["warmup_init"]) if param_group["relative_step"] else param_group["lr"]
        return rate * param_state["RMS"].clamp(min=param_group["eps"][1]) if param_group["scale_parameter"] else rate

    def _state_shapes(self, group: dict[str, Any], parameter: Tensor) -> dict[str, tuple[Sequence[int], torch.dtype]]:
        rows = self._row_shape(parameter.shape)
        shapes: dict[str, Sequence[int]] = {}
        if group["beta1"] is not None:
            shapes["exp_avg"] = parameter.shape
        if len(rows) == 2:
            shapes |= {"exp_avg_sq_row": rows[:1], "exp_avg_sq_col": rows[1:]}
        else:
            shapes["exp_avg_sq"] = parameter.shape
        if group["scale_parameter"]:
            shapes["RMS"] = ()
        return {name: (shape, torch.float32) for name, shape in shapes.items()}

    def _row_shape(self, shape: torch.Size) -> Sequence[int]:
        return (shape[0], shape[1:].numel()) if len(shape) >= 2 else (shape.numel(),)

    def _coefficients(self, group: dict[str, Any], step: Tensor) -> AdafactorCoefficients:
        new_share = step ** group["decay_rate"]
        rate = relative_rate(step, group["warmup_init"]) if group["relative_step"] else as_tensor(group["lr"], step.device)
        return AdafactorCoefficients(rate, 1 - new_share, new_share)

    def _updated(
        self,
        weights: Tensor,
        grads: Tensor,
        state: State,
        shapes: list[tuple[int, ...]],
        group: dict[str, Any],
        coefficients: AdafactorCoefficients,
    ) -> tuple[Tensor, State]:
        new = _mean_squares(grads, state, shapes, group["eps"][0], coefficients)
        updates = _unclipped(grads, new, shapes)
        rate = coefficients.rate
        if group["scale_parameter"]:
            new["RMS"] = torch.cat([root_mean_square(stack) for stack in split(weights, shapes)])
            rate = rate * new["RMS"].clamp(min=group["eps"][1])  # [tensors]
        clip = torch.cat([root_mean_square(update) for update in updates]).div_(group["clip_threshold"]).clamp_(min=1.0)
        for update, factor in zip(updates, _one_a_row(rate / clip, shapes), strict=True):
            update.mul_(factor)
        update = end_to_end(updates)
        if group["beta1"] is not None:
            update = new["exp_avg"] = state["exp_avg"] * group["beta1"] + update * (1 - group["beta1"])
        if group["weight_decay"] != 0:
            weights = weights * _each(1 - rate * group["weight_decay"], shapes)
        return weights - update, new


def _mean_squares(grads: Tensor, state: State, shapes: list[tuple[int, ...]], eps: float, coefficients: AdafactorCoefficients) -> State:
    """The new running means of squares: of matrices over rows and columns, of vectors each by itself."""
    stacks = split(grads * grads + eps, shapes)
    means = {
        "exp_avg_sq_row": [stack.mean(-1) for stack in stacks if stack.dim() == 3],
        "exp_avg_sq_col": [stack.mean(-2) for stack in stacks if stack.dim() == 3],
        "exp_avg_sq": [stack for stack in stacks if stack.dim() == 2],
    }
    del stacks
    old, share = coefficients.old_share, coefficients.new_share
    return {name: state[name] * old + end_to_end(found).mul_(share) for name, found in means.items() if found}


def _unclipped(grads: Tensor, means: State, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Gradients over the roots of the running means. [n, ...] of each stack."""
    matrices = [shape for shape in shapes if len(shape) == 3]
    vectors = [shape for shape in shapes if len(shape) == 2]
    rows = iter(split(means["exp_avg_sq_row"], [(n, r) for n, r, _ in matrices]) if matrices else ())
    columns = iter(split(means["exp_avg_sq_col"], [(n, c) for n, _, c in matrices]) if matrices else ())
    roots = iter(split(means["exp_avg_sq"].rsqrt(), vectors) if vectors else ())
    return [
        factored_update(stack, next(rows), next(columns)) if stack.dim() == 3 else next(roots) * stack for stack in split(grads, shapes)
    ]


def _one_a_row(factors: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """One number a tensor, shaped to multiply the rows of each stack. [tensors] -> [n, 1, ...] each."""
    return split(factors, [(shape[0], *[1] * (len(shape) - 1)) for shape in shapes])


def _each(factors: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    """One number a tensor as one an element; a number for all as it is. [tensors] -> [elements]; [] -> []."""
    if factors.dim() == 0:
        return factors
    return end_to_end([rows.expand(shape).contiguous() for rows, shape in zip(_one_a_row(factors, shapes), shapes, strict=True)])
