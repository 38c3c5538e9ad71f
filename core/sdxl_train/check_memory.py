"""The memory of a training's steps, for `sdxl-train check`: predicted from headers, and measured on the meta device if that is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.memory_estimate import MemoryEstimate, estimate_memory, largest_bucket

if TYPE_CHECKING:
    from sdxl_train.config import Settings
    from sdxl_train.console import Console
    from sdxl_train.data.index import Index
    from sdxl_train.memory_tracker import MeasuredStep
    from sdxl_train.model.single_file import Checkpoint


@dataclass(frozen=True)
class MemoryPlan:
    """
    Attributes:
        predicted: the peak of a step with a full batch of the largest bucket, by a closed form.
        measured: the same step run on the meta device; None where that was not wanted.
    """

    predicted: MemoryEstimate
    measured: MeasuredStep | None


def planned_memory(settings: Settings, base: Checkpoint, index: Index, measure: bool, console: Console) -> MemoryPlan | None:
    """None where nothing is trained.

    Args:
        measure: run the step; this loads torch, and takes up to half a minute for SDXL.
    Raises:
        SdxlTrainError: the optimizer cannot do what the keys ask of it, or a plugin raised.
    """
    if not index.summary.buckets:
        return None
    size = largest_bucket(index.summary.buckets)
    predicted = estimate_memory(settings, base.architecture, size)
    if not measure:
        return MemoryPlan(predicted, None)
    from sdxl_train.memory_tracker import measure_step

    return MemoryPlan(predicted, measure_step(settings, base, index, size, console))
