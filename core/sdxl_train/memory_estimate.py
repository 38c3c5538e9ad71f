"""The memory that a step needs at its peak, by parts: a closed form of architecture and keys, without torch.

It follows a step as `memory_tracker` measures it: what each layer keeps for its backward pass, what gradient checkpointing keeps instead
and computes again, and which gradients are there by the time the backward pass reaches a layer. The rounding of the allocator and the
workspaces of kernels are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.kept_activations import Computation, Unit, text_units, unet_units, vae_encoder_bytes
from sdxl_train.learning_rates import block_of
from sdxl_train.model.architecture import Architecture
from sdxl_train.model.attention import active_backend
from sdxl_train.model.key_names import PREFIXES, TRAINABLE_PARTS, file_entries
from sdxl_train.optimizer_memory import OptimizerMemory, optimizer_memory
from sdxl_train.step_costs import Trained, num_parameters

if TYPE_CHECKING:
    from sdxl_train.config import Settings

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS = "weights", "gradients", "optimizer state", "activations"
WEIGHT_COPIES, TEXT_ENCODERS, VAE, CONTEXT = "autocast weight copy", "text encoders", "VAE", "CUDA context"
CONTEXT_BYTES = int(0.7 * 2**30)
_BYTES = {"no": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Attributes:
        bytes_by_part: at the peak of a step; parts without bytes are left out.
        size, batch_size: the bucket (w, h) in px and the batch it is for.
        optimizer_is_known: False: its state is counted as 8 bytes a parameter.
    """

    bytes_by_part: dict[str, int]
    size: tuple[int, int]
    batch_size: int
    optimizer_is_known: bool

    @property
    def total(self) -> int:
        return sum(self.bytes_by_part.values())

    def __str__(self) -> str:
        unknown = "" if self.optimizer_is_known else "; unknown optimizer state counted as 8 bytes a parameter"
        return shown_parts(self.bytes_by_part) + unknown


def shown_parts(bytes_by_part: Mapping[str, int]) -> str:
    """ "10.3 GiB = weights 9.6 + text encoders 0.7": the largest part first, those that round to 0.0 left out."""
    parts = sorted(bytes_by_part.items(), key=lambda part: -part[1])
    shown = " + ".join(f"{name} {_gib(size)}" for name, size in parts if _gib(size) != "0.0")
    return f"{_gib(sum(bytes_by_part.values()))} GiB" + (f" = {shown}" if shown else "")


