"""The distributions from which the timesteps of a batch are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sdxl_train
from sdxl_train import hookimpl, option

if TYPE_CHECKING:
    from torch import Tensor


def logit_normal_timesteps(normal: Tensor, mu: float, sigma: float, min_timestep: int, max_timestep: int) -> Tensor:
    """Timesteps whose logit, as a share of the range, is normally distributed (Esser et al. 2024, arXiv:2403.03206, section 3.1).

    floor(min + (max - min) * sigmoid(mu + sigma * normal)), at most max - 1: in float32 a sigmoid reaches 1.0 from about 17 on.

    Args:
        normal: draws of N(0, 1). [B] float32.
        mu: mean of the logit; larger means higher timesteps, 0 is symmetric.
        sigma: standard deviation of the logit, > 0.
    Returns:
        [B] int64 in [min_timestep, max_timestep).
    """
    import torch

    share = torch.sigmoid(mu + sigma * normal)
    timesteps = torch.floor(min_timestep + (max_timestep - min_timestep) * share).to(torch.int64)
    return timesteps.clamp(max=max_timestep - 1)


class Uniform:
    """Every timestep of the range is equally likely."""

    @hookimpl
    def sample_timesteps(self, min_timestep: int, max_timestep: int, random: Any) -> Tensor:
        return random.integers(min_timestep, max_timestep)


class LogitNormal:
    """Timesteps in the middle of the range are the most likely; `mu` shifts them."""

    class Options(sdxl_train.Options):
        mu: float = option(
            0.0,
            "mean of the logit of timestep / range; larger draws higher timesteps, 0 is symmetric; 0 or 1.0986 recommended",
            zh="逻辑正态分布的均值，越大高时间步越多，0 为对称；推荐 0 或 1.0986",
            aliases=("loc", "mean", "m"),
        )
        sigma: float = option(
            1.0,
            "standard deviation of that logit; smaller keeps closer to the middle; 1 recommended",
            zh="逻辑正态分布的标准差，越小越集中；推荐 1",
            aliases=("scale", "std", "s"),
            gt=0,
        )

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def sample_timesteps(self, min_timestep: int, max_timestep: int, random: Any) -> Tensor:
        return logit_normal_timesteps(random.normal(), self._options.mu, self._options.sigma, min_timestep, max_timestep)
