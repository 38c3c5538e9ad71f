"""The loss of each sample. Every function computes in float32, and takes the mean over channels and pixels: [B, C, h, w] -> [B]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import sdxl_train
from sdxl_train import hookimpl, option

if TYPE_CHECKING:
    from torch import Tensor

HuberSchedule = Literal["constant", "exponential", "snr"]
NUM_TRAIN_TIMESTEPS = 1000


def mean_squared_error(model_pred: Tensor, target: Tensor) -> Tensor:
    """The mean of (model_pred - target) squared."""
    return (model_pred.float() - target.float()).square().flatten(1).mean(1)


def mean_absolute_error(model_pred: Tensor, target: Tensor) -> Tensor:
    """The mean of |model_pred - target|."""
    return (model_pred.float() - target.float()).abs().flatten(1).mean(1)


def pseudo_huber_error(model_pred: Tensor, target: Tensor, threshold: Tensor) -> Tensor:
    """The mean of 2 * (sqrt(d ** 2 + c ** 2) - c), d = model_pred - target: about d ** 2 / c where |d| is below c, 2 * |d| far above.

    It is computed as 2 * d ** 2 / (sqrt(d ** 2 + c ** 2) + c), which is the same number: in float32 the difference above loses all its
    digits once d is some thousand times smaller than c.

    Args:
        threshold: c of each sample, > 0. [B] float32.
    """
    import torch

    difference = model_pred.float() - target.float()  # [B, C, h, w]
    c = threshold[:, None, None, None]
    errors = 2 * difference.square() / (torch.hypot(difference, c) + c)
    return errors.flatten(1).mean(1)


def huber_threshold(timesteps: Tensor, snr: Tensor, schedule: HuberSchedule, huber_c: float, huber_scale: float) -> Tensor:
    """The threshold c of the pseudo-Huber losses, which may fall as the noise grows (Khrapov et al. 2024, arXiv:2403.16728).

    The three schedules of sd-scripts, each times `huber_scale` (which sd-scripts leaves out of "snr"):
    constant: huber_c. exponential: huber_c ** (t / 1000), from 1 at timestep 0 down to huber_c.
    snr: (1 - huber_c) / (1 + sigma) ** 2 + huber_c with sigma = 1 / sqrt(snr); huber_c at SNR 0.

    Args:
        timesteps: [B] int64.
        snr: [B] float32, >= 0.
    Returns:
        [B] float32.
    """
    import torch

    if schedule == "constant":
        threshold = torch.full_like(snr, huber_c)
    elif schedule == "exponential":
        threshold = torch.pow(huber_c, timesteps.to(snr) / NUM_TRAIN_TIMESTEPS)
    else:
        signal = snr.sqrt()
        threshold = (1 - huber_c) * (signal / (1 + signal)).square() + huber_c  # 1 / (1 + sigma), without dividing by an SNR of 0
    return threshold * huber_scale


class Mse:
    """Mean squared error."""

    @hookimpl
    def compute_loss(self, model_pred: Tensor, target: Tensor) -> Tensor:
        return mean_squared_error(model_pred, target)


class L1:
    """Mean absolute error: outliers pull less than with mse."""

    @hookimpl
    def compute_loss(self, model_pred: Tensor, target: Tensor) -> Tensor:
        return mean_absolute_error(model_pred, target)


class HuberOptions(sdxl_train.Options):
    """The options of both pseudo-Huber losses; the bounds keep what is computed with the threshold within float32."""

    huber_schedule: HuberSchedule = option(
        "snr",
        "how the threshold changes with the timestep: not at all, or from 1 without noise down to huber_c at the noisiest timestep",
        zh="阈值随时间步的变化：constant 不变；exponential 与 snr 从 1 降到 huber_c",
    )
    huber_c: float = option(
        0.1,
        "threshold between squared and absolute errors, at the noisiest timestep (everywhere with constant); larger is more like mse",
        zh="平方误差与绝对误差之间的阈值（噪声最大处）；越大越接近均方误差",
        ge=1e-4,
        le=1e4,
    )
    huber_scale: float = option(
        1.0, "factor on the threshold at every timestep; 1 changes nothing", zh="阈值的倍数；1 为不变", ge=1e-4, le=1e4
    )


class SmoothL1:
    """Pseudo-Huber loss 2 * (sqrt(d ** 2 + c ** 2) - c): near absolute errors 2 * |d|, without their corner at 0."""

    Options = HuberOptions

    def __init__(self, options: HuberOptions) -> None:
        self._options = options

    @hookimpl
    def compute_loss(self, model_pred: Tensor, target: Tensor, timesteps: Tensor, snr: Tensor) -> Tensor:
        return pseudo_huber_error(model_pred, target, self._threshold(timesteps, snr))

    def _threshold(self, timesteps: Tensor, snr: Tensor) -> Tensor:
        options = self._options
        return huber_threshold(timesteps, snr, options.huber_schedule, options.huber_c, options.huber_scale)


class Huber(SmoothL1):
    """Pseudo-Huber loss 2 * c * (sqrt(d ** 2 + c ** 2) - c): near squared errors d ** 2, without the pull of outliers."""

    @hookimpl
    def compute_loss(self, model_pred: Tensor, target: Tensor, timesteps: Tensor, snr: Tensor) -> Tensor:
        threshold = self._threshold(timesteps, snr)
        return threshold * pseudo_huber_error(model_pred, target, threshold)
