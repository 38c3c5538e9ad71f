"""Adafactor over stacks of equal shapes. Imported by the plugin when it is built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl_train_plugins.stacked_optimizer import StackedOptimizer, State


@dataclass(frozen=True)
class AdafactorCoefficients:
    """
    Attributes:
        rate: the learning rate, without the scale of a parameter. A number, or 0-dim float32.
        old_share: of the old running mean of squares that is kept, 1 - step ** decay_rate. 0-dim float32.
        new_share: step ** decay_rate. 0-dim float32.
    """

    rate: float | Tensor
    old_share: Tensor
    new_share: Tensor


def relative_rate(step: Tensor, warmup_init: bool) -> Tensor:
    """The rate that Adafactor gives itself: min(1 / sqrt(step), 1e-2), with `warmup_init` min(1 / sqrt(step), 1e-6 * step)."""
    rate = step.rsqrt()
    return torch.minimum(rate, step * 1e-6) if warmup_init else rate.clamp(max=1e-2)


def root_mean_square(rows: Tensor) -> Tensor:
    """Of each row of a stack. [n, ...] -> [n], summed dimension by dimension."""
    norm = rows
    while norm.dim() > 1:
        norm = torch.linalg.vector_norm(norm, dim=-1)
    return norm / math.sqrt(rows[0].numel())


def factored_update(
    grads: Tensor, row: Tensor, column: Tensor, eps: float, coefficients: AdafactorCoefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients over the root of their running mean square, of which only the means over rows and columns are kept.

    Args:
        grads: [n, R, C].
        row, column: running means of grads ** 2 + eps over the last and over the last but one dimension. [n, R], [n, C].
    Returns:
        The update before clipping, and the new `row` and `column`.
    """
    squares = grads * grads + eps
    row = row * coefficients.old_share + squares.mean(-1) * coefficients.new_share
    column = column * coefficients.old_share + squares.mean(-2) * coefficients.new_share
    del squares
    update = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)  # [n, R, C]
    return update.mul_(grads), row, column


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
        rate = relative_rate(step, group["warmup_init"]) if group["relative_step"] else group["lr"]
        return AdafactorCoefficients(rate, 1 - new_share, new_share)

    def _updated(
        self, weights: Tensor, grads: Tensor, state: State, group: dict[str, Any], coefficients: AdafactorCoefficients
    ) -> tuple[Tensor, State]:
        new: State = {}
        if "exp_avg_sq_row" in state:
            update, new["exp_avg_sq_row"], new["exp_avg_sq_col"] = factored_update(
                grads, state["exp_avg_sq_row"], state["exp_avg_sq_col"], group["eps"][0], coefficients
            )
        else:
            squares = state["exp_avg_sq"].view(grads.shape) * coefficients.old_share
            squares = squares + (grads * grads + group["eps"][0]) * coefficients.new_share
            update, new["exp_avg_sq"] = squares.rsqrt() * grads, squares

        one_a_row = (-1, *[1] * (weights.dim() - 1))
        rate = coefficients.rate
        if group["scale_parameter"]:
            new["RMS"] = root_mean_square(weights)  # [n]
            rate = rate * new["RMS"].clamp(min=group["eps"][1]).view(one_a_row)
        clip = (root_mean_square(update) / group["clip_threshold"]).clamp_(min=1.0).view(one_a_row)
        update = update.div_(clip).mul_(rate)
        if group["beta1"] is not None:
            update = state["exp_avg"].view(update.shape) * group["beta1"] + update * (1 - group["beta1"])
            new["exp_avg"] = update
        if group["weight_decay"] != 0:
            weights = weights - weights * (rate * group["weight_decay"])
        return weights - update, new
