"""AdamW over stacks of equal shapes. Imported by the plugin when it is built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl_train_plugins.stacked_optimizer import StackedOptimizer
from sdxl_train_plugins.stacked_update import State, as_tensor


@dataclass(frozen=True)
class AdamWCoefficients:
    """
    Attributes:
        decay: factor on the weights, 1 - lr * weight_decay. 0-dim float32.
        step_size: lr / (1 - beta1 ** step). 0-dim float32.
        root_correction2: sqrt(1 - beta2 ** step). 0-dim float32.
    """

    decay: Tensor
    step_size: Tensor
    root_correction2: Tensor


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta ** step, to the full precision of float32 also where beta is near 1. `step`: 0-dim float32, >= 1."""
    return -torch.expm1(step * (math.log(beta) if beta > 0 else -math.inf))


def adamw_update(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    betas: tuple[float, float],
    eps: float,
    coefficients: AdamWCoefficients,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One update by AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101), element by element; with a `max_exp_avg_sq` by AMSGrad.

    All tensors are float32 of one shape. Each operation is one multiplication, addition, division or root, because fused ones
    (`addcmul`, `lerp`) round differently at the end of a tensor, and the place of an element must not matter.

    Returns:
        The new weights, exp_avg, exp_avg_sq and max_exp_avg_sq.
    """
    exp_avg = exp_avg * betas[0] + grads * (1 - betas[0])
    exp_avg_sq = exp_avg_sq * betas[1] + grads * grads * (1 - betas[1])
    if max_exp_avg_sq is not None:
        max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    denominator = (exp_avg_sq if max_exp_avg_sq is None else max_exp_avg_sq).sqrt()
    denominator = denominator.div_(coefficients.root_correction2).add_(eps)
    weights = weights * coefficients.decay - (exp_avg / denominator).mul_(coefficients.step_size)
    return weights, exp_avg, exp_avg_sq, max_exp_avg_sq


class StackedAdamW(StackedOptimizer):
    """torch.optim.AdamW's update over stacks of equal shapes; see `StackedOptimizer` for what else it does.

    Args:
        params: as torch's.
        lr: >= 0.
        state_dtype: of the running means; None: bfloat16 for bfloat16 parameters if they are rounded stochastically, else float32.
        stochastic_rounding: of bfloat16 parameters and state.
    Raises:
        ValueError: bfloat16 state without stochastic rounding. beta2 = 0.999 keeps too much for round-to-nearest: a bfloat16 can shrink
            by 1/256 or not at all.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
    ) -> None:
        if state_dtype is torch.bfloat16 and not stochastic_rounding:
            raise ValueError("bfloat16 state needs stochastic rounding: rounded to nearest, its running means come to a halt")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "state_dtype": state_dtype,
                "stochastic_rounding": stochastic_rounding,
            },
        )

    def _state_shapes(self, group: dict[str, Any], parameter: Tensor) -> dict[str, tuple[Sequence[int], torch.dtype]]:
        dtype = group["state_dtype"]
        if dtype is None:
            dtype = torch.bfloat16 if parameter.dtype is torch.bfloat16 and group["stochastic_rounding"] else torch.float32
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        return {name: (parameter.shape, dtype) for name in names}

    def _row_shape(self, shape: torch.Size) -> Sequence[int]:
        return (shape.numel(),)

    def _coefficients(self, group: dict[str, Any], step: Tensor) -> AdamWCoefficients:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        decay = as_tensor(1 - lr * group["weight_decay"], step.device)
        return AdamWCoefficients(decay, lr / bias_correction(beta1, step), bias_correction(beta2, step).sqrt())

    def _updated(
        self,
        weights: Tensor,
        grads: Tensor,
        state: State,
        shapes: list[tuple[int, ...]],
        group: dict[str, Any],
        coefficients: AdamWCoefficients,
    ) -> tuple[Tensor, State]:
        if group["maximize"]:
            grads = -grads
        exp_avg, exp_avg_sq = state["exp_avg"].float(), state["exp_avg_sq"].float()
        maximum = state["max_exp_avg_sq"].float() if group["amsgrad"] else None
        weights, exp_avg, exp_avg_sq, maximum = adamw_update(
            weights, grads, exp_avg, exp_avg_sq, maximum, group["betas"], group["eps"], coefficients
        )
        new = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return weights, new if maximum is None else {**new, "max_exp_avg_sq": maximum}
