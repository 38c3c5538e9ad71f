"""The timesteps of a batch, drawn alike by the training and by what shows it beforehand: the name of the stream is part of the draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train.randomness import StepRandom

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_train.data.batches import Batch
    from sdxl_train.hookspecs import HookSpecs
    from sdxl_train.keys import Config


def draw_timesteps(batch: Batch, hooks: HookSpecs, keys: Config) -> Tensor:
    """What `sample_timesteps` answers for a batch. [B] int64 in [min_timestep, max_timestep)."""
    return hooks.sample_timesteps(
        batch_size=len(batch),
        min_timestep=keys.min_timestep,
        max_timestep=keys.max_timestep,
        batch=batch,
        random=StepRandom(batch.places, "sample_timesteps"),
    )
