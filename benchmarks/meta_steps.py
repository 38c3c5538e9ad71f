"""C3, C13: what a step does to a device, counted on the meta device with the code that trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from made_data import captioned_pictures, write_config
from measuring import Goal, Line, in_own_process

if TYPE_CHECKING:
    from sdxl_train.memory_tracker import MeasuredStep

_SIDE, _TINY_SIDE = 1024, 64  # px
_GIB = 2**30
_ALL_NOISE = {
    "noise_offset": 0.1,
    "multires_noise_iterations": 4,
    "ip_noise_gamma": 0.1,
    "v_pred_like_loss": 0.5,
    "debiased_estimation_loss": True,
    "max_grad_norm": 1.0,
}
_WAITS: dict[str, dict[str, object]] = {
    "AdaFactor, bf16 weights, fused backward, checkpointing": {"optimizer_type": "AdaFactor", "full_bf16": True, "fused_backward": True},
    "AdamW, bf16 weights, clipping, all noise and loss options": {"optimizer_type": "AdamW", "full_bf16": True, **_ALL_NOISE},
    "AdaFactor, fp32 weights, clipping, all noise and loss options": {"optimizer_type": "AdaFactor", **_ALL_NOISE},
}
_MEMORY: dict[str, tuple[dict[str, object], float]] = {
    "bf16 weights, AdaFactor, fused backward, batch 1": ({"full_bf16": True, "fused_backward": True}, 5.9),
    "bf16 weights, AdaFactor, fused backward, batch 16": ({"full_bf16": True, "fused_backward": True, "batch_size": 16}, 16.5),
    "fp32 weights, AdaFactor, fused backward, batch 1": ({"fused_backward": True}, 11.0),
    "fp32 weights, AdamW, batch 4": ({"optimizer_type": "AdamW", "batch_size": 4}, 41.5),
}


def wait_lines(folder: Path) -> Iterator[Line]:
    """C3, on a tiny SDXL: how often the host asks does not depend on sizes."""
    steps = in_own_process(measured, folder, True, list(_WAITS.values()))
    for what, step in zip(_WAITS, steps, strict=True):
        yield Line("C3", f"reads of the device in a step: {what}", 1, len(step.waits), "waits", goal=Goal(0))


def memory_lines(folder: Path, is_tiny: bool) -> Iterator[Line]:
    """C13: weights, gradients, optimizer state and activations of the U-Net."""
    from sdxl_train.memory_estimate import TEXT_ENCODERS, VAE

    steps = in_own_process(measured, folder, is_tiny, [keys for keys, _ in _MEMORY.values()])
    for (what, (_, limit)), step in zip(_MEMORY.items(), steps, strict=True):
        frozen = sum(step.bytes_by_part.get(part, 0) for part in (TEXT_ENCODERS, VAE))
        yield Line("C13", f"{what}, checkpointing", 1, (step.total - frozen) / _GIB, "GiB", goal=Goal(limit))
        yield Line("", "with the frozen text encoders and the VAE", 1, step.total / _GIB, "GiB")


# ---- this runs in a process of its own ----


def measured(folder: Path, is_tiny: bool, configurations: list[dict[str, object]]) -> list[MeasuredStep]:
    """A step of each, with gradient checkpointing and computation in bf16, on one picture or as many like it as a batch has."""
    from made_model import made_checkpoint

    from sdxl_train.config import load_settings
    from sdxl_train.console import Console
    from sdxl_train.data.indexing import build_index
    from sdxl_train.memory_tracker import measure_step
    from sdxl_train.model.architecture import SDXL
    from sdxl_train.model.tiny import tiny_architecture

    side = _TINY_SIDE if is_tiny else _SIDE
    images, toml = captioned_pictures(folder, (side, side), 1), folder / "meta.toml"
    base = made_checkpoint(tiny_architecture() if is_tiny else SDXL)
    shared = {"cpu": False, "resolution": side, "mixed_precision": "bf16", "gradient_checkpointing": True, "max_token_length": 75}

    def step(keys: dict[str, object]) -> MeasuredStep:
        write_config(toml, [images], **{**shared, **keys})
        settings, problems = load_settings(toml, needs=("data",)), []
        index = build_index(settings.config, settings.plugins, None, lambda text: None, problems).index
        assert not problems, problems
        return measure_step(settings, base, index, (side, side), Console())

    return [step(keys) for keys in configurations]
