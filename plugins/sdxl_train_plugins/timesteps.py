"""The distributions from which the timesteps of a batch are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

import sdxl_train
from sdxl_train import hookimpl, option

if TYPE_CHECKING:
    from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def timesteps_at(share: Tensor, min_timestep: int, max_timestep: int) -> Tensor:
    """The timesteps at a share of a range: floor(min + (max - min) * share), at most max - 1, also where a share rounds to 1.

    Args:
        share: in [0, 1]. [B] float32.
    Returns:
        [B] int64 in [min_timestep, max_timestep).
    """
    import torch

    timesteps = torch.floor(min_timestep + (max_timestep - min_timestep) * share).to(torch.int64)
    return timesteps.clamp(max=max_timestep - 1)


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

    return timesteps_at(torch.sigmoid(mu + sigma * normal), min_timestep, max_timestep)


def timestep_weights(density: Sequence[float]) -> list[float]:
    """How much of a piecewise constant density lies over each timestep, up to a common factor: its integral from t to t + 1.

    Args:
        density: a weight >= 0 for each of n equal parts of [0, 1000), 1 <= n <= 1000.
    Returns:
        1000 numbers >= 0; a timestep that a border between two parts divides has a share of both.
    """
    num_parts, weights = len(density), []
    for t in range(NUM_TRAIN_TIMESTEPS):
        # In units of 1 / num_parts a timestep is num_parts wide and a part is 1000: a timestep touches two parts at most.
        part = t * num_parts // NUM_TRAIN_TIMESTEPS
        inside = min(num_parts, NUM_TRAIN_TIMESTEPS * (part + 1) - t * num_parts)
        share = inside / num_parts
        weights.append(density[part] * share + (density[part + 1] * (1 - share) if share < 1 else 0.0))
    return weights


def density_timesteps(uniform: Tensor, weights: Sequence[float], min_timestep: int, max_timestep: int) -> Tensor:
    """Timesteps with the probability of their weights, by the inverse of the cumulative distribution.

    Args:
        uniform: draws of U[0, 1). [B] float32.
        weights: one for each timestep from 0 on, >= 0, not all 0 in the range.
    Returns:
        [B] int64 in [min_timestep, max_timestep).
    """
    import torch

    inside = torch.tensor(weights[min_timestep:max_timestep], dtype=torch.float64)
    cumulative = torch.cumsum(inside / inside.max(), dim=0)  # the maximum is 1, so that no sum overflows
    return min_timestep + torch.searchsorted(cumulative, uniform.double() * cumulative[-1], right=True)  # right: no weight of 0


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


class Beta:
    """Timesteps follow a beta distribution over the range: high or low ones, the middle, or both ends, as `alpha` and `beta` say."""

    class Options(sdxl_train.Options):
        alpha: float = option(
            2.0,
            "first parameter of the beta distribution of timestep / range; larger draws higher timesteps; 1 with beta = 1 is uniform",
            zh="Beta 分布的第一个参数，越大高时间步越多；与 beta 均为 1 时为均匀分布",
            ge=1e-3,
            le=1e4,
        )
        beta: float = option(
            2.0,
            "second parameter of it; larger draws lower timesteps, equal to alpha is symmetric",
            zh="Beta 分布的第二个参数，越大低时间步越多；与 alpha 相等时对称",
            ge=1e-3,
            le=1e4,
        )

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def sample_timesteps(self, min_timestep: int, max_timestep: int, random: Any) -> Tensor:
        return timesteps_at(random.beta(self._options.alpha, self._options.beta), min_timestep, max_timestep)


class Cubic:
    """High timesteps are more likely: timestep / range is 1 - u ** 3, u uniform (Mou et al. 2023, T2I-Adapter, arXiv:2302.08453)."""

    @hookimpl
    def sample_timesteps(self, min_timestep: int, max_timestep: int, random: Any) -> Tensor:
        return timesteps_at(1 - random.uniform() ** 3, min_timestep, max_timestep)


class Density:
    """Timesteps follow a table of weights."""

    class Options(sdxl_train.Options):
        density: tuple[Annotated[float, Field(ge=0)], ...] = option(
            ...,
            "how likely each of so many equal parts of [0, 1000) is, relative to the others, 0 = never; "
            "[1.0, 3.0] draws 500 to 999 three times as often as the rest, equal weights are uniform",
            zh="将 [0, 1000) 等分后各段的相对概率，0 为不抽取；各值相等为均匀分布",
            min_length=1,
            max_length=NUM_TRAIN_TIMESTEPS,
        )

        @field_validator("density")
        @classmethod
        def _is_not_all_zero(cls, density: tuple[float, ...]) -> tuple[float, ...]:
            if not any(density):
                raise ValueError("at least one weight must be above 0")
            return density

        def problem_with_keys(self, keys: Mapping[str, Any]) -> str | None:
            low, high = keys["min_timestep"], keys["max_timestep"]
            if low >= high or any(timestep_weights(self.density)[low:high]):
                return None
            return (
                f"timestep_sampler_kwargs.density is 0 everywhere from min_timestep = {low} to max_timestep = {high}; "
                "give a weight above 0 there, or widen the range"
            )

    def __init__(self, options: Options) -> None:
        self._weights = timestep_weights(options.density)

    @hookimpl
    def sample_timesteps(self, min_timestep: int, max_timestep: int, random: Any) -> Tensor:
        return density_timesteps(random.uniform(), self._weights, min_timestep, max_timestep)
