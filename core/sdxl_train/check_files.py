"""What a training will write and what that needs on the disk, and which of its pictures are equal; without loading a tensor."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxl_train.data.index import pair
from sdxl_train.data.latent_file import file_digest
from sdxl_train.errors import ConfigError
from sdxl_train.memory_estimate import train_state_bytes
from sdxl_train.model.architecture import LATENT_CHANNELS, PX_PER_LATENT
from sdxl_train.model.key_names import POSITION_IDS
from sdxl_train.model.safetensors_header import DTYPE_BITS
from sdxl_train.model.weight_file import FLOAT_DTYPES, SAVE_PRECISIONS
from sdxl_train.plugin_discovery import OWN_DISTRIBUTION
from sdxl_train.state_directory import states_in
from sdxl_train.text_display import shown

if TYPE_CHECKING:
    from sdxl_train.config import Settings
    from sdxl_train.data.index import Index
    from sdxl_train.model.single_file import Checkpoint

_TRAINED_DTYPE = "F32"  # of the weights in training
_HEADER_BYTES = 100  # of a tensor's entry in a safetensors header, beside its name
_CACHE_HEAD_BYTES = 2400  # of a cache, beside its latents
_END_BYTES = 4096  # compared before whole files are: pixels, which differ where headers may be equal


@dataclass(frozen=True)
class SavePlan:
    """The models a training would save.

    Attributes:
        output_dir: as it would be now; nothing is made.
        steps: after which steps, ascending.
        first, last: their paths; None where nothing is saved.
        model_bytes: of one model, about.
        bytes: of all of them that are there at once: with `keep_models` one more than these, while it is written.
        state_bytes: of one train state, about; 0 where none are saved.
        states_bytes: of all that are there at once: one more than `keep_train_states`.
        free_bytes: on the disk of `output_dir`.
        disk_of: the folder that was asked for it: `output_dir`, or what is there of its parents.
        further_triggers: names of plugins that may ask for more.
    """

    output_dir: str
    steps: list[int]
    first: str | None
    last: str | None
    model_bytes: int
    bytes: int
    state_bytes: int
    states_bytes: int
    free_bytes: int
    disk_of: str
    further_triggers: list[str]


def planned_saves(settings: Settings, base: Checkpoint, output_dir: Path, steps_per_epoch: int, num_train_steps: int) -> SavePlan:
    """What `save_triggers` will ask for in a training that goes to its end.

    Raises:
        ConfigError: `output_dir` cannot be made there.
    """
    keys = settings.config
    disk_of = _existing(output_dir)
    if not (disk_of.is_dir() and os.access(disk_of, os.W_OK | os.X_OK)):
        raise ConfigError(f"output_dir: {shown(str(output_dir))} cannot be used: {shown(str(disk_of))} is no folder that can be written to")
    all_steps = save_steps(settings.values, steps_per_epoch, num_train_steps)
    steps = all_steps if keys.save_model else []
    paths = [
        str(output_dir / "models" / f"{keys.output_name}_ep{math.ceil(step / steps_per_epoch)}_step{step}.safetensors") for step in steps
    ]
    size = model_bytes(base, keys.save_precision)
    state = train_state_bytes(settings, base.architecture) if keys.save_train_state else 0
    further = [
        one.target.name for one in settings.plugins.of_key("save_triggers") if not one.target.origin.startswith(f"{OWN_DISTRIBUTION} ")
    ]
    return SavePlan(
        output_dir=str(output_dir),
        steps=steps,
        first=paths[0] if paths else None,
        last=paths[-1] if paths else None,
        model_bytes=size,
        bytes=size * _at_once(len(steps), keys.keep_models),
        state_bytes=state,
        states_bytes=state * _at_once(len(all_steps), keys.keep_train_states),
        free_bytes=shutil.disk_usage(disk_of).free,
        disk_of=str(disk_of),
        further_triggers=further,
    )


def _existing(path: Path) -> Path:
    """The folder, or what is there of its parents."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _at_once(num_saves: int, num_kept: int) -> int:
    return min(num_saves, num_kept + 1) if num_kept else num_saves


