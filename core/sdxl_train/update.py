"""From the losses of a step to new weights: backward pass, loss scaling, clipping, optimizer, learning-rate schedule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from sdxl_train.errors import ConfigError, SdxlTrainError
from sdxl_train.masked_optimizer import MaskedOptimizer
from sdxl_train.precision import LEAST_LOSS_SCALE, LossScaler
from sdxl_train.randomness import stream_key

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from sdxl_train.keys import Config

# torch.nn.utils.clip_grad_norm_ adds as much to the norm.
_NORM_EPS = 1e-6


class Update:
    """Backward passes and the update that follows them.

    Attributes:
        is_under_way: weights are being changed: an exception from here leaves some that must not be saved.
        num_applied: updates so far, which is the position of the learning-rate schedule.
        overflows: steps that fp16's loss scaling left out, since their gradients were not finite.

    Raises:
        ConfigError: `fused_backward` with an optimizer that cannot step tensor by tensor.
    """

    def __init__(self, optimizer: Optimizer, lr_scheduler: LRScheduler, keys: Config, device: torch.device) -> None:
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._max_norm = keys.max_grad_norm
        self._seed = keys.seed
        self._masked = optimizer if isinstance(optimizer, MaskedOptimizer) else None
        self._scaler = LossScaler(device.type) if keys.mixed_precision == "fp16" else None
        self._is_fused = keys.fused_backward
        self.is_under_way = False
        self.num_applied = 0
        self.overflows = 0
        if self._is_fused:
            if self._masked is None:
                raise ConfigError(
                    f"fused_backward = true needs an optimizer that can step tensor by tensor (AdaFactor, AdamW); "
                    f"{type(optimizer).__name__} cannot"
                )
            _step_in_backward(optimizer, self._masked)

    @property
    def is_done_in_backward(self) -> bool:
        """After `backward` the weights are those of the next step already (`fused_backward`)."""
        return self._is_fused

    def begin(self, step: int) -> None:
        """Before the first backward pass of a step. `step`: its number, from 1."""
        if self._masked is not None:
            self._masked.step_key = stream_key("stochastic rounding", self._seed, step)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss. With `fused_backward` the weights change as well, unless the loss is not finite."""
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        if not self._is_fused:
            loss.backward()
            return
        assert self._masked is not None
        self._masked.found_inf = (~torch.isfinite(loss.detach())).float()
        self.is_under_way = True
        self._masked.begin_step()
        self._optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue] # or torch warns that `step` was not called
        loss.backward()
        self.is_under_way = False

    def drop(self) -> None:
        """Forget the gradients: the loss was not finite."""
        self._optimizer.zero_grad(set_to_none=True)

    def apply(self) -> None:
        """Clip, update the weights where that is not done yet, advance the schedule."""
        if self._scaler is not None:
            is_applied = self._apply_scaled(self._scaler)
        else:
            is_applied = True
            if not self._is_fused:
                self._clip()
                self._step()
        if is_applied:
            self._lr_scheduler.step()
            self.num_applied += 1
        else:
            self.overflows += 1
        self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the loss scale with the steps since its last change."""
        return {"num_applied": self.num_applied, "overflows": self.overflows, "scaler": self._scaler.state_dict() if self._scaler else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, and bring the schedule to its position."""
        self.num_applied, self.overflows = state["num_applied"], state["overflows"]
        if self._scaler is not None and state["scaler"] is not None:
            self._scaler.load_state_dict(state["scaler"])
        set_position(self._lr_scheduler, self.num_applied)

    def _apply_scaled(self, scaler: LossScaler) -> bool:
        """fp16: whether the gradients were finite and the weights are updated. Waits for the device."""
        scaler.unscale_(self._optimizer)
        if self._max_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._trained(), self._max_norm)
        scale = scaler.get_scale()
        self.is_under_way = True
        scaler.step(self._optimizer)
        self.is_under_way = False
        scaler.update()
        if scaler.get_scale() < LEAST_LOSS_SCALE:
            raise SdxlTrainError(
                "the gradients overflow fp16 at every loss scale; the weights are those before the overflows. "
                'mixed_precision = "bf16" has the range of float32'
            )
        return scaler.get_scale() >= scale

    def _clip(self) -> None:
        """Clip the total norm of all gradients; an optimizer that scales gradients by itself gets the factor."""
        if self._max_norm <= 0:
            return
        if self._masked is None:
            torch.nn.utils.clip_grad_norm_(self._trained(), self._max_norm)
            return
        gradients = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        if gradients:
            self._masked.grad_scale = ((total_norm(gradients) + _NORM_EPS) / self._max_norm).clamp(min=1)

    def _step(self) -> None:
        self.is_under_way = True
        self._optimizer.step()
        self.is_under_way = False

    def _trained(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all numbers together, 0-dim float32, summed in float32; torch's `get_total_norm` rounds to the tensors' dtype.

    Args:
        tensors: at least one, all on one device.
    """
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(norms))


def _step_in_backward(optimizer: Optimizer, masked: MaskedOptimizer) -> None:
    """Update each parameter, and free its gradient, as soon as that is complete."""

    def update(parameter: Tensor) -> None:
        masked.step_parameter(parameter)
        parameter.grad = None

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(update)


def set_position(lr_scheduler: LRScheduler, num_steps: int) -> None:
    """Bring a schedule that was just made to where it is after so many steps.

    It follows the configuration it was made from. Loading a saved schedule would bring back the old rates, and then mix both.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*before `optimizer.step|To get the last learning rate", category=UserWarning)
        if type(lr_scheduler) is LambdaLR:  # a closed form of the position
            lr_scheduler.last_epoch = num_steps
            lr_scheduler._step_count = num_steps + 1
            for group, rate in zip(lr_scheduler.optimizer.param_groups, lr_scheduler.get_lr(), strict=True):
                group["lr"] = rate
            lr_scheduler._last_lr = [group["lr"] for group in lr_scheduler.optimizer.param_groups]
        else:
            for _ in range(num_steps):
                lr_scheduler.step()
