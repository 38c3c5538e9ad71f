"""Writing SDXL models in the single-file layout, streamed tensor by tensor."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdxl_train.atomic import atomic_file
from sdxl_train.errors import CheckpointError
from sdxl_train.model.architecture import CONTEXT_LENGTH, METADATA_KEY
from sdxl_train.model.key_names import LOGIT_SCALE, POSITION_IDS, Entry, module_name
from sdxl_train.model.single_file import V_PREDICTION_MARKER, ZERO_TERMINAL_SNR_MARKER, Checkpoint
from sdxl_train.model.weight_file import (
    FLOAT_DTYPES,
    SAVE_PRECISIONS,
    TensorToWrite,
    WeightFile,
    dtype_name,
    torch_dtype,
    write_safetensors,
)

MARKERS = (V_PREDICTION_MARKER, ZERO_TERMINAL_SNR_MARKER)
_LOGIT_SCALE = math.log(100)  # where OpenCLIP's training clips it, and its value in SDXL


class NotSavedError(CheckpointError):
    """The disk refused a file; what was there before is untouched, and a later try may succeed."""


def file_metadata(*, step: int, epoch: int, prediction_type: str, zero_terminal_snr: bool, title: str, resolution: int) -> dict[str, str]:
    """The metadata of a saved model. `prediction_type` is epsilon or v_prediction, `resolution` in px."""
    return {
        "format": "pt",
        "step": str(step),
        "epoch": str(epoch),
        "prediction_type": prediction_type,
        "zero_terminal_snr": str(zero_terminal_snr).lower(),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "modelspec.resolution": f"{resolution}x{resolution}",
    }


def file_markers(prediction_type: str, zero_terminal_snr: bool) -> tuple[str, ...]:
    """The empty tensors by which ComfyUI recognises what a model predicts."""
    holds = {V_PREDICTION_MARKER: prediction_type == "v_prediction", ZERO_TERMINAL_SNR_MARKER: zero_terminal_snr}
    return tuple(name for name in MARKERS if holds[name])


def save_checkpoint(
    path: Path,
    base: Checkpoint,
    trained: Mapping[str, Mapping[str, Tensor]],
    save_precision: str,
    metadata: Mapping[str, str],
    markers: Collection[str] = (),
) -> dict[str, TensorToWrite]:
    """Writes a complete single-file model; `path` is whole or as it was.

    Args:
        base: gives every tensor that was not trained, converted once from the values it was loaded with.
        trained: state dict by part ("unet", "text_encoder", "text_encoder_2"); parameters that were frozen may be left out.
        save_precision: a key of SAVE_PRECISIONS; applies to floating-point tensors. "keep" writes each as it is held.
        metadata: as from `file_metadata`, with anything more.
        markers: those of MARKERS that hold. One in the base that does not hold any more is left out.
    Returns:
        what was written, for `written_faults`.
    Raises:
        CheckpointError: weights that are not finite in the saved precision.
        NotSavedError: the disk refused.
    """
    tensors = _plan(base, trained, SAVE_PRECISIONS[save_precision], markers)
    extra = {"format": "pt"}
    if (architecture := base.architecture.to_metadata()) is not None:
        extra[METADATA_KEY] = architecture
    write_atomically(path, tensors, {**metadata, **extra})
    return tensors


def written_faults(path: Path, tensors: Mapping[str, TensorToWrite]) -> list[str]:
    """Read a file back: what of it is not as it was to be written, in names, shapes, dtypes, or values that are not finite."""
    try:
        file = WeightFile(str(path))
    except (CheckpointError, OSError) as error:
        return [str(error)]
    found = {name: (info.dtype, tuple(info.shape)) for name, info in file.header.tensors.items()}
    wanted = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    faults = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    faults += [f"{name} was not to be there" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        if found[name] != wanted[name]:
            faults.append(f"{name} is {found[name]} in place of {wanted[name]}")
        elif found[name][0] in FLOAT_DTYPES and not is_finite(file.read(name)):
            faults.append(f"{name} is not finite")
    return faults


def write_atomically(path: Path, tensors: Mapping[str, TensorToWrite], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file that is whole or absent.

    Raises:
        NotSavedError: the operating system refused; with its reason, the bytes needed and those free.
    """
    try:
        with atomic_file(path) as temporary, open(temporary, "wb", buffering=0) as file:
            write_safetensors(file, tensors, metadata)
    except OSError as error:
        needed = sum(tensor.num_bytes for tensor in tensors.values())
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        reason = f"{os.strerror(error.errno) if error.errno else error}; {needed} bytes needed, {free} free"
        raise NotSavedError(f"{path}: cannot be saved: {reason}") from error


