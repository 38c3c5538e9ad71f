"""Opening SDXL models: the single-file layout and diffusers directories, checked tensor by tensor and read when asked.

Opening reads headers only and needs no torch; the `load_*` functions build the networks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sdxl_train.errors import CheckpointError
from sdxl_train.model.architecture import CONTEXT_LENGTH, Architecture, architecture_from_configs, architecture_from_shapes
from sdxl_train.model.blank import blank_text_encoder, blank_text_encoder_2, blank_unet, blank_vae
from sdxl_train.model.key_names import LOGIT_SCALE, POSITION_IDS, PREFIXES, Entry, PartName, file_entries, module_name, vae_entries
from sdxl_train.model.weight_file import FLOAT_DTYPES, TensorSource, WeightFile

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    Network = TypeVar("Network", bound=torch.nn.Module)

V_PREDICTION_MARKER = "v_pred"
ZERO_TERMINAL_SNR_MARKER = "ztsnr"

_MAX_LISTED = 8
_MAX_JSON_BYTES = 2**20
_VAE_TREES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# Names of the VAE's attention in files of diffusers before 0.18.
_OLD_ATTENTION_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete SDXL model on disk, its tensors unread.

    `tensors` holds every tensor by its single-file name: those of the four networks, and unknown ones outside their prefixes, which are
    kept. `prediction_type` and `zero_terminal_snr` are what the files say about themselves; None where they say nothing.
    """

    path: str
    architecture: Architecture
    tensors: Mapping[str, TensorSource]
    metadata: Mapping[str, str]
    prediction_type: str | None
    zero_terminal_snr: bool | None

    @property
    def entries(self) -> list[Entry]:
        return file_entries(self.architecture)

    def read(self, name: str) -> Tensor:
        """The tensor of that single-file name as the file holds it; possibly a view of the file."""
        return self.tensors[name].read()


def open_checkpoint(path: str, vae: str | None = None) -> Checkpoint:
    """Opens a single-file SDXL model or a diffusers directory, and checks names, shapes and dtypes of all tensors.

    Args:
        path: file or directory; symbolic links are followed to the real path.
        vae: replaces the model's VAE: a VAE-only file with LDM or diffusers names, a full checkpoint, or a diffusers directory.
    Raises:
        CheckpointError: missing, unreadable, a pickle, or not SDXL; tensors missing, unknown or misshapen, by name.
    """
    real_path = _existing(path)
    checkpoint = _open_directory(real_path) if os.path.isdir(real_path) else _open_file(real_path)
    return checkpoint if vae is None else _with_vae(checkpoint, _existing(vae))


def _existing(path: str) -> str:
    if not path or "\0" in path or not os.path.exists(path):
        raise CheckpointError(f"{path!r}: no such file or directory")
    return os.path.realpath(path)


# The single file


def _open_file(path: str) -> Checkpoint:
    file = WeightFile(path)
    shapes = {name: info.shape for name, info in file.header.tensors.items()}
    metadata = file.header.metadata
    try:
        architecture = architecture_from_shapes(shapes, metadata)
    except ValueError as error:
        raise CheckpointError(f"{path}: not an SDXL model: {error}{_hint(shapes)}") from error
    entries = file_entries(architecture)
    prefixes = tuple(PREFIXES.values())
    found = {name: (file, name) for name in shapes if name.startswith(prefixes)}
    tensors = _match(path, entries, found)
    others = {name: info for name, info in file.header.tensors.items() if not name.startswith(prefixes)}
    tensors |= {name: TensorSource(((file, name),), info.dtype, info.shape) for name, info in others.items()}
    prediction_type, zero_terminal_snr = _marks(tensors, metadata)
    return Checkpoint(path, architecture, tensors, metadata, prediction_type, zero_terminal_snr)


