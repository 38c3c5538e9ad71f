"""SDXL's noise schedule: how much noise each timestep holds, noisy latents, and what the U-Net is trained to predict."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]

# SDXL base 1.0, scheduler/scheduler_config.json: beta_schedule "scaled_linear" between these ends.
NUM_TRAIN_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012


class NoiseSchedule:
    """The tables of a training, in float64 on the CPU, and float32 look-ups of them on one device.

    Args:
        prediction_type: what the U-Net predicts.
        zero_terminal_snr: rescale the tables so that the last timestep is pure noise.
        device: where `snr`, `add_noise` and `target` look up; their timesteps must be there too.

    Attributes:
        betas, alphas_cumprod, snr_table: the tables in use, rescaled where `zero_terminal_snr` says so. [1000] float64, on the CPU.
        num_train_timesteps, beta_start, beta_end: the plain schedule, which samplers of diffusers are made from.

    Raises:
        ValueError: for another prediction type.
    """

    def __init__(
        self, prediction_type: PredictionType = "epsilon", zero_terminal_snr: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f'prediction_type is "epsilon" or "v_prediction", got {prediction_type!r}')
        self.prediction_type: PredictionType = prediction_type
        self.zero_terminal_snr = zero_terminal_snr
        self.num_train_timesteps, self.beta_start, self.beta_end = NUM_TRAIN_TIMESTEPS, BETA_START, BETA_END
        self.betas = scaled_linear_betas()
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        if zero_terminal_snr:
            self.alphas_cumprod = rescale_zero_terminal_snr(self.alphas_cumprod)
            self.betas = betas_of(self.alphas_cumprod)
        self.snr_table = self.alphas_cumprod / (1 - self.alphas_cumprod)
        signal, noise = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        # One table, so that a step gathers once and reads nothing back.
        self._lookup = torch.stack([signal, noise, self.snr_table], dim=1).to(torch.float32).to(device)  # [1000, 3]

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its look-ups on another device."""
        return NoiseSchedule(self.prediction_type, self.zero_terminal_snr, device)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod). [B] int64 -> [B] float32, >= 0; 0 at a zero terminal SNR."""
        return self._lookup[timesteps, 2]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alphas_cumprod) * latents + sqrt(1 - alphas_cumprod) * noise, in float32 whatever the dtypes given.

        Args:
            latents, noise: [B, 4, h, w].
            timesteps: [B] int64.
        Returns:
            [B, 4, h, w] float32.
        """
        signal_rate, noise_rate = self._rates(timesteps)
        return signal_rate * latents.float() + noise_rate * noise.float()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the U-Net is to predict, in float32: the noise, or the velocity sqrt(a) * noise - sqrt(1 - a) * latents.

        The velocity is v of Salimans & Ho 2022, arXiv:2202.00512, with a = alphas_cumprod. Shapes as in `add_noise`.
        """
        if self.prediction_type == "epsilon":
            return noise.float()
        signal_rate, noise_rate = self._rates(timesteps)
        return signal_rate * noise.float() - noise_rate * latents.float()

    def _rates(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        rates = self._lookup[timesteps][:, :, None, None, None]  # [B, 3, 1, 1, 1]
        return rates[:, 0], rates[:, 1]


def scaled_linear_betas() -> Tensor:
    """The noise variance added at each timestep: the square of a line between the square roots of its ends. [1000] float64."""
    return torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64).square()


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and stretch the signal rate sqrt(alphas_cumprod) to end at exactly 0 and begin where it did.

    Algorithm 1 of Lin et al. 2023, arXiv:2305.08891.

    Args:
        alphas_cumprod: a falling table, > 0. [T] float64.
    Returns:
        The rescaled table; its last entry is 0. [T] float64.
    """
    signal_rate = alphas_cumprod.sqrt()
    first, last = signal_rate[0], signal_rate[-1]
    return ((signal_rate - last) * first / (first - last)).square()


def betas_of(alphas_cumprod: Tensor) -> Tensor:
    """The betas whose cumulative product of (1 - beta) a table is; the last is 1 where the table ends at 0. [T] -> [T]."""
    ratios = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - ratios
