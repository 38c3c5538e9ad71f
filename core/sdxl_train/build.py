"""Puts a run together: everything is checked and read here, before step 1, in the order in which it can fail cheaply."""

from __future__ import annotations

from pathlib import Path

import torch

from sdxl_train.base_marks import contradicted_marks
from sdxl_train.check_files import refuse_full_disk
from sdxl_train.config import Settings
from sdxl_train.config_rules import schedule_warnings
from sdxl_train.console import Console, figures_of
from sdxl_train.data.caching import PreparedLatents, VaeInUse
from sdxl_train.data.epoch_plan import num_batches, steps_per_epoch
from sdxl_train.data.loader import BatchLoader
from sdxl_train.dataset import Dataset, records_dir
from sdxl_train.diffusion import NoiseSchedule
from sdxl_train.errors import ConfigError
from sdxl_train.keys import Config
from sdxl_train.loss_recorder import LossRecorder
from sdxl_train.masked_optimizer import CompiledUpdate
from sdxl_train.metrics import EpochLoss, MetricsReader, Speed
from sdxl_train.model.attention import active_backend, check_backend, set_attention, set_text_attention
from sdxl_train.model.checkpointing import checkpoint_activations
from sdxl_train.model.compiling import compile_regions
from sdxl_train.model.memory_format import to_channels_last
from sdxl_train.model.single_file import Checkpoint, load_vae, open_checkpoint, vae_encoder_digest
from sdxl_train.model.text import check_clip_skip
from sdxl_train.model.tokenizer import load_tokenizers
from sdxl_train.networks import Networks, load_networks
from sdxl_train.optimizer_state import groups_by_name
from sdxl_train.precision import COMPUTE_DTYPES, Precision
from sdxl_train.run import Parts, Run
from sdxl_train.saves import Saves
from sdxl_train.step_costs import StepCosts
from sdxl_train.stopping import StopRequest
from sdxl_train.update import Update


def build_run(settings: Settings, output_dir: Path, log_dir: Path, console: Console, stop: StopRequest) -> Run:
    """Read the data and the model, encode the latents, and make optimizer, schedule and loader.

    Args:
        output_dir, log_dir: resolved and made.
        stop: checked between the long parts.
    Raises:
        ConfigError, DataError, CheckpointError: what was given cannot be trained.
    """
    keys = settings.config
    plugins = settings.plugins
    samples = list(settings.samples)
    device, precision = pick_device(keys), Precision.of(keys)
    base = open_base(settings)
    refuse_full_disk(settings, base, output_dir)
    if samples:
        # A sampler that cannot do what is asked says so now.
        plugins.hooks.build_sampler(noise_scheduler=NoiseSchedule(keys.prediction_type, keys.zero_terminal_snr))
    tokenizer = load_tokenizers(keys.tokenizer_cache_dir, base.path if Path(base.path).is_dir() else None)
    dataset = Dataset(settings, records_dir(keys, output_dir), console, stop.check)
    index = dataset.index
    stop.check()

    vae = load_vae_in_use(base, keys, device)
    networks = load_networks(base, keys)
    stop.check()
    set_attention(networks.unet, vae.module, active_backend(settings.values))
    latents = _latents(dataset, vae, keys)
    train_here(networks, device, keys)
    stop.check()

    batches = num_batches(index, keys.batch_size)
    per_epoch = steps_per_epoch(batches, keys.gradient_accumulation_steps, 1)
    num_steps = min(per_epoch * keys.num_train_epochs, keys.max_train_steps or per_epoch * keys.num_train_epochs)
    for warning in schedule_warnings(settings.values, num_steps):
        console.warn(warning)
    optimizer = plugins.hooks.build_optimizer(param_groups=networks.param_groups)
    if keys.compile and isinstance(optimizer, CompiledUpdate):
        optimizer.compile_update()
    lr_scheduler = plugins.hooks.build_lr_scheduler(
        optimizer=optimizer, num_warmup_steps=keys.lr_warmup_steps, num_training_steps=num_steps
    )
    parts = Parts(
        keys=keys,
        plugins=plugins,
        console=console,
        stop=stop,
        base=base,
        tokenizer=tokenizer,
        index=index,
        loader=BatchLoader(index, plugins, keys, latents.store if latents else None, keys.seed, device),
        recorder=LossRecorder(keys.loss_recorder_kwargs.gamma, keys.loss_recorder_kwargs.stride),
        metrics=MetricsReader(lambda metrics: _log(run, metrics)),
        speed=Speed(StepCosts.of(base.architecture, keys), device),
        samples=samples,
        latents=latents,
        long_captions=dataset.count_long_captions(tokenizer.count),
        precision=precision,
        update=Update(optimizer, lr_scheduler, keys, device),
        saves=Saves(keys, base, output_dir),
        epoch_loss=EpochLoss(),
        first_groups=groups_by_name(optimizer),
    )
    run = Run(
        config=settings.values,
        output_dir=output_dir,
        log_dir=log_dir,
        device=device,
        dtype=precision.compute,
        unet=networks.unet,
        text_encoders=networks.text_encoders,
        vae=vae.module,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        noise_scheduler=NoiseSchedule(keys.prediction_type, keys.zero_terminal_snr, device),
        num_batches=batches,
        steps_per_epoch=per_epoch,
        num_train_steps=num_steps,
        parts=parts,
    )
    return run