def refuse_full_disk(settings: Settings, base: Checkpoint, output_dir: Path) -> None:
    """Refuse to begin where the disk has no room for a model and for one train state more than are kept; those that are there count.

    Raises:
        ConfigError: with the bytes that are free and needed.
    """
    keys, triggers = settings.config, ("save_on_train_end", "save_on_keyboard_interrupt", "save_on_exception")
    periodic = ("save_every_n_steps", "save_every_n_epochs")
    if not any(settings.values.get(key) for key in (*triggers, *periodic)):
        return
    needed = model_bytes(base, keys.save_precision) if keys.save_model else 0
    if keys.save_train_state:
        there = min(len(states_in(output_dir)), keys.keep_train_states)
        needed += train_state_bytes(settings, base.architecture) * (keys.keep_train_states + 1 - there)
    free = shutil.disk_usage(_existing(output_dir)).free
    if free < needed:
        raise ConfigError(
            f"output_dir: the disk of {shown(str(output_dir))} has {free} bytes free, and a model and train states need {needed}; "
            "make room, or take a smaller save_precision, keep_train_states = 1, or save_train_state = false"
        )


def save_steps(values: Mapping[str, object], steps_per_epoch: int, num_train_steps: int) -> list[int]:
    """The steps after which the built-in triggers save: every n-th, the last of every n-th epoch, and the last of all."""
    steps: set[int] = set()
    for key, length in (("save_every_n_steps", 1), ("save_every_n_epochs", steps_per_epoch)):
        every = values.get(key)
        if isinstance(every, int) and every * length > 0:
            steps.update(range(every * length, num_train_steps + 1, every * length))
    if values.get("save_on_train_end") and num_train_steps > 0:
        steps.add(num_train_steps)
    return sorted(steps)


def model_bytes(base: Checkpoint, save_precision: str) -> int:
    """Of a saved model, exact but for the length of its header."""
    target = SAVE_PRECISIONS[save_precision]
    total = 0
    sizes = {entry.name: (_saved_dtype(base, entry.name, entry.part, target), entry.shape) for entry in base.entries}
    sizes |= {name: (_converted(source.dtype, target), source.shape) for name, source in base.tensors.items() if name not in sizes}
    for name, (dtype, shape) in sizes.items():
        total += math.prod(shape) * DTYPE_BITS[dtype] // 8 + len(name) + _HEADER_BYTES
    return total


def _saved_dtype(base: Checkpoint, name: str, part: str, target: str | None) -> str:
    if name == POSITION_IDS:
        return "I64"
    if part == "unet" or name not in base.tensors:
        return target or _TRAINED_DTYPE
    return _converted(base.tensors[name].dtype, target)


def _converted(dtype: str, target: str | None) -> str:
    return target if target and dtype in FLOAT_DTYPES else dtype


def latent_bytes(index: Index, row: int, flip_aug: bool) -> int:
    """Of the cache of a picture, about."""
    width, height = pair(index.bucket_sizes[row])
    return LATENT_CHANNELS * (width // PX_PER_LATENT) * (height // PX_PER_LATENT) * 4 * (2 if flip_aug else 1) + _CACHE_HEAD_BYTES


def space_warnings(wanted: Mapping[str, int]) -> list[str]:
    """Which disks have less room than what is to be written into these folders."""
    disks: dict[int, tuple[str, int]] = {}
    for folder, count in wanted.items():
        device = os.stat(folder).st_dev
        first, before = disks.get(device, (folder, 0))
        disks[device] = first, before + count
    free = {folder: shutil.disk_usage(folder).free for folder, _ in disks.values()}
    return [
        f"the disk of {shown(folder)} has {free[folder]} bytes free, and the models and caches of this training need {count}"
        for folder, count in disks.values()
        if count > free[folder]
    ]


def equal_files(index: Index, warnings: list[str]) -> list[list[str]]:
    """Pictures that are trained and have equal bytes, in groups; only files of one length are read.

    Args:
        warnings: gets each file that cannot be read now.
    """

    def end(row: int) -> bytes:
        with open(index.image_paths[row], "rb", buffering=0) as file:
            file.seek(max(0, int(index.stamps[row, 0]) - _END_BYTES))
            return file.read(_END_BYTES)

    rows = np.flatnonzero((index.num_repeats > 0) & (index.image_paths.lengths > 0)).tolist()
    groups = _equal(rows, lambda row: int(index.stamps[row, 0]), warnings)
    for property_of in (end, lambda row: file_digest(index.image_paths[row])):
        groups = [smaller for group in groups for smaller in _equal(group, property_of, warnings)]
    return [[index.image_paths[row] for row in group] for group in groups]


def _equal(rows: Iterable[int], property_of: Callable[[int], Hashable], warnings: list[str]) -> list[list[int]]:
    """The groups of two and more rows that have a property in common."""
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        try:
            groups.setdefault(property_of(row), []).append(row)
        except OSError as error:
            warnings.append(f"not compared with the other pictures: {shown(str(error.filename))}: {error.strerror}")
    return [group for group in groups.values() if len(group) > 1]
