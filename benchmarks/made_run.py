"""A run of the trainer on pictures and weights that are made, ready for its first step; and its steps, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
import torch.nn.functional as F
from made_data import write_config
from made_model import made_checkpoint

from sdxl_train import build
from sdxl_train.config import load_settings
from sdxl_train.console import Console
from sdxl_train.data.batches import Batch
from sdxl_train.data.epoch_plan import epoch_plan
from sdxl_train.loop import train_step
from sdxl_train.masked_optimizer import MaskedOptimizer
from sdxl_train.model.architecture import Architecture
from sdxl_train.model.sdxl import make_add_time_ids, predict
from sdxl_train.model.text import encode_prompts
from sdxl_train.moments import after_step, current_rates
from sdxl_train.run import Run
from sdxl_train.stopping import StopRequest

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch.optim import Optimizer

_KEYS = {
    "num_train_epochs": 1_000_000,
    "lr_warmup_steps": 0,
    "max_token_length": 75,
    "flip_aug": False,
    "learning_rate": 1e-6,
    "save_model": False,
    "save_train_state": False,
}


def made_run(folder: Path, architecture: Architecture, images: Path, **keys: object) -> Run:
    """What `build_run` makes of a configuration, with random weights in place of a file's.

    Args:
        keys: of the configuration, beside those that make a run without warm-up, saving, flips and captions of several chunks.
    """
    toml = folder / "run.toml"
    write_config(toml, [images], **{**_KEYS, **keys})
    settings = load_settings(toml, needs=("data",))
    base = made_checkpoint(architecture)
    output_dir = folder / "output"
    with (
        patch.object(build, "open_checkpoint", lambda path, vae: base),
        patch.object(build, "vae_encoder_digest", lambda checkpoint: bytes(16)),
    ):
        run = build.build_run(settings, output_dir, output_dir / "logs", Console(), StopRequest())
    run.epoch = 1
    return run


def batches_of(run: Run, num: int, batch_size: int | None = None) -> list[Batch]:
    """The first batches of the run, on its device; fewer where an epoch has fewer. `batch_size` absent: that of the configuration."""
    keys = run.parts.keys
    plan = epoch_plan(run.parts.index, keys.seed, 1, batch_size or keys.batch_size)
    batches = run.parts.loader.batches(plan[:num])
    try:
        return list(batches)
    finally:
        batches.close()


class TrainerSteps:
    """The steps of the trainer: the body of its loop over an epoch.

    Args:
        batches: each step takes one; a list is gone through again and again.
    """

    def __init__(self, run: Run, batches: list[Batch] | Iterator[Batch]) -> None:
        self._run = run
        self._batches = itertools.cycle(batches) if isinstance(batches, list) else batches

    def __call__(self) -> None:
        """One step, with its logging and the questions to the triggers."""
        rates = current_rates(self._run)
        loss = train_step(self._run, self._batches, 1)
        assert loss is not None
        self._run.parts.epoch_loss.add(loss)
        after_step(self._run, loss, rates)


class PlainSteps:
    """Forward, backward, optimizer, as one writes them down first: no plugins, no logs, no checks, nothing that can be set.

    Args:
        batches: in turn; each step takes one. Their size conditions are made ahead.
        unet, optimizer: the run's own, or others like them.
    """

    def __init__(self, run: Run, batches: list[Batch], unet: UNet2DConditionModel, optimizer: Optimizer) -> None:
        self._run = run
        self._batches = itertools.cycle([(batch, _time_ids(batch).to(run.device)) for batch in batches])
        self._unet = unet
        self._optimizer = optimizer
        if isinstance(optimizer, MaskedOptimizer):
            optimizer.step_key = bytes(16)

    def __call__(self) -> None:
        """One step."""
        run, (batch, time_ids) = self._run, next(self._batches)
        assert batch.latents is not None
        timesteps = torch.randint(0, run.noise_scheduler.num_train_timesteps, (len(batch),), device=run.device)
        noisy_latents = run.noise_scheduler.add_noise(batch.latents, batch.noise, timesteps)
        with torch.no_grad():
            prompt_embeds, pooled = encode_prompts(batch.te1_ids, batch.te2_ids, *run.text_encoders, 1)
        with run.autocast():
            model_pred = predict(self._unet, noisy_latents, timesteps, prompt_embeds, pooled, time_ids)
        F.mse_loss(model_pred.float(), batch.noise).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _time_ids(batch: Batch) -> torch.Tensor:
    return make_add_time_ids(*(torch.tensor(pairs) for pairs in (batch.original_sizes, batch.crops, batch.target_sizes)))
