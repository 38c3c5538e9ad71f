"""Tensors to a device and back, without holding up the host where the device is CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.cuda import Event


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device. A copy from the CPU to CUDA goes through pinned memory, so the host does not wait for what is queued there."""
    import torch

    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """A tensor on its way to the CPU. From CUDA the copy is only queued, and an event tells when it has arrived.

    The meta device has no values: ones arrive from there.
    """

    def __init__(self, tensor: Tensor) -> None:
        import torch

        self._arrived: Event | None = None
        if tensor.device.type != "cuda":
            self._values = torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu()
            return
        self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._values.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def has_arrived(self) -> bool:
        """Whether `wait` would return at once."""
        return self._arrived is None or self._arrived.query()

    def wait(self) -> Tensor:
        """The tensor on the CPU; waits for this copy alone, not for what is queued behind it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values
