"""What a resumed run needs to go on as if it had never stopped: taken from a run, written, read, and put into a new run.

    weights.safetensors     trained parameters, in the dtype they train in
    optimizer.safetensors   tensors of the optimizer's state, by parameter name
    other.safetensors       tensors of the loss recorder, the epoch's loss and plugins
    state.json              everything else

Draws need nothing: each is a function of the seed and its place. Schedules need nothing: they are made anew and set to their position.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdxl_train.errors import CheckpointError, SdxlTrainError
from sdxl_train.model.saving import is_finite
from sdxl_train.model.weight_file import TensorToWrite, WeightFile, dtype_name, write_safetensors
from sdxl_train.networks import trained_by_name, trained_values
from sdxl_train.optimizer_state import load_optimizer_state, optimizer_state
from sdxl_train.state_directory import staged_state
from sdxl_train.state_tree import packed, unpacked

if TYPE_CHECKING:
    from sdxl_train.data.index import Index
    from sdxl_train.run import Run

STATE_NAME = "state.json"
VERSION = 1  # of the layout; a state of another version is not read
_WEIGHTS, _OPTIMIZER, _OTHER = "weights.safetensors", "optimizer.safetensors", "other.safetensors"


@dataclass
class Snapshot:
    """A run as it is after some step, on the CPU; nothing of it changes any more.

    Attributes:
        name: of its files: `<output_name>_ep<E>_step<S>`.
        weights: the trained parameters by part and name.
        tensors: all other tensors, by file and name.
        state: what goes into `state.json`.
    """

    name: str
    step: int
    weights: Mapping[str, Mapping[str, Tensor]]
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of the state on the disk, but for headers and JSON."""
        groups = (*self.weights.values(), *self.tensors.values())
        return sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())


class Snapshotter:
    """Copies a run into memory of the host that is kept and used again: one snapshot at a time is valid."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, run: Run, with_state: bool) -> Snapshot:
        """Copy the weights, and all else that a train state needs if one is wanted; wait for the device once."""
        state, tensors = _gathered(run) if with_state else ({}, {})
        weights = {part: self._copies(part, values) for part, values in trained_values(run.networks).items() if values}
        copies = {file: self._copies(file, values) for file, values in tensors.items()}
        if run.device.type == "cuda":
            torch.cuda.current_stream(run.device).synchronize()
        return Snapshot(save_name(run), run.step, weights, copies, state)

    def _copies(self, where: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._copy(f"{where}/{name}", tensor) for name, tensor in tensors.items()}

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)


def save_name(run: Run) -> str:
    """`<output_name>_ep<E>_step<S>`: S completed steps, E the epoch of the last of them."""
    return f"{run.parts.keys.output_name}_ep{run.epoch_of_step}_step{run.step}"


def _gathered(run: Run) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """(state.json, tensors by file), not copied yet."""
    parts = run.parts
    of_optimizer: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}
    names = parameter_names(run)
    state = {
        "version": VERSION,
        "step": run.step,
        "epoch": run.epoch,
        "epoch_is_open": run.epoch_is_open,
        "dropped_steps": run.dropped_steps,
        "dropped_in_a_row": run.dropped_in_a_row,
        "must_match": must_match(run),
        "config": json.loads(json.dumps(dict(run.config), default=str)),
        "environment": environment(run),
        "time": time.time(),
        "optimizer": packed(optimizer_state(run.optimizer, names), of_optimizer, "optimizer"),
        "first_groups": packed(parts.first_groups, {}, "first_groups"),
        "update": packed(parts.update.state_dict(), other, "update"),
        "recorder": packed(parts.recorder.state_dict(), other, "recorder"),
        "epoch_loss": packed(parts.epoch_loss.state_dict(), other, "epoch_loss"),
        "plugins": packed(parts.plugins.state_dict(), other, "plugins"),
    }
    return state, {_OPTIMIZER: of_optimizer, _OTHER: other}


def parameter_names(run: Run) -> dict[int, str]:
    """The name of each parameter by its `id`: "unet.conv_in.weight"."""
    return {id(value): name for name, value in trained_by_name(run.networks).items()}


def must_match(run: Run) -> dict[str, Any]:
    """What has to be the same, or a run cannot be gone on with."""
    keys = run.parts.keys
    return {
        "data": data_digest(run.parts.index),
        "batch_size": keys.batch_size,
        "micro-batches of a step over all processes": keys.gradient_accumulation_steps,
        "seed": keys.seed,
        "trained parameters": _digest(sorted(parameter_names(run).values())),
        "steps of an epoch": run.steps_per_epoch,
        # An optimizer that goes on with the states of another class names it.
        "optimizer": getattr(run.optimizer, "state_class", f"{type(run.optimizer).__module__}.{type(run.optimizer).__qualname__}"),
    }


def data_digest(index: Index) -> str:
    """Changes with the keys, repeats and buckets of the data: with what the batches of an epoch are made of."""
    digest = blake2b(digest_size=16)
    for array in (index.keys.buffer, index.keys.ends, index.num_repeats, index.bucket_sizes):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _digest(names: Iterable[str]) -> str:
    return blake2b("\0".join(names).encode(), digest_size=16).hexdigest()


def environment(run: Run) -> dict[str, Any]:
    """What decides, besides the configuration, whether sums are rounded alike."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"{run.device.type}, {platform.machine()}"
    return {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}


