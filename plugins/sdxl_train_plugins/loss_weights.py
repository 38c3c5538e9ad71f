"""Factors on the loss of each sample, from its timestep's signal-to-noise ratio. All are finite at SNR 0 (zero_terminal_snr)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sdxl_train
from sdxl_train import hookimpl, option

if TYPE_CHECKING:
    from torch import Tensor

# The SNR of SDXL's plain schedule at its last timestep, 999: what a rescaled schedule's lower ones are lifted to before dividing by them.
LOWEST_PLAIN_SNR = 0.004681916706157956
HIGHEST_SNR = 1000.0


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weigh down the timesteps with little noise (Hang et al. 2023, arXiv:2303.09556).

    epsilon: min(1, gamma / snr). v_prediction: min(snr, gamma) / (snr + 1).

    Args:
        snr: [B] float32, >= 0.
        gamma: the SNR from which on the weight falls, > 0; the paper uses 5, smaller acts more strongly.
    Returns:
        [B] float32 in [0, 1]; at SNR 0 it is 1 for epsilon and 0 for v_prediction.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # gamma / 0 is inf, and that is 1
    return snr.clamp(max=gamma) / (snr + 1)


def v_to_epsilon_weight(snr: Tensor) -> Tensor:
    """What turns the squared error of a velocity into that of the noise it stands for: c / (c + 1), c = min(snr, 1000). [B] -> [B]."""
    clamped = snr.clamp(max=HIGHEST_SNR)
    return clamped / (clamped + 1)


def epsilon_to_v_weight(snr: Tensor) -> Tensor:
    """The inverse of `v_to_epsilon_weight`, bounded at low SNR: (c + 1) / max(c, SNR of the plain schedule at 999). [B] -> [B]."""
    clamped = snr.clamp(max=HIGHEST_SNR)
    return (clamped + 1) / clamped.clamp(min=LOWEST_PLAIN_SNR)


def debiased_weight(snr: Tensor, prediction_type: str) -> Tensor:
    """Weigh up the timesteps with much noise (Yu et al. 2024, "Unmasking Bias in Diffusion Model Training", arXiv:2310.08442).

    epsilon: 1 / sqrt(max(c, SNR of the plain schedule at 999)). v_prediction: 1 / (c + 1). c = min(snr, 1000). [B] -> [B].
    """
    clamped = snr.clamp(max=HIGHEST_SNR)
    if prediction_type == "epsilon":
        return clamped.clamp(min=LOWEST_PLAIN_SNR).rsqrt()
    return 1 / (clamped + 1)


class MinSnr:
    """Min-SNR weighting."""

    class Options(sdxl_train.Options):
        min_snr_gamma: float = option(
            5.0,
            "SNR above which a timestep weighs less: faster fitting, less attention to fine detail; smaller is stronger, 0 turns it off",
            zh="最小信噪比伽马：降低低时间步的权重，加快拟合；越小越强，0 为关闭",
            flat=True,
            ge=0,
        )

    def __init__(self, options: Options) -> None:
        self._gamma = options.min_snr_gamma

    @hookimpl
    def weigh_loss(self, snr: Tensor, prediction_type: str) -> Tensor:
        return snr.new_ones(snr.shape) if self._gamma == 0 else min_snr_weight(snr, self._gamma, prediction_type)


class ScaleVPred:
    """Weighs a velocity loss like the noise loss it stands for."""

    class Options(sdxl_train.Options):
        scale_v_pred_loss_like_noise_pred: bool = option(
            False,
            "scale a v_prediction loss to its epsilon equivalent; no effect with epsilon",
            zh="将 V 预测损失缩放为等效的噪声预测损失；仅用于 V 预测",
            flat=True,
        )

    def __init__(self, options: Options) -> None:
        self._is_on = options.scale_v_pred_loss_like_noise_pred

    @hookimpl
    def weigh_loss(self, snr: Tensor, prediction_type: str) -> Tensor:
        return v_to_epsilon_weight(snr) if self._is_on and prediction_type == "v_prediction" else snr.new_ones(snr.shape)


class VPredLike:
    """Adds a velocity-like share to a noise loss."""

    class Options(sdxl_train.Options):
        v_pred_like_loss: float = option(
            0.0,
            "multiple of the equivalent velocity loss added to an epsilon loss; 0 turns it off, no effect with v_prediction",
            zh="在噪声预测损失上加上该倍数的等效 V 预测损失；0 为关闭，仅用于噪声预测",
            flat=True,
            ge=0,
        )

    def __init__(self, options: Options) -> None:
        self._share = options.v_pred_like_loss

    @hookimpl
    def weigh_loss(self, snr: Tensor, prediction_type: str) -> Tensor:
        if self._share == 0 or prediction_type != "epsilon":
            return snr.new_ones(snr.shape)
        return 1 + self._share * epsilon_to_v_weight(snr)


class Debiased:
    """Debiased-estimation weighting."""

    class Options(sdxl_train.Options):
        debiased_estimation_loss: bool = option(
            False, "weigh each timestep by how much its noise error moves the picture; false turns it off", zh="去偏估计损失权重", flat=True
        )

    def __init__(self, options: Options) -> None:
        self._is_on = options.debiased_estimation_loss

    @hookimpl
    def weigh_loss(self, snr: Tensor, prediction_type: str) -> Tensor:
        return debiased_weight(snr, prediction_type) if self._is_on else snr.new_ones(snr.shape)