def _hint(names: Mapping[str, object]) -> str:
    known = {
        "cond_stage_model.": "Stable Diffusion 1 or 2",
        "lora_unet_": "a LoRA",
        "down_blocks.": "a U-Net with diffusers names; give the diffusers directory instead",
        "unet.": "all networks with diffusers names; give the diffusers directory instead",
        "conditioner.embedders.0.model.": "the SDXL refiner",
        "encoder.down.": "a VAE",
    }
    for prefix, what in known.items():
        if any(name.startswith(prefix) for name in names):
            return f" (it looks like {what})"
    return ""


def _marks(names: Mapping[str, object], metadata: Mapping[str, str]) -> tuple[str | None, bool | None]:
    """What tensors, else metadata, say about prediction type and zero terminal SNR."""
    stated = metadata.get("prediction_type") or metadata.get("modelspec.prediction_type")
    prediction_type = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(stated or "")
    zero_terminal_snr = {"true": True, "false": False}.get(metadata.get("zero_terminal_snr", "").lower())
    if V_PREDICTION_MARKER in names:
        prediction_type = "v_prediction"
    if ZERO_TERMINAL_SNR_MARKER in names:
        zero_terminal_snr = True
    return prediction_type, zero_terminal_snr


# The diffusers directory


def _open_directory(path: str) -> Checkpoint:
    parts: tuple[PartName, ...] = ("unet", "vae", "text_encoder", "text_encoder_2")
    if absent := [part for part in parts if not os.path.isdir(os.path.join(path, part))]:
        raise CheckpointError(f"{path}: not a diffusers directory of SDXL: it has no folder {', '.join(absent)}")
    configs = {part: _read_json(os.path.join(path, part, "config.json")) for part in parts}
    try:
        architecture = architecture_from_configs(configs)
    except ValueError as error:
        raise CheckpointError(f"{path}: not an SDXL model: {error}") from error
    _check_latent_scale(path, configs["vae"])
    tensors: dict[str, TensorSource] = {}
    for part in parts:
        folder = os.path.join(path, part)
        entries = [entry for entry in file_entries(architecture) if entry.part == part]
        tensors |= _match_modules(folder, entries, _named_by_module(_weight_files(folder)))
    prediction_type = zero_terminal_snr = None
    scheduler = os.path.join(path, "scheduler", "scheduler_config.json")
    if os.path.exists(scheduler):
        config = _read_json(scheduler)
        prediction_type = config.get("prediction_type") if config.get("prediction_type") in ("epsilon", "v_prediction") else None
        zero_terminal_snr = True if config.get("rescale_betas_zero_snr") is True else None
    return Checkpoint(path, architecture, tensors, {}, prediction_type, zero_terminal_snr)


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(_MAX_JSON_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return found


def _weight_files(folder: str) -> list[WeightFile]:
    """The weights of one network: one file, or the shards that its index lists. Of several variants the one without a name is taken."""
    whole = [path for path in Path(folder).glob("*.safetensors") if "-of-" not in path.name]
    choices = sorted([*whole, *Path(folder).glob("*.safetensors.index*.json")], key=lambda path: (len(path.name), path.name))
    if not choices:
        raise CheckpointError(f"{folder}: it holds no .safetensors file (pickled weights, .bin or .ckpt, are not read)")
    if choices[0].suffix == ".safetensors":
        return [WeightFile(_existing(str(choices[0])))]
    names = _read_json(str(choices[0])).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and name == os.path.basename(name) for name in names.values()):
        raise CheckpointError(f"{choices[0]}: its weight_map does not list files of the same folder")
    return [WeightFile(_existing(os.path.join(folder, name))) for name in sorted(set(names.values()))]


def _named_by_module(files: list[WeightFile]) -> dict[str, tuple[WeightFile, str]]:
    found = {}
    for file in files:
        for name in file.header.tensors:
            module = module_name(name)
            for old, new in _OLD_ATTENTION_NAMES.items():
                module = module.replace(old, new) if "attentions." in module else module
            if module != "embeddings.position_ids":
                found[module] = (file, name)
    return found


# The VAE in place of the model's own