def write_state(snapshot: Snapshot, directory: Path) -> None:
    """Write a state, whole or not at all.

    Raises:
        OSError: from the file system.
        CheckpointError: weights that are not finite.
    """
    with staged_state(directory) as staging:
        weights = {f"{part}.{name}": value for part, values in snapshot.weights.items() for name, value in values.items()}
        files = {_WEIGHTS: {name: _to_write(value, weight=name) for name, value in weights.items()}}
        for name, tensors in snapshot.tensors.items():
            files[name] = {key: _to_write(tensor) for key, tensor in tensors.items()}
        for name, tensors in files.items():
            with staging.file(name) as file:
                write_safetensors(file, tensors, {})
        staging.write_json(STATE_NAME, snapshot.state)


def _to_write(tensor: Tensor, weight: str | None = None) -> TensorToWrite:
    """Args: weight: the name of one, which must be finite; moments of an optimizer need not be."""

    def values() -> Tensor:
        if weight is not None and not is_finite(tensor):
            raise CheckpointError(f"not saved: {weight} holds values that are not finite")
        return tensor

    return TensorToWrite(dtype_name(tensor.dtype), tuple(tensor.shape), values)


class SavedState:
    """A state on the disk whose files have been verified.

    Attributes:
        json: the content of `state.json`.
    """

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            CheckpointError: it is of another version, or not such a state.
        """
        self.directory = directory
        try:
            self.json: dict[str, Any] = json.loads((directory / STATE_NAME).read_bytes())
            version = self.json["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory / STATE_NAME} is no train state: {error}") from error
        if version != VERSION:
            raise CheckpointError(f"{directory}: a train state of version {version}; this program reads version {VERSION}")

    @property
    def step(self) -> int:
        return self.json["step"]

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters by "part.name", as views of the file."""
        return self._tensors(_WEIGHTS)

    def tree(self, name: str) -> Any:
        """One entry of `state.json` with its tensors, which may be changed."""
        file = _OPTIMIZER if name == "optimizer" else _OTHER
        return unpacked(self.json[name], {key: tensor.clone() for key, tensor in self._tensors(file).items()})

    def _tensors(self, name: str) -> dict[str, Tensor]:
        file = WeightFile(str(self.directory / name))
        return {key: file.read(key) for key in file.header.tensors}


@contextmanager
def making_sense_of(saved: SavedState) -> Iterator[None]:
    """Around what reads a state whose files are those of its manifest, but may have been written by anybody.

    Raises:
        CheckpointError: entries are missing, or are not what belongs there.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{saved.directory}: its files are whole, but hold no state of this training ({found})") from error


def refuse_state_that_cannot_be_kept(run: Run) -> None:
    """After the first step, when the optimizer has its state: better now than at the first save.

    Raises:
        SdxlTrainError: it holds what no file of a train state can.
    """
    try:
        packed(optimizer_state(run.optimizer, parameter_names(run)), {}, "optimizer")
    except TypeError as error:
        name = type(run.optimizer).__name__
        raise SdxlTrainError(f"{error}. {name} cannot be resumed: choose another optimizer, or set save_train_state = false") from error


def restore(run: Run, saved: SavedState) -> None:
    """Put a state into a run that was built from the configuration. What must match has been compared before."""
    weights = saved.weights()
    with torch.no_grad():
        for name, value in trained_by_name(run.networks).items():
            value.copy_(weights[name])
    parts = run.parts
    first_groups = unpacked(saved.json["first_groups"], {})
    load_optimizer_state(run.optimizer, parameter_names(run), saved.tree("optimizer"), first_groups, parts.first_groups)
    parts.update.load_state_dict(saved.tree("update"))
    parts.recorder.load_state_dict(saved.tree("recorder"))
    parts.epoch_loss.load_state_dict(saved.tree("epoch_loss"))
    parts.plugins.load_state_dict(saved.tree("plugins"))
    run.step, run.epoch = saved.step, saved.json["epoch"]
    run.epoch_is_open = saved.json["epoch_is_open"]
    run.dropped_steps, run.dropped_in_a_row = saved.json["dropped_steps"], saved.json["dropped_in_a_row"]