def open_base(settings: Settings) -> Checkpoint:
    """The model that the configuration names, its headers read and held against it.

    Raises:
        CheckpointError: it, or its VAE, cannot be used.
        ConfigError: it is marked otherwise than the configuration says, or has too few layers for `clip_skip`.
    """
    keys = settings.config
    base = open_checkpoint(keys.pretrained_model_name_or_path, keys.vae)
    for problem in contradicted_marks(base, settings):
        raise ConfigError(problem.message, [problem])
    check_clip_skip(keys.clip_skip, base.architecture)
    return base


def train_here(networks: Networks, device: torch.device, keys: Config) -> None:
    """Bring the networks where they train. Parameters stay the same objects, or the optimizer would have others."""
    for network in networks.parts.values():
        network.to(device)
    if device.type == "cuda":
        to_channels_last(networks.unet)
    for encoder in networks.text_encoders:
        set_text_attention(encoder, active_backend(dict(keys)))
    if keys.gradient_checkpointing:
        trained = [encoder for encoder in networks.text_encoders if any(weight.requires_grad for weight in encoder.parameters())]
        checkpoint_activations(networks.unet, trained)
    if keys.compile:
        compile_regions(networks.unet)


def pick_device(keys: Config) -> torch.device:
    """The device to train on: CUDA, Apple's GPU, or the CPU.

    Raises:
        ConfigError: fp16 on the CPU.
    """
    name = "cpu"
    if not keys.cpu:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cpu" and keys.mixed_precision == "fp16":
        raise ConfigError('mixed_precision = "fp16" needs an accelerator, and none was found; use "bf16" or "no"')
    return torch.device(name)


def load_vae_in_use(base: Checkpoint, keys: Config, device: torch.device) -> VaeInUse:
    """The VAE of the base or of the key `vae`, on its device, in the dtype it runs in, with the attention of the file.

    Raises:
        ConfigError: the attention cannot be computed here.
    """
    dtype, backend = torch.float32 if keys.no_half_vae else COMPUTE_DTYPES[keys.mixed_precision], active_backend(dict(keys))
    check_backend(backend, device, COMPUTE_DTYPES[keys.mixed_precision], dtype)
    vae = load_vae(base, dtype).to(device)  # pyright: ignore[reportArgumentType]
    set_attention(None, vae, backend)
    vae.requires_grad_(False).eval()
    return VaeInUse(vae, device, vae_encoder_digest(base), str(dtype).removeprefix("torch."))


def _latents(dataset: Dataset, vae: VaeInUse, keys: Config) -> PreparedLatents | None:
    """The latents of all pictures; None (after a check of all pictures) where they are encoded in every step."""
    if not keys.cache_latents:
        dataset.prepare_pictures()
        return None
    to_disk = keys.cache_latents_to_disk
    return dataset.prepare_latents(vae, to_disk, in_memory=keys.keep_cached_latents_in_memory or not to_disk)


def _log(run: Run, metrics: dict[str, float]) -> None:
    """The metrics of a step have been read: tell the trackers, move the progress bar."""
    run.parts.hooks.on_log(run=run, metrics=metrics)
    parts = run.parts
    label = f"epoch {int(metrics['epoch'])}/{parts.keys.num_train_epochs} step"
    parts.console.progress(int(metrics["step"]), label, figures_of(metrics))
