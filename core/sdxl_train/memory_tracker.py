"""One training step of a run on the meta device, by the code that trains: its peak memory, operations, kernels and waits.

Nothing is read but the headers of the model. What the CUDA context, the allocator's rounding and the workspaces of kernels take is not
in the figures.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdxl_train.build import train_here
from sdxl_train.cuda_stand_in import CudaStandIn
from sdxl_train.data.batches import Batch
from sdxl_train.data.captions import TokenReport
from sdxl_train.data.index import Index
from sdxl_train.data.loader import BatchLoader
from sdxl_train.diffusion import NoiseSchedule
from sdxl_train.loop import train_step
from sdxl_train.loss_recorder import LossRecorder
from sdxl_train.memory_estimate import GRADIENTS, OPTIMIZER, TEXT_ENCODERS, VAE, WEIGHT_COPIES, WEIGHTS
from sdxl_train.metrics import EpochLoss, MetricsReader, Speed
from sdxl_train.model.architecture import CONTEXT_LENGTH, LATENT_CHANNELS, PX_PER_LATENT
from sdxl_train.model.attention import OF_XFORMERS, active_backend, set_attention
from sdxl_train.model.blank import blank_vae
from sdxl_train.model.tokenizer import PromptTokenizer
from sdxl_train.networks import Networks, blank_networks
from sdxl_train.precision import COMPUTE_DTYPES, Precision
from sdxl_train.randomness import sample_place
from sdxl_train.run import Parts, Run
from sdxl_train.saves import Saves
from sdxl_train.step_costs import StepCosts
from sdxl_train.stopping import StopRequest
from sdxl_train.storage_tracker import StorageTracker
from sdxl_train.update import Update

if TYPE_CHECKING:
    from sdxl_train.config import Settings
    from sdxl_train.console import Console
    from sdxl_train.model.single_file import Checkpoint

_META = torch.device("meta")


@dataclass(frozen=True)
class MeasuredStep:
    """
    Attributes:
        bytes_by_part: what was alive when it was most; the names are those of `memory_estimate`.
        flops: of the whole step, with what gradient checkpointing computes again.
        num_kernels: operations that a device would run.
        waits: where the host asked the device for a value: each drains its queue. The one wait for the loss is none of them.
    """

    bytes_by_part: dict[str, int]
    flops: int
    num_kernels: int
    waits: list[str]

    @property
    def total(self) -> int:
        return sum(self.bytes_by_part.values())


def measure_step(settings: Settings, base: Checkpoint, index: Index, size: tuple[int, int], console: Console) -> MeasuredStep:
    """Train one step, after the optimizer has made its state.

    Args:
        index: the data; the batch repeats those of that bucket.
        size: (w, h) in px of the bucket.
    Raises:
        SdxlTrainError: as `build_run`, or from a plugin.
    """
    keys = settings.config
    tracker = StorageTracker()
    stand_in = CudaStandIn(lambda copy: tracker.assign([copy], WEIGHT_COPIES))
    with tracker:
        run = _blank_run(settings, base, index, console, tracker, stand_in)
        batch = _made_up_batch(run, size)
        with stand_in:
            _make_optimizer_state(run, tracker)
            tracker.reset_peak()
            num_micro_batches = min(2, keys.gradient_accumulation_steps)  # from the second one on, all are alike
            loss = train_step(run, iter([batch] * num_micro_batches), num_micro_batches)
            assert loss is not None
    return MeasuredStep(dict(tracker.peak), tracker.flops, tracker.num_kernels, list(tracker.reads))


class _BlankRun(Run):
    """A run on the meta device, with the autocast of CUDA."""

    stand_in: CudaStandIn

    def autocast(self) -> AbstractContextManager[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self.parts.precision.uses_autocast:
            return nullcontext()
        return self.stand_in.autocast(self.dtype, True, cache_enabled=not self.parts.keys.gradient_checkpointing)


def _blank_run(settings: Settings, base: Checkpoint, index: Index, console: Console, tracker: StorageTracker, stand_in: CudaStandIn) -> Run:
    """What `build_run` makes, without values and files."""
    keys, plugins = settings.config, settings.plugins
    precision = Precision.of(keys)
    networks = blank_networks(base.architecture, keys)
    vae = blank_vae(base.architecture, torch.float32 if keys.no_half_vae else COMPUTE_DTYPES[keys.mixed_precision])
    vae.requires_grad_(False).eval()
    backend = active_backend(settings.values)
    set_attention(networks.unet, vae, "sdpa" if backend in OF_XFORMERS else backend)  # it is on GPUs only, and needs as much
    train_here(networks, _META, keys.model_copy(update={"compile": False}))
    _assign_weights(tracker, networks, vae)
    for group in networks.param_groups:
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(lambda parameter: tracker.assign([parameter.grad], GRADIENTS))
    optimizer = plugins.hooks.build_optimizer(param_groups=networks.param_groups)
    lr_scheduler = plugins.hooks.build_lr_scheduler(optimizer=optimizer, num_warmup_steps=keys.lr_warmup_steps, num_training_steps=1000)
    parts = Parts(
        keys=keys,
        plugins=plugins,
        console=console,
        stop=StopRequest(),
        base=base,
        tokenizer=PromptTokenizer(),
        index=index,
        loader=BatchLoader(index, plugins, keys, None, keys.seed, _META),
        recorder=LossRecorder(keys.loss_recorder_kwargs.gamma, keys.loss_recorder_kwargs.stride),
        metrics=MetricsReader(lambda metrics: None),
        speed=Speed(StepCosts.of(base.architecture, keys), _META),
        samples=[],
        latents=None,
        precision=precision,
        update=Update(optimizer, lr_scheduler, keys, _META),
        saves=Saves(keys, base, Path()),
        epoch_loss=EpochLoss(),
        first_groups={},
        long_captions=TokenReport(0, ()),
    )
    run = _BlankRun(
        config=settings.values,
        output_dir=Path(),
        log_dir=Path(),
        device=_META,
        dtype=precision.compute,
        unet=networks.unet,
        text_encoders=networks.text_encoders,
        vae=vae,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        noise_scheduler=NoiseSchedule(keys.prediction_type, keys.zero_terminal_snr, _META),
        num_batches=1,
        steps_per_epoch=1,
        num_train_steps=1,
        parts=parts,
    )
    run.stand_in = stand_in
    return run


def _assign_weights(tracker: StorageTracker, networks: Networks, vae: torch.nn.Module) -> None:
    names = {"unet": WEIGHTS, "text_encoder": TEXT_ENCODERS, "text_encoder_2": TEXT_ENCODERS}
    for name, network in networks.parts.items():
        tracker.assign([*network.parameters(), *network.buffers()], names[name])
    tracker.assign([*vae.parameters(), *vae.buffers()], VAE)


def _make_optimizer_state(run: Run, tracker: StorageTracker) -> None:
    """Let the optimizer make a step, so that it has its state as in all steps but the first."""
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    run.parts.update.begin(0)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    tensors = [value for state in run.optimizer.state.values() for value in state.values() if isinstance(value, Tensor) and value.is_meta]
    tracker.assign(tensors, OPTIMIZER)


def _made_up_batch(run: Run, size: tuple[int, int]) -> Batch:
    """A full batch of a bucket, with the rows and keys of its data and no values."""
    keys, index = run.parts.keys, run.parts.index
    rows = ((index.num_repeats > 0) & (index.bucket_sizes == size).all(axis=1)).nonzero()[0]
    data = [int(rows[i % len(rows)]) for i in range(keys.batch_size)]
    width, height = size
    latents = (keys.batch_size, LATENT_CHANNELS, height // PX_PER_LATENT, width // PX_PER_LATENT)
    ids = torch.zeros(keys.batch_size, keys.max_token_length // (CONTEXT_LENGTH - 2), CONTEXT_LENGTH, dtype=torch.int64, device=_META)
    is_cached = keys.cache_latents
    return Batch(
        keys=[index.key(datum) for datum in data],
        captions=[""] * len(data),
        flipped=[False] * len(data),
        original_sizes=[(height, width)] * len(data),
        crops=[(0, 0)] * len(data),
        target_sizes=[(height, width)] * len(data),
        data=data,
        places=[sample_place(keys.seed, 1, index.key(datum), i) for i, datum in enumerate(data)],
        te1_ids=ids,
        te2_ids=ids,
        noise=torch.empty(latents, device=_META),
        latents=torch.empty(latents, device=_META) if is_cached else None,
        pixels=None if is_cached else torch.empty(len(data), 3, height, width, dtype=torch.uint8, device=_META),
        index=index,
    )
