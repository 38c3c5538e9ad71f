"""Steps of a configuration on the meta device, for a model of which there is only the architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from made_index import made_index

from sdxl_train.config import load_settings
from sdxl_train.console import Console
from sdxl_train.memory_estimate import MemoryEstimate, estimate_memory
from sdxl_train.memory_tracker import MeasuredStep, measure_step
from sdxl_train.model.architecture import Architecture
from sdxl_train.model.single_file import Checkpoint


def predicted(config: Callable[..., Path], architecture: Architecture, size: tuple[int, int], **keys: Any) -> MemoryEstimate:
    """The closed form for these keys and a full batch of that bucket."""
    return estimate_memory(load_settings(config(cpu=None, **keys)), architecture, size)


def measured(config: Callable[..., Path], architecture: Architecture, size: tuple[int, int], **keys: Any) -> MeasuredStep:
    """The same step, run."""
    base = Checkpoint("base", architecture, {}, {}, None, None)
    index = made_index({"a": {}}, ["a.png"], [size], [size])
    return measure_step(load_settings(config(cpu=None, **keys)), base, index, size, Console())
