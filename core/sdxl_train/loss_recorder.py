"""The two running means of the loss that a run reports beside the loss of the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_FIRST_CAPACITY = 1024  # entries; the window grows up to its stride, which may be far more than a run has steps


class LossRecorder:
    """One entry a step; everything stays on the loss's device, and nothing waits for it.

    Args:
        gamma: forgetting factor of the exponential moving average, 0 ... 1: 1 is the current loss, 0 the mean since the start.
        stride: window of the plain average, in steps, >= 1.
    """

    def __init__(self, gamma: float, stride: int) -> None:
        if not 0 <= gamma <= 1 or stride < 1:
            raise ValueError(f"gamma must be in 0 ... 1 and stride >= 1, got {gamma} and {stride}")
        self._gamma = gamma
        self._stride = stride
        self._sum = torch.zeros((), dtype=torch.float64)
        self._weight = 0.0
        # A ring: `_filled` entries are in use and the next one goes to `_next`, which is the oldest once the ring is full.
        self._window = torch.empty(0, dtype=torch.float64)
        self._filled = 0
        self._next = 0

    def record(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Take the loss of a step.

        The bias of a moving average that starts at 0 is divided out when it is read, by the weight that its entries have so far
        (as in Kingma & Ba 2014, arXiv:1412.6980), and never written back.

        Args:
            loss: 0-dim, finite.
        Returns:
            (mean of the last min(stride, seen) losses, moving average), 0-dim on the loss's device, float64 where it has that type.
        """
        dtype = torch.float32 if loss.device.type == "mps" else torch.float64
        loss = loss.detach().to(dtype)
        self._sum = self._sum.to(loss.device, dtype)
        if self._gamma == 0:
            self._sum = self._sum + loss
            self._weight += 1.0
        else:
            self._sum = (1 - self._gamma) * self._sum + self._gamma * loss
            self._weight = (1 - self._gamma) * self._weight + self._gamma
        self._push(loss)
        # Summed anew each step: a running sum would keep the rounding error of one huge loss for good.
        return self._window[: self._filled].mean(), self._sum / self._weight

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next entry depends on, with tensors on the CPU."""
        return {
            "stride": self._stride,
            "sum": self._sum.cpu(),
            "weight": self._weight,
            "window": self._window[: self._filled].to("cpu", copy=True),
            "next": self._next,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; with another stride than the state's, with as many of its newest entries as fit."""
        self._sum, self._weight = state["sum"], state["weight"]
        window, self._next = state["window"], state["next"]
        if state["stride"] != self._stride:
            oldest = self._next if len(window) == state["stride"] else 0
            window = torch.cat([window[oldest:], window[:oldest]])[-self._stride :]
            self._next = len(window) % self._stride
        self._window = window.clone()
        self._filled = len(window)

    def _push(self, loss: Tensor) -> None:
        self._window = self._window.to(loss.device, loss.dtype)
        if self._next == len(self._window):
            capacity = min(self._stride, max(_FIRST_CAPACITY, 2 * len(self._window)))
            grown = self._window.new_zeros(capacity)
            grown[: self._filled] = self._window[: self._filled]
            self._window = grown
        self._window[self._next] = loss
        self._filled = max(self._filled, self._next + 1)
        self._next = (self._next + 1) % self._stride
