"""What a run says before step 1 and after its last step: what is really active, in plain lines."""

from __future__ import annotations

from typing import Any

import torch

from sdxl_train.config import Settings
from sdxl_train.memory_estimate import estimate_memory, largest_bucket
from sdxl_train.model.attention import active_backend
from sdxl_train.plugin_discovery import OWN_DISTRIBUTION
from sdxl_train.plugins import Loaded
from sdxl_train.run import Run
from sdxl_train.sample_sheets import INDEX_NAME, SHEETS_FOLDER

MAX_BUCKETS_SHOWN = 12


def banner(run: Run, settings: Settings) -> str:
    """Everything that decides what this run does."""
    keys, values = run.parts.keys, run.config
    trained = ", ".join(_trained_part(group) for group in run.optimizer.param_groups)
    accumulation = keys.gradient_accumulation_steps
    by_epochs = run.steps_per_epoch * keys.num_train_epochs
    lines = [
        f"model: {run.parts.base.path}" + (f", VAE {keys.vae}" if keys.vae else ""),
        *_data_lines(run),
        f"steps: {run.num_train_steps} = "
        + (f"{keys.num_train_epochs} epochs x {run.steps_per_epoch} steps" if by_epochs == run.num_train_steps else "max_train_steps"),
        f"effective batch: {keys.batch_size * accumulation} = {keys.batch_size} batch_size x {accumulation} accumulation x 1 process",
        f"trained: {trained}; prediction_type {keys.prediction_type}" + (", zero terminal SNR" if keys.zero_terminal_snr else ""),
        f"precision: {_precision(run)}; attention: {active_backend(values)}; device: {run.device}"
        + "".join(f"; {name.replace('_', ' ')}" for name in ("gradient_checkpointing", "fused_backward", "compile") if values[name])
        + ("; channels last" if run.device.type == "cuda" else ""),
        f"predicted peak memory: {estimate_memory(settings, run.parts.base.architecture, largest_bucket(run.parts.index.summary.buckets))}",
        f"optimizer: {_named(run, 'optimizer_type')}; schedule: {_named(run, 'lr_scheduler')}, warm-up {keys.lr_warmup_steps} steps",
        f"timesteps: {_named(run, 'timestep_sampler_type')} in [{keys.min_timestep}, {keys.max_timestep})",
        f"loss: {_named(run, 'loss_type')}",
        f"latents: {_latents(run)}; flips: {keys.flip_aug}",
        f"seed: {keys.seed}; random draws depend on seed, epoch, picture and repeat only",
        f"plugins: {', '.join(plugin.target.name + ' (' + plugin.target.origin + ')' for plugin in _foreign(run)) or 'only built-in ones'}",
    ]
    if run.parts.samples:
        pictures = sum(entry.num_pictures for entry in run.parts.samples)
        lines.append(
            f"samples: {pictures} pictures of {values['sample_benchmark']} with {values['sample_sampler']}; "
            f"to look at them: {run.output_dir / 'samples' / SHEETS_FOLDER / INDEX_NAME}"
        )
    return "\n".join(lines)


def summary(run: Run) -> str:
    """How the run ended."""
    lines = [f"done: {run.step} steps" + (f", stopped by a plugin: {run.stop_reason}" if run.stop_reason else "")]
    if run.parts.update.overflows:
        lines.append(f"{run.parts.update.overflows} steps left out by the loss scaling of fp16, since their gradients overflowed")
    if run.dropped_steps:
        lines.append(f"{run.dropped_steps} steps were dropped, since their loss was not finite")
    counts = run.parts.index.summary
    for number, what in ((counts.missing, "missing"), (counts.bad, "bad and left out"), (counts.without_text, "without any text")):
        if number:
            lines.append(f"{number} pictures {what}")
    lines += [f"saved: {path}" for path in run.saved.values()]
    return "\n".join(lines)


def _data_lines(run: Run) -> list[str]:
    counts = run.parts.index.summary
    buckets = sorted(counts.buckets.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{width}x{height}: {number}" for (width, height), number in buckets[:MAX_BUCKETS_SHOWN])
    more = f" and {len(buckets) - MAX_BUCKETS_SHOWN} smaller ones" if len(buckets) > MAX_BUCKETS_SHOWN else ""
    return [
        f"data: {counts.images} pictures, {counts.captioned} captioned, {counts.described} described, {counts.without_text} without text, "
        f"{counts.missing} missing, {counts.dropped} dropped by num_repeats, {counts.bad} bad and left out; "
        f"not searched: {counts.hidden} hidden names (they start with a dot), {counts.run_folders} folders of training runs",
        f"buckets: {shown}{more}; {run.num_batches} batches an epoch",
        f"captions over {run.parts.keys.max_token_length} tokens: {run.parts.long_captions}",
    ]


def _latents(run: Run) -> str:
    keys, latents = run.parts.keys, run.parts.latents
    if latents is None:
        return "encoded in every step"
    check = latents.check
    where = "caches beside the pictures" if keys.cache_latents_to_disk else "not written to the disk"
    read = "kept in memory" if keys.keep_cached_latents_in_memory or not keys.cache_latents_to_disk else "read at each fetch"
    profiles = latents.num_ignored_profiles
    return (
        f"{latents.num_encoded} encoded now ({len(check.invalid)} in place of a cache that was not valid), "
        f"{check.num_unchanged} caches unchanged, {check.num_checked} checked; {where}, {read}"
        + (f"; {profiles} pictures with a colour profile that cannot be used" if profiles else "")
    )


def _trained_part(group: dict[str, Any]) -> str:
    num_parameters = sum(parameter.numel() for parameter in group["params"])
    rate = group.get("initial_lr", group["lr"])
    return f"{group['name']} ({num_parameters:,} parameters, learning rate {'set by the optimizer' if rate is None else f'{rate:g}'})"


def _precision(run: Run) -> str:
    scaled = ", scaled loss" if run.parts.precision.compute is torch.float16 else ""
    return f"{run.parts.precision}{scaled}, VAE {str(run.vae.dtype).removeprefix('torch.')}"


def _named(run: Run, key: str) -> str:
    """The plugin of a key with the options that were given."""
    plugin = run.parts.plugins.of_key(key)[0]
    given = next(choice.options for choice in run.parts.plugins.choices if choice.key == key)
    options = ", ".join(f"{name} = {value}" for name, value in given.items())
    return plugin.target.name + (f" ({options})" if options else "")


def _foreign(run: Run) -> list[Loaded]:
    return [plugin for plugin in run.parts.plugins.loaded if not plugin.target.origin.startswith(f"{OWN_DISTRIBUTION} ")]
