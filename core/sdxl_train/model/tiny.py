"""Small SDXL models in the real file layout with the real vocabulary: for tests, demos and benchmarks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdxl_train.model.architecture import METADATA_KEY, Architecture, TextArchitecture
from sdxl_train.model.key_names import LOGIT_SCALE, POSITION_IDS, Entry, file_entries
from sdxl_train.model.saving import write_atomically
from sdxl_train.model.weight_file import TensorToWrite, dtype_name


def tiny_architecture(
    *,
    unet_channels: tuple[int, ...] = (16, 32, 32),
    transformer_layers: tuple[int, ...] = (0, 1, 1),
    vae_channels: tuple[int, ...] = (8, 8, 16, 16),
    te_widths: tuple[int, int] = (16, 24),
    te_layers: tuple[int, int] = (3, 4),
    vae_norm_groups: int | None = None,
) -> Architecture:
    """Eight channels an attention head; widths are multiples of 8. `vae_norm_groups` absent: two channels a group where narrowest."""
    return Architecture(
        unet_channels=unet_channels,
        transformer_layers=transformer_layers,
        unet_heads=tuple(channels // 8 for channels in unet_channels),
        unet_norm_groups=math.gcd(*unet_channels) // 4,
        size_embedding_width=256,
        vae_channels=vae_channels,
        vae_norm_groups=vae_norm_groups or math.gcd(*vae_channels) // 2,
        text_encoder=TextArchitecture(te_widths[0], 4 * te_widths[0], te_layers[0], te_widths[0] // 8),
        text_encoder_2=TextArchitecture(te_widths[1], 4 * te_widths[1], te_layers[1], te_widths[1] // 8, projection=te_widths[1]),
    )


def write_tiny_sdxl(
    path: Path,
    *,
    unet_channels: tuple[int, ...] = (16, 32, 32),
    transformer_layers: tuple[int, ...] = (0, 1, 1),
    vae_channels: tuple[int, ...] = (8, 8, 16, 16),
    te_widths: tuple[int, int] = (16, 24),
    te_layers: tuple[int, int] = (3, 4),
    vae_norm_groups: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Entry, Tensor], Tensor] = lambda entry, drawn: drawn,
) -> Architecture:
    """Writes an untrained SDXL of small widths; the same arguments give the same bytes. About 11 MB in float32 by default.

    Every tensor is drawn from its own stream, also biases and norms, so that a tensor in a wrong place changes what the model computes.

    Args:
        change: makes the tensor that is written from the one that was drawn; both float32 (position ids int64), of the entry's shape.
    """
    architecture = tiny_architecture(
        unet_channels=unet_channels,
        transformer_layers=transformer_layers,
        vae_channels=vae_channels,
        te_widths=te_widths,
        te_layers=te_layers,
        vae_norm_groups=vae_norm_groups,
    )
    tensors = {
        entry.name: TensorToWrite(
            "I64" if entry.name == POSITION_IDS else dtype_name(dtype),
            entry.shape,
            lambda entry=entry: change(entry, _draw(entry, seed)).to(torch.int64 if entry.name == POSITION_IDS else dtype),
        )
        for entry in file_entries(architecture)
    }
    metadata = {"format": "pt", "modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.title": "tiny-sdxl"}
    if (hidden := architecture.to_metadata()) is not None:
        metadata[METADATA_KEY] = hidden
    write_atomically(path, tensors, metadata)
    return architecture


def _draw(entry: Entry, seed: int) -> Tensor:
    if entry.name == POSITION_IDS:
        return torch.arange(entry.shape[1]).reshape(entry.shape)
    if entry.name == LOGIT_SCALE:
        return torch.tensor(math.log(100))
    # NumPy's generator: its stream is the same on every platform and in every version of torch.
    values = np.random.default_rng([seed, zlib.crc32(entry.name.encode())]).standard_normal(entry.shape, dtype=np.float32)
    tensor = torch.from_numpy(values)
    if len(entry.shape) > 1:
        is_table = entry.name.endswith(("token_embedding.weight", "position_embedding.weight", "positional_embedding"))
        return tensor * (0.1 if is_table else math.prod(entry.shape[1:]) ** -0.5)
    is_norm = entry.name.endswith(".weight")  # the only weights of one dimension
    return 1 + 0.1 * tensor if is_norm else 0.05 * tensor
