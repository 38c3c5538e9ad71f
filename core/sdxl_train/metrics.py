"""Reads the metrics of a step from the device without making the step wait for them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdxl_train.device_speed import device_peak_flops, peak_memory
from sdxl_train.devices import HostCopy
from sdxl_train.step_costs import StepCosts

MAX_LAG_STEPS = 5
MAX_LAG_S = 1.0
SPEED_STEPS = 20


@dataclass
class _Pending:
    step: int
    epoch: int
    time: float
    floats: dict[str, float]
    names: list[str]
    values: HostCopy  # [len(names)]


class MetricsReader:
    """Takes the metrics of each step and hands them on as floats, in order, as soon as the device has computed them.

    Args:
        on_read: called with the floats of a step, together with its `step`, `epoch` and `time` (seconds since 1970).
    """

    def __init__(self, on_read: Callable[[dict[str, float]], None]) -> None:
        self._on_read = on_read
        self._pending: deque[_Pending] = deque()

    def push(self, step: int, epoch: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Start to copy a step's metrics, and hand on those that have arrived or are older than 5 steps and 1 s."""
        tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        floats = {name: float(value) for name, value in metrics.items() if not isinstance(value, Tensor)}
        values = HostCopy(_stacked(list(tensors.values())))
        self._pending.append(_Pending(step, epoch, time.time(), floats, list(tensors), values))
        while self._pending and self._is_due(self._pending[0], step):
            self._hand_on()

    def flush(self) -> None:
        """Wait for everything that is still on its way."""
        while self._pending:
            self._hand_on()

    def _is_due(self, pending: _Pending, step: int) -> bool:
        is_old = step - pending.step >= MAX_LAG_STEPS and time.time() - pending.time >= MAX_LAG_S
        return is_old or pending.values.has_arrived()

    def _hand_on(self) -> None:
        pending = self._pending.popleft()
        read = dict(zip(pending.names, pending.values.wait().tolist(), strict=True))
        self._on_read({"step": pending.step, "epoch": pending.epoch, "time": pending.time, **read, **pending.floats})


def _stacked(tensors: list[Tensor]) -> Tensor:
    """All of a step's tensors as one, so that one copy brings them. [n] float64 (float32 where the device has no float64)."""
    if not tensors:
        return torch.empty(0)
    return torch.stack([tensor.detach().double() if tensor.device.type != "mps" else tensor.detach() for tensor in tensors])


class EpochLoss:
    """The mean of an epoch's step losses, summed on the device in float64 (float32 where the device has none)."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._num = 0

    def add(self, loss: Tensor | None) -> None:
        """Count a step; a dropped one (None) does not count."""
        if loss is not None:
            loss = loss.double() if loss.device.type != "mps" else loss
            self._sum = loss if self._sum is None else self._sum.to(loss.device) + loss
            self._num += 1

    def reset(self) -> None:
        """An epoch begins."""
        self._sum, self._num = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Sum and number of the steps so far."""
        return {"sum": self._sum, "num": self._num}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._sum, self._num = state["sum"], state["num"]

    def metrics(self) -> dict[str, float]:
        """{"loss/epoch": mean}; empty when every step was dropped. Waits for the device."""
        return {} if self._sum is None else {"loss/epoch": self._sum.item() / self._num}


class FiniteCheck:
    """Whether a step's losses are finite, asked before the backward pass is queued and answered after, without draining the device."""

    def __init__(self, losses: Tensor) -> None:
        self._losses = HostCopy(losses)

    def is_finite(self) -> bool:
        """Wait for the losses alone (not for the backward pass behind them)."""
        return all(map(math.isfinite, self._losses.wait().tolist()))


class Speed:
    """How fast the last steps were, as the host saw them: nothing here asks the device for anything but its peak of memory.

    Args:
        costs: what steps cost; None leaves operations out.
        device: which computes them.
    """

    def __init__(self, costs: StepCosts | None = None, device: torch.device | None = None) -> None:
        self._costs = costs
        self._device = device or torch.device("cpu")
        self._peak_flops = device_peak_flops(self._device)
        self._ends: deque[_Totals] = deque(maxlen=SPEED_STEPS + 1)
        self.restart()

    def restart(self) -> None:
        """Begin to measure, also after something that is no step."""
        self._ends.clear()
        self._now = _Totals(time.perf_counter(), 0, 0, 0.0)
        self._ends.append(self._now)

    def waited(self, seconds: float) -> None:
        """Count time in which the loop had to wait for a batch."""
        self._now = replace(self._now, waited_s=self._now.waited_s + seconds)

    def batch_begun(self, num_images: int, size: tuple[int, int], num_chunks: int) -> None:
        """Count a micro-batch.

        Args:
            size: (w, h) of its bucket in px.
            num_chunks: of 77 tokens in each text.
        """
        flops = num_images * self._costs.of_sample(size, num_chunks) if self._costs else 0
        self._now = replace(self._now, images=self._now.images + num_images, flops=self._now.flops + flops)

    def step_done(self) -> None:
        """A step has ended."""
        self._now = replace(self._now, time=time.perf_counter())
        self._ends.append(self._now)

    def metrics(self) -> dict[str, float]:
        """Means over the last steps, up to 20, by their tags.

        "speed/img_per_s"; "speed/tflop_per_s": of the model, without what gradient checkpointing computes again; "speed/mfu_percent": the
        same of the device's dense bf16 peak, left out where that is not known; "speed/data_wait_percent": share of the time in which the
        loop waited for a batch; "speed/peak_gib" (torch's on CUDA) or "speed/rss_gib" (the process's). No step done: the memory only.
        """
        first, last = self._ends[0], self._ends[-1]
        seconds = last.time - first.time
        found: dict[str, float] = {}
        if seconds > 0:
            found["speed/img_per_s"] = (last.images - first.images) / seconds
            if self._costs:
                flops_per_s = (last.flops - first.flops) / seconds
                found["speed/tflop_per_s"] = flops_per_s / 1e12
                if self._peak_flops:
                    found["speed/mfu_percent"] = 100 * flops_per_s / self._peak_flops
            found["speed/data_wait_percent"] = 100 * (last.waited_s - first.waited_s) / seconds
        memory = peak_memory(self._device)
        if memory:
            found[f"speed/{memory[0]}_gib"] = memory[1] / 2**30
        return found


@dataclass(frozen=True)
class _Totals:
    time: float
    images: int
    flops: int
    waited_s: float
