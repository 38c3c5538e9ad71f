"""G1 ... G7, G9, G11, G12: steps of the trainer on a GPU, with the full SDXL in random weights and with cached latents."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import cast

import torch
from gpu_figures import Figure, Levels
from made_data import captioned_pictures
from made_run import PlainSteps, TrainerSteps, batches_of, made_run

from sdxl_train.data.batches import Batch
from sdxl_train.data.epoch_plan import epoch_plan
from sdxl_train.device_speed import device_peak_flops, peak_memory
from sdxl_train.model.architecture import CONTEXT_LENGTH, SDXL, Architecture
from sdxl_train.model.checkpointing import checkpoint_activations
from sdxl_train.model.compiling import compile_regions
from sdxl_train.model.tiny import tiny_architecture
from sdxl_train.run import Run
from sdxl_train.saves import Saves
from sdxl_train.step_costs import unet_flops
from sdxl_train_plugins.adamw import StackedAdamW

_BATCH, _LARGE_BATCH = 8, 16
_KEYS: dict[str, object] = {"mixed_precision": "bf16", "vae_batch_size": 8, "lr_scheduler": "constant", "trackers": ["jsonl"]}
_ADAMW: dict[str, object] = {"optimizer_type": "AdamW", "full_bf16": True, "batch_size": _BATCH}
_FUSED: dict[str, object] = {"optimizer_type": "AdaFactor", "fused_backward": True, "gradient_checkpointing": True, "batch_size": 1}
_MFU = Levels(41, 50, 55)
_MEMORY = {"G6": ("bf16", Levels(8, 6.5, at_least=False)), "G7": ("fp32", Levels(13, 11.5, at_least=False))}
_GIB = 2**30
_NEEDED_GIB = 130  # by a batch of 16 without checkpointing


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        architecture, side: of the model, and of the pictures in px.
        pictures: of the data set.
        warm_up, steps: steps before, and of, a measurement.
        blocks: of steps of the trainer and of the bare loop, in turn (G4).
        photographs: cached by the VAE (G10).
        backend: of torch.compile; None leaves compiled lines out.
    """

    device: torch.device
    architecture: Architecture = SDXL
    side: int = 1024
    pictures: int = 256
    warm_up: int = 3
    steps: int = 10
    blocks: int = 4
    photographs: int = 256
    backend: str | None = "inductor"

    @classmethod
    def tiny(cls, device: torch.device) -> Scale:
        """Only to see that it works, also on the CPU; the figures mean nothing."""
        return cls(device, tiny_architecture(), 64, pictures=32, warm_up=1, steps=1, blocks=1, photographs=4, backend="eager")


class Bench:
    """The runs that are measured, one at a time: the last is kept for whoever asks for the same."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.scale = scale
        self._folder = folder
        self._num_runs = 0
        self._keys: dict[str, object] = {}
        self._run: Run | None = None
        self._is_compiled = False

    def run(self, **keys: object) -> Run:
        """The run of this configuration."""
        if self._run is None or keys != self._keys:
            self.free()
            self._num_runs += 1
            folder, side = self._folder / f"run{self._num_runs}", self.scale.side
            images = captioned_pictures(self._folder, (side, side), self.scale.pictures)
            is_cpu = self.scale.device.type == "cpu"
            self._run = made_run(folder, self.scale.architecture, images, **{**_KEYS, "cpu": is_cpu, "resolution": side, **keys})
            self._keys = keys
            self._run.parts.hooks.on_train_start(run=self._run)
        return self._run

    def adamw(self, compiled: bool | None = None) -> Run:
        """The run with AdamW. `compiled`: True compiles its blocks, from then on; None takes it as it is."""
        run = self.run(**_ADAMW)
        if compiled and not self._is_compiled:
            assert self.scale.backend is not None
            compile_regions(run.unet, self.scale.backend)
            cast(StackedAdamW, run.optimizer).compile_update(self.scale.backend)
            self._is_compiled = True
        return run

    @property
    def how(self) -> str:
        """Whether the present run's blocks are compiled, as a word."""
        return "compiled" if self._is_compiled else "eager"

    def free(self) -> None:
        """Give the run's memory back."""
        if self._run is not None:
            self._run.parts.loader.close()
            self._run.parts.hooks.on_train_end(run=self._run, moment="train_end")
        self._run, self._is_compiled = None, False
        gc.collect()
        if self.scale.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """For all that the device has been given to do."""
        if self.scale.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Wall seconds of one of so many calls."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - start) / times


def optimizer_figures(bench: Bench) -> Iterator[Figure]:
    """G9: eager, then compiled."""
    run = bench.adamw()
    step = TrainerSteps(run, batches_of(run, 1, 1))
    step()
    for parameter in run.unet.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    run.parts.update.begin(run.step + 1)
    optimizer = cast(StackedAdamW, run.optimizer)
    for backend in dict.fromkeys((None, bench.scale.backend)):
        optimizer.compile_update(backend)
        bench.seconds(optimizer.step, bench.scale.warm_up)
        taken = 1000 * median(bench.seconds(optimizer.step, 1) for _ in range(bench.scale.steps))
        what = f"optimizer step, AdamW, bf16 weights and stochastic rounding, {'compiled' if backend else 'eager'}"
        yield Figure("G9", what, taken, "ms", Levels(20, 15, at_least=False, device="H100"))
    optimizer.compile_update(None)
    optimizer.zero_grad(set_to_none=True)


