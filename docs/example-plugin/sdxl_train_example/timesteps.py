"""A timestep sampler: a class with options. torch is imported only where it is used, so that `sdxl-train --help` stays fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sdxl_train
from sdxl_train import hookimpl, option

if TYPE_CHECKING:
    from torch import Tensor


def kumaraswamy(uniform: Tensor, a: float, b: float) -> Tensor:
    """Draws of the Kumaraswamy distribution by its inverse distribution function, (1 - (1 - u) ** (1 / b)) ** (1 / a).

    Much like a beta distribution, but in closed form (Kumaraswamy 1980, Journal of Hydrology 46, 79-88).

    Args:
        uniform: draws of U[0, 1). [B] float32.
    Returns:
        [B] float32 in [0, 1].
    """
    return (1 - (1 - uniform) ** (1 / b)) ** (1 / a)


class Kumaraswamy:
    """Timesteps with a Kumaraswamy distribution over the range: `a` and `b` say where they are dense."""

    class Options(sdxl_train.Options):
        a: float = option(1.0, "shape at the low end; larger draws fewer low timesteps, 1 with b = 1 is uniform", gt=0)
        b: float = option(1.0, "shape at the high end; larger draws fewer high timesteps, 1 with a = 1 is uniform", gt=0)

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def sample_timesteps(self, min_timestep: int, max_timestep: int, random: Any) -> Tensor:
        import torch

        share = kumaraswamy(random.uniform(), self._options.a, self._options.b)
        timesteps = torch.floor(min_timestep + (max_timestep - min_timestep) * share).to(torch.int64)
        return timesteps.clamp(max=max_timestep - 1)  # in float32 a share can round to 1
