"""The loss of each sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import hookimpl

if TYPE_CHECKING:
    from torch import Tensor


def mean_squared_error(model_pred: Tensor, target: Tensor) -> Tensor:
    """The mean over channels and pixels of (model_pred - target) squared, in float32. [B, C, h, w] -> [B]."""
    return (model_pred.float() - target.float()).square().flatten(1).mean(1)


class Mse:
    """Mean squared error."""

    @hookimpl
    def compute_loss(self, model_pred: Tensor, target: Tensor) -> Tensor:
        return mean_squared_error(model_pred, target)