def saving_figures(bench: Bench, folder: Path) -> Iterator[Figure]:
    """G12."""
    run = bench.adamw()
    keys = run.parts.keys.model_copy(update={"save_model": True, "save_train_state": False, "save_precision": "bf16"})
    (folder / "models").mkdir()
    saves = Saves(keys, run.parts.base, folder)
    for name in ("first save", "later save"):
        run.step += 1
        stopped = bench.seconds(lambda: saves.start(run, "measured"), 1)
        start = time.perf_counter()
        saves.finish(run, must_succeed=True)
        path = run.saved[run.step]
        size = path.stat().st_size / 1e9
        path.unlink()
        what = f"training stopped by the {name} of a model of {size:.3g} GB"
        yield Figure("G12", what, stopped, "s", Levels(1, 0.5, at_least=False))
        yield Figure("", "until it is on disk and read back, while training goes on", stopped + time.perf_counter() - start, "s")


def loader_figures(bench: Bench) -> Iterator[Figure]:
    """G11: an epoch by the loader's own processes, from latents in cache files' arrays; all but its first batch, which starts them."""
    run = bench.adamw()
    plan = epoch_plan(run.parts.index, run.parts.keys.seed, 1, _BATCH)
    batches = run.parts.loader.batches(plan)
    waiting = _Waiting(batches)
    step = TrainerSteps(run, waiting)
    try:
        step()
        waiting.seconds = 0.0
        taken = bench.seconds(step, len(plan) - 1) * (len(plan) - 1)
    finally:
        batches.close()
    what = f"share of a step in which it waits for data, {run.parts.loader.num_workers} loader processes, {bench.how}"
    yield Figure("G11", what, 100 * waiting.seconds / taken, "%", Levels(None, 0.5, at_least=False))


class _Waiting:
    """Batches as they come, and the time that they let one wait."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - start


def bare_loop_figures(bench: Bench) -> Iterator[Figure]:
    """G4."""
    run, scale = bench.adamw(), bench.scale
    batches = batches_of(run, 4)
    trainer, bare = TrainerSteps(run, batches), PlainSteps(run, batches, run.unet, run.optimizer)
    bench.seconds(trainer, scale.warm_up)
    bench.seconds(bare, scale.warm_up)
    times = max(1, scale.steps // 2)
    ours, theirs = zip(*[(bench.seconds(trainer, times), bench.seconds(bare, times)) for _ in range(scale.blocks)], strict=True)
    what = f"speed of the trainer against a bare loop with the same kernels, batch {_BATCH}, {bench.how}"
    yield Figure("G4", what, 100 * median(theirs) / median(ours), "%", Levels(97, 99))


def full_speed_figures(bench: Bench) -> Iterator[Figure]:
    """G1, eager and compiled."""
    what = "bf16 AdamW, no checkpointing"
    yield from _speed(bench, "G1", what, bench.adamw(), _BATCH, _MFU)
    if bench.scale.backend:
        yield from _speed(bench, "G1", what, bench.adamw(compiled=True), _BATCH, _MFU)


def single_figures(bench: Bench) -> Iterator[Figure]:
    """G5."""
    run = bench.adamw(compiled=bool(bench.scale.backend))
    yield from _speed(bench, "G5", "bf16 AdamW, no checkpointing", run, 1, None, Levels(8, 15, device="H100"))


def large_figures(bench: Bench) -> Iterator[Figure]:
    """G3, where the device has the memory."""
    what, levels = "bf16 AdamW, no checkpointing", Levels(44, 53, device="H200")
    device = bench.scale.device
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < _NEEDED_GIB * _GIB:
        yield Figure("G3", f"{what}, batch {_LARGE_BATCH}", None, levels=levels, note=f"needs a GPU with {_NEEDED_GIB} GiB")
        return
    yield from _speed(bench, "G3", what, bench.adamw(compiled=bool(bench.scale.backend)), _LARGE_BATCH, levels)


def checkpointed_figures(bench: Bench) -> Iterator[Figure]:
    """G2."""
    run = bench.adamw(compiled=bool(bench.scale.backend))
    checkpoint_activations(run.unet, [])
    try:
        yield from _speed(bench, "G2", "bf16 AdamW, full checkpointing", run, _LARGE_BATCH, Levels(33, 42, 48))
    finally:
        run.unet.disable_gradient_checkpointing()


def memory_figures(bench: Bench, metric: str) -> Iterator[Figure]:
    """G6, G7: text encoders and VAE are on the device too."""
    name, levels = _MEMORY[metric]
    run = bench.run(**_FUSED, full_bf16=name == "bf16")
    if bench.scale.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bench.seconds(TrainerSteps(run, batches_of(run, 4)), bench.scale.warm_up)
    found = peak_memory(bench.scale.device)
    what = f"peak memory, {name} weights, AdaFactor, fused backward, checkpointing, batch 1"
    yield Figure(metric, what, found[1] / _GIB if found else None, "GiB", levels, note="this system does not tell")


def _speed(
    bench: Bench, metric: str, what: str, run: Run, batch_size: int, mfu: Levels | None, images: Levels | None = None
) -> Iterator[Figure]:
    """Pictures a second, and the share of the device's peak. MFU: of the U-Net, without what checkpointing computes again."""
    scale = bench.scale
    step = TrainerSteps(run, batches_of(run, 4, batch_size))
    bench.seconds(step, scale.warm_up)
    per_s = batch_size / bench.seconds(step, scale.steps)
    flops = per_s * unet_flops(scale.architecture, (scale.side, scale.side), CONTEXT_LENGTH).total
    peak, described = device_peak_flops(scale.device), f"{what}, batch {batch_size}, {bench.how}"
    percent = 100 * flops / peak if peak else None
    yield Figure(metric if mfu else "", described, percent, "% MFU", mfu, note="the peak of this device is not known")
    yield Figure(metric if images else "", described, per_s, "img/s", images)
    yield Figure("", described, flops / 1e12, "TFLOP/s")