def largest_bucket(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Of buckets of (w, h) px the one with the most px."""
    return max(sizes, key=lambda size: (size[0] * size[1], size))


def estimate_memory(settings: Settings, architecture: Architecture, size: tuple[int, int]) -> MemoryEstimate:
    """The peak of a step with a full batch.

    Args:
        size: (w, h) in px of its bucket; the largest one needs the most.
    """
    keys = settings.config
    compute = _BYTES[keys.mixed_precision]
    weight = compute if keys.full_bf16 or keys.full_fp16 else 4
    trained = Trained.of(keys)
    choice = next(choice for choice in settings.plugins.choices if choice.key == "optimizer_type")
    optimizer = optimizer_memory(choice.name, choice.options, weight)
    computation = Computation(weight, compute, keys.gradient_checkpointing, active_backend(settings.values) == "plain")

    counts = num_parameters(architecture)
    parts: Counter[str] = Counter({CONTEXT: CONTEXT_BYTES})
    parts[WEIGHTS] = counts["unet"] * (weight if trained.blocks else compute)
    for name, is_trained in zip(TRAINABLE_PARTS[1:], (trained.text_encoder, trained.text_encoder_2), strict=True):
        parts[TEXT_ENCODERS] += counts[name] * (weight if is_trained else compute)
    parts[VAE] = counts["vae"] * (4 if keys.no_half_vae else compute)
    shapes = _trained_shapes(architecture, trained)
    parts[OPTIMIZER] = int(sum(optimizer.state(shape) for shape in shapes))

    units = text_units(architecture, trained, keys.max_token_length, computation)
    units += unet_units(architecture, size, keys.max_token_length + 2, trained, computation)
    step = _Step(
        batch_size=keys.batch_size,
        computation=computation,
        optimizer=optimizer,
        is_fused=keys.fused_backward,
        accumulates=keys.gradient_accumulation_steps > 1,
        num_trained=sum(math.prod(shape) for shape in shapes),
        num_stacked=_largest_stack(shapes, optimizer.stack),
    )
    peak = step.peak(units)
    if not keys.cache_latents:
        encoding = keys.batch_size * vae_encoder_bytes(architecture, size, 4 if keys.no_half_vae else compute)
        peak = max(peak, Counter({ACTIVATIONS: encoding}), key=Counter.total)
    parts += peak
    return MemoryEstimate({name: size for name, size in parts.items() if size}, size, keys.batch_size, optimizer.is_known)


def train_state_bytes(settings: Settings, architecture: Architecture) -> int:
    """Of a train state on the disk: weights in the dtype they train in, and the optimizer's state (8 bytes a parameter if unknown)."""
    keys = settings.config
    weight = _BYTES[keys.mixed_precision] if keys.full_bf16 or keys.full_fp16 else 4
    choice = next(choice for choice in settings.plugins.choices if choice.key == "optimizer_type")
    optimizer = optimizer_memory(choice.name, choice.options, weight)
    return int(sum(math.prod(shape) * weight + optimizer.state(shape) for shape in _trained_shapes(architecture, Trained.of(keys))))


def _trained_shapes(architecture: Architecture, trained: Trained) -> list[tuple[int, ...]]:
    """Of all tensors that are trained, as the networks hold them."""
    shapes: list[tuple[int, ...]] = []
    for entry in file_entries(architecture):
        is_trained = {"unet": True, "text_encoder": trained.text_encoder, "text_encoder_2": trained.text_encoder_2, "vae": False}[
            entry.part
        ]
        if entry.part == "unet":
            is_trained = block_of(entry.name.removeprefix(PREFIXES["unet"])) in trained.blocks
        if is_trained:
            shapes += [entry.module_shape] * len(entry.modules)
    return shapes


def _largest_stack(shapes: list[tuple[int, ...]], limit: int) -> int:
    """Numbers in the largest stack of tensors of one shape, of which each holds as many as the limit has room for, and at least one."""
    counts = Counter(shapes)
    return max((math.prod(shape) * max(1, min(count, limit // math.prod(shape))) for shape, count in counts.items()), default=0)


@dataclass(frozen=True)
class _Step:
    """
    Attributes:
        is_fused: `fused_backward`.
        accumulates: gradients of an earlier micro-batch are there from the start.
        num_trained, num_stacked: numbers in all tensors that are trained, and in those that are updated at once.
    """

    batch_size: int
    computation: Computation
    optimizer: OptimizerMemory
    is_fused: bool
    accumulates: bool
    num_trained: int
    num_stacked: int

    def peak(self, units: list[Unit]) -> Counter[str]:
        """Of what comes and goes in a step, when it is most: in the backward pass of a unit, or in the update."""
        computation, weight = self.computation, self.computation.weight_bytes
        peak = Counter[str]()
        if not self.is_fused:
            peak = Counter({GRADIENTS: self.num_trained * weight, ACTIVATIONS: int(self.num_stacked * self.optimizer.update)})
        kept = sum(unit.kept for unit in units)
        copies = 0 if computation.checkpoints else sum(unit.copied for unit in units)
        gradients = self.num_trained * weight if self.accumulates else 0
        for unit in reversed(units):
            work = self.batch_size * (kept + unit.again + unit.work)
            now = Counter({ACTIVATIONS: work, WEIGHT_COPIES: copies or unit.copied, GRADIENTS: gradients})
            peak = max(peak, now, key=Counter.total)
            if self.is_fused:
                updated = self.batch_size * (kept + unit.again // 2) + int(unit.largest * self.optimizer.update)
                now = Counter({ACTIVATIONS: updated, WEIGHT_COPIES: copies or unit.copied, GRADIENTS: unit.largest * weight})
                peak = max(peak, now, key=Counter.total)
            elif not self.accumulates:
                gradients += unit.gradients
            kept -= unit.kept
            copies -= 0 if computation.checkpoints else unit.copied
        return peak


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
