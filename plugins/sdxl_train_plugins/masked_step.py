"""A step that is scaled and masked on the device; see `sdxl_train/masked_optimizer.py`. Imported by the optimizers when they are built."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor


class MaskedStep(torch.optim.Optimizer):
    """Base of optimizers with such a step. A subclass gives `begin_step`, `step_parameter` and `_update_all`.

    Attributes:
        grad_scale: gradients are divided by it; None counts as 1. 0-dim float32. torch.amp.GradScaler takes a None only after `unscale_`.
        found_inf: where it is not 0, nothing changes; None counts as 0. 0-dim float32.
        step_key: 16 bytes that stand for seed and step; set before each step in which something is rounded stochastically.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    step_key: bytes = b""

    def begin_step(self) -> None:
        """Count a step, unless `found_inf` says otherwise."""
        raise NotImplementedError

    def _update_all(self) -> None:
        """Update every parameter that has a gradient, after `begin_step`."""
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. `closure` computes the loss anew; it is asked once, before the update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin_step()
        self._update_all()
        return loss