def _with_vae(checkpoint: Checkpoint, path: str) -> Checkpoint:
    if os.path.isdir(path):
        folder = os.path.join(path, "vae") if os.path.isdir(os.path.join(path, "vae")) else path
        config = os.path.join(folder, "config.json")
        if os.path.exists(config):
            _check_latent_scale(folder, _read_json(config))
        files = _weight_files(folder)
    else:
        files = [WeightFile(path)]
    entries = list(vae_entries(checkpoint.architecture))
    prefix = PREFIXES["vae"]
    names = [name for file in files for name in file.header.tensors]
    if any(name.startswith((prefix, "encoder.down.")) for name in names):
        file = files[0]
        full = any(name.startswith(prefix) for name in names)
        found = {name if full else prefix + name: (file, name) for name in names if not full or name.startswith(prefix)}
        tensors = _match(path, entries, {n: piece for n, piece in found.items() if n.removeprefix(prefix).startswith(_VAE_TREES)})
    elif any(name.startswith("encoder.down_blocks.") for name in names):
        found = {name: piece for name, piece in _named_by_module(files).items() if name.startswith(_VAE_TREES)}
        tensors = _match_modules(path, entries, found)
    else:
        raise CheckpointError(f"{path}: vae: no VAE in it (neither first_stage_model.* nor encoder.* tensors)")
    others = {name: source for name, source in checkpoint.tensors.items() if not name.startswith(prefix)}
    return replace(checkpoint, tensors=others | tensors)


def _check_latent_scale(path: str, config: Mapping[str, Any]) -> None:
    # The VAE of Stable Diffusion 1 has the same shapes but another latent space: only this number tells.
    scale = config.get("scaling_factor", 0.13025)
    if scale != 0.13025:
        raise CheckpointError(f"{path}: its VAE has the scaling_factor {scale}, SDXL's is 0.13025: it belongs to another model")


# Matching what is there with what must be there


def _match(path: str, entries: list[Entry], found: Mapping[str, tuple[WeightFile, str]]) -> dict[str, TensorSource]:
    """Pairs entries with tensors that have single-file names."""
    shapes = {
        entry.name: {entry.shape, entry.module_shape} if entry.name.startswith(PREFIXES["vae"]) else {entry.shape} for entry in entries
    }
    shapes.pop(POSITION_IDS, None)  # a constant of which files hold several dtypes and shapes: written by us
    found = {name: piece for name, piece in found.items() if name != POSITION_IDS}
    _report_differences(path, shapes, found, optional={LOGIT_SCALE})
    return {
        entry.name: TensorSource((found[entry.name],), _dtype(found[entry.name]), entry.shape) for entry in entries if entry.name in found
    }


def _match_modules(path: str, entries: list[Entry], found: Mapping[str, tuple[WeightFile, str]]) -> dict[str, TensorSource]:
    """Pairs entries with tensors that have diffusers' or transformers' names."""
    shapes = {
        module: {entry.module_shape, entry.shape} if entry.part == "vae" else {entry.module_shape}
        for entry in entries
        for module in entry.modules
    }
    _report_differences(path, shapes, found, optional=set())
    sources = {}
    for entry in entries:
        if entry.modules:
            pieces = tuple(found[module] for module in entry.modules)
            dtypes = {_dtype(piece) for piece in pieces}
            dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
            sources[entry.name] = TensorSource(pieces, dtype, entry.shape, entry.transposed)
    return sources


def _dtype(piece: tuple[WeightFile, str]) -> str:
    file, name = piece
    return file.header.tensors[name].dtype