def _plan(
    base: Checkpoint, trained: Mapping[str, Mapping[str, Tensor]], dtype: str | None, markers: Collection[str]
) -> dict[str, TensorToWrite]:
    given = {part: {module_name(name): tensor for name, tensor in state.items()} for part, state in trained.items()}
    plan: dict[str, TensorToWrite] = {}
    for entry in base.entries:
        held = [given.get(entry.part, {}).pop(module, None) for module in entry.modules]
        pieces = [tensor for tensor in held if tensor is not None]
        if pieces:
            assert len(pieces) == len(entry.modules), f"{entry.name}: only a part of its rows is given"
            plan[entry.name] = _trained_tensor(entry, pieces, dtype)
        elif entry.name == POSITION_IDS:
            plan[entry.name] = TensorToWrite("I64", entry.shape, lambda: torch.arange(CONTEXT_LENGTH).reshape(1, -1))
        elif entry.name == LOGIT_SCALE and entry.name not in base.tensors:
            own_dtype = torch_dtype(dtype or "F32")
            plan[entry.name] = TensorToWrite(dtype or "F32", (), lambda dtype=own_dtype: torch.tensor(_LOGIT_SCALE, dtype=dtype))
        else:
            plan[entry.name] = _base_tensor(base, entry.name, dtype, checked=True)
    left = [f"{part}: {name}" for part, state in given.items() for name in state if not name.endswith("position_ids")]
    assert not left, f"trained tensors that no SDXL has: {left[:8]}"
    for name in base.tensors:
        if name not in plan and name not in MARKERS:
            plan[name] = _base_tensor(base, name, dtype, checked=False)
    for name in markers:
        kept = name in base.tensors
        plan[name] = _base_tensor(base, name, None, checked=False) if kept else TensorToWrite("F32", (0,), lambda: torch.empty(0))
    return plan


def _trained_tensor(entry: Entry, pieces: list[Tensor], dtype: str | None) -> TensorToWrite:
    target = torch_dtype(dtype) if dtype else pieces[0].dtype

    def values() -> Tensor:
        tensor = torch.cat([piece.detach().to(target) for piece in pieces]) if len(pieces) > 1 else pieces[0].detach().to(target)
        tensor = (tensor.T if entry.transposed else tensor).reshape(entry.shape)
        return _finite(entry.name, tensor).cpu()

    assert all(tuple(piece.shape) == entry.module_shape for piece in pieces), f"{entry.name}: shape {[piece.shape for piece in pieces]}"
    return TensorToWrite(dtype_name(target), entry.shape, values)


def _base_tensor(base: Checkpoint, name: str, dtype: str | None, checked: bool) -> TensorToWrite:
    source = base.tensors[name]
    if dtype is None or source.dtype == dtype or source.dtype not in FLOAT_DTYPES:
        return TensorToWrite(source.dtype, source.shape, source.read)
    target = torch_dtype(dtype)
    converted: Callable[[], Tensor] = lambda: source.read().to(target)  # noqa: E731
    return TensorToWrite(dtype, source.shape, (lambda: _finite(name, converted())) if checked else converted)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not is_finite(tensor):
        raise CheckpointError(f"not saved: {name} holds values that are not finite in {str(tensor.dtype).removeprefix('torch.')}")
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are, in one pass."""
    # NaN comes through as an extreme; one pass, where isfinite() takes several.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
