"""A run in progress: what hooks see of it, and the parts the loop works with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train.learning_rates import text_encoder_rates
from sdxl_train.model.key_names import TRAINABLE_PARTS, PartName

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from sdxl_train.console import Console
    from sdxl_train.data.caching import PreparedLatents
    from sdxl_train.data.captions import TokenReport
    from sdxl_train.data.index import Index
    from sdxl_train.data.loader import BatchLoader
    from sdxl_train.diffusion import NoiseSchedule
    from sdxl_train.hookspecs import HookSpecs
    from sdxl_train.keys import Config
    from sdxl_train.loss_recorder import LossRecorder
    from sdxl_train.metrics import EpochLoss, MetricsReader, Speed
    from sdxl_train.model.single_file import Checkpoint
    from sdxl_train.model.tokenizer import PromptTokenizer
    from sdxl_train.plugins import Plugins
    from sdxl_train.precision import Precision
    from sdxl_train.sample_benchmark import SampleEntry
    from sdxl_train.saves import Saves
    from sdxl_train.stopping import StopRequest
    from sdxl_train.update import Update


@dataclass
class Parts:
    """What the loop works with besides what hooks see. Not for plugins: it may change with any version."""

    keys: Config
    plugins: Plugins
    console: Console
    stop: StopRequest
    base: Checkpoint
    tokenizer: PromptTokenizer
    index: Index
    loader: BatchLoader
    recorder: LossRecorder
    metrics: MetricsReader
    speed: Speed
    samples: list[SampleEntry]
    latents: PreparedLatents | None
    precision: Precision
    update: Update
    saves: Saves
    epoch_loss: EpochLoss
    first_groups: dict[str, dict[str, Any]]
    long_captions: TokenReport

    @property
    def hooks(self) -> HookSpecs:
        return self.plugins.hooks


@dataclass
class Run:
    """A run as hooks see it. They read it and change nothing.

    Attributes:
        config: every effective key of the TOML file, read-only.
        output_dir: the resolved project folder.
        log_dir: `<output_dir>/logs/<time of start>`, where trackers write.
        device, dtype: where the networks compute, and in which dtype (autocast for trained parts).
        unet, text_encoders, vae: diffusers' and transformers' modules; trained parts are float32 unless `full_bf16` or `full_fp16` is on.
        noise_scheduler: the noise schedule that is trained on.
        num_batches: micro-batches of an epoch.
        steps_per_epoch, num_train_steps: optimizer steps of an epoch and of the whole run.
        is_main_process: whether this process writes files.
        step: completed optimizer steps, S.
        epoch: the epoch in progress, E, counted from 1; 0 before the first.
        dropped_steps, dropped_in_a_row: steps whose loss was not finite.
        stop_reason: why a plugin ended the training, or None.
        saved: path by step of what this run has saved.
        epoch_is_open: the epoch in progress has begun, and its end is not told yet.
    """

    config: Mapping[str, Any]
    output_dir: Path
    log_dir: Path
    device: torch.device
    dtype: torch.dtype
    unet: UNet2DConditionModel
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    vae: AutoencoderKL
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    noise_scheduler: NoiseSchedule
    num_batches: int
    steps_per_epoch: int
    num_train_steps: int
    parts: Parts = field(repr=False)
    is_main_process: bool = True
    step: int = 0
    epoch: int = 0
    dropped_steps: int = 0
    dropped_in_a_row: int = 0
    stop_reason: str | None = None
    saved: dict[int, Path] = field(default_factory=dict)
    epoch_is_open: bool = False

    @property
    def epoch_of_step(self) -> int:
        """The epoch of the last completed step; 0 before the first."""
        return -(-self.step // self.steps_per_epoch)

    @property
    def networks(self) -> dict[PartName, nn.Module]:
        """U-Net and text encoders by the names that single files and saving use."""
        return dict(zip(TRAINABLE_PARTS, (self.unet, *self.text_encoders), strict=True))

    def autocast(self) -> torch.autocast:
        """The precision context of the networks' forward passes; off where weights and computation have the same dtype.

        With gradient checkpointing the weight cache is off: it would keep a second copy of all weights through the forward pass.
        """
        import torch

        is_on = self.parts.precision.uses_autocast
        return torch.autocast(self.device.type, self.dtype, enabled=is_on, cache_enabled=not self.parts.keys.gradient_checkpointing)

    @contextmanager
    def text_context(self) -> Iterator[None]:
        """Around the encoding of texts: encoders that are frozen both run without gradients and without autocast."""
        import torch

        is_trained = any(text_encoder_rates(self.parts.keys))
        with torch.set_grad_enabled(is_trained), self.autocast() if is_trained else nullcontext():
            yield