def _report_differences(
    path: str, shapes: Mapping[str, set[tuple[int, ...]]], found: Mapping[str, tuple[WeightFile, str]], optional: set[str]
) -> None:
    missing = [name for name in shapes if name not in found and name not in optional]
    unknown = [name for name in found if name not in shapes]
    misshapen, wrong_dtypes = [], []
    for name in shapes:
        if name in found:
            file, key = found[name]
            info = file.header.tensors[key]
            if info.shape not in shapes[name]:
                misshapen.append(f"{name} {list(info.shape)} instead of {list(max(shapes[name], key=len))}")
            elif info.dtype not in FLOAT_DTYPES:
                wrong_dtypes.append(f"{name} {info.dtype}")
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_MAX_LISTED])}{', …' if len(names) > _MAX_LISTED else ''}"
        for names, what in (
            (missing, "missing"),
            (unknown, "unknown"),
            (misshapen, "of another shape"),
            (wrong_dtypes, "neither float16, bfloat16 nor float32"),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{path}: its tensors are not those of SDXL: {'; '.join(problems)}")


# The networks


def load_unet(checkpoint: Checkpoint, dtype: torch.dtype) -> UNet2DConditionModel:
    """Builds the U-Net on the CPU, in its own memory."""
    return _filled(blank_unet(checkpoint.architecture), checkpoint, "unet", dtype)


def load_vae(checkpoint: Checkpoint, dtype: torch.dtype) -> AutoencoderKL:
    """Builds the VAE on the CPU, in its own memory."""
    return _filled(blank_vae(checkpoint.architecture), checkpoint, "vae", dtype)


def load_text_encoders(
    checkpoint: Checkpoint, dtype: torch.dtype, dtype_2: torch.dtype | None = None
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Builds both text encoders on the CPU, in their own memory. `dtype_2`: of the second one; None takes `dtype`."""
    first = _filled(blank_text_encoder(checkpoint.architecture), checkpoint, "text_encoder", dtype)
    return first, _filled(blank_text_encoder_2(checkpoint.architecture), checkpoint, "text_encoder_2", dtype_2 or dtype)


def _filled(network: Network, checkpoint: Checkpoint, part: PartName, dtype: torch.dtype) -> Network:
    """A network from the meta device with the values of the checkpoint."""
    import torch

    values = module_tensors(checkpoint, part)
    names = list(network.state_dict())
    # Cloned: weights that are trained must not be views of the file.
    state = {name: values[module_name(name)]().to(dtype, copy=True).contiguous() for name in names}
    network.load_state_dict(state, strict=True, assign=True)
    for module in network.modules():
        if hasattr(module, "position_ids"):  # a buffer outside the state dict, still on the meta device
            module.register_buffer("position_ids", torch.arange(CONTEXT_LENGTH).unsqueeze(0), persistent=False)
    assert not any(tensor.is_meta for tensor in [*network.parameters(), *network.buffers()])
    return network.eval()


def module_tensors(checkpoint: Checkpoint, part: PartName) -> dict[str, Callable[[], Tensor]]:
    """Readers of one network's tensors by their names inside the module (without `text_model.`)."""

    def reader(entry: Entry, index: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tensor = checkpoint.read(entry.name)
            tensor = tensor.T if entry.transposed else tensor
            return tensor.chunk(len(entry.modules))[index].reshape(entry.module_shape)

        return read

    return {
        module: reader(entry, index) for entry in checkpoint.entries if entry.part == part for index, module in enumerate(entry.modules)
    }


def vae_encoder_digest(checkpoint: Checkpoint) -> bytes:
    """16 bytes of BLAKE2b over names and float32 values of the VAE's encoding half: equal for equal values in whatever file and layout."""
    digest = blake2b(digest_size=16)
    for entry in sorted(vae_entries(checkpoint.architecture), key=lambda entry: entry.name):
        if entry.name.startswith((PREFIXES["vae"] + "encoder.", PREFIXES["vae"] + "quant_conv.")):
            digest.update(entry.name.encode() + b"\0")
            digest.update(_as_float32(checkpoint.tensors[entry.name]).data)
    return digest.digest()


def _as_float32(source: TensorSource) -> NDArray[np.float32]:
    """The values of a tensor of the VAE, read without torch."""
    ((file, name),) = source.pieces  # none of them is put together from several
    info = file.header.tensors[name]
    words = np.fromfile(file.path, {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}[info.dtype], math.prod(info.shape), offset=info.begin)
    return (words.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else words.astype(np.float32)
