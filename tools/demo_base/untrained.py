"""The demo's base before its U-Net is trained: a tiny SDXL in the real file layout, with the trained VAE in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdxl_train.model.architecture import Architecture
from sdxl_train.model.key_names import Entry
from sdxl_train.model.single_file import load_text_encoders, open_checkpoint
from sdxl_train.model.text import encode_prompts, load_tokenizers
from sdxl_train.model.tiny import tiny_architecture, write_tiny_sdxl

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

# The vocabulary of 49,408 makes up nearly all of the text encoders: 0.1 MB a unit of width. With these all is below 32 MB in fp16.
TE_WIDTHS = (16, 64)
SIZES: dict[str, Any] = {
    "unet_channels": (64, 96, 160),
    "transformer_layers": (0, 0, 1),
    "vae_channels": (16, 32, 48, 64),
    "te_widths": TE_WIDTHS,
    "te_layers": (2, 2),
}
POOLED_SCALE = 25.0  # so much, that the 1,536 numbers of the size embedding do not drown the text

# The ends of residual branches. At 0 each branch starts as the identity, which trains faster, as in the models of Dhariwal & Nichol 2021
# (arXiv:2105.05233), and the U-Net predicts 0.
_ENDS_OF_BRANCHES = ("out_layers.3.weight", "out_layers.3.bias", "proj_out.weight", "proj_out.bias", ".out.2.weight", ".out.2.bias")


def base_architecture() -> Architecture:
    """The sizes of all four networks."""
    return tiny_architecture(**SIZES)


def write_untrained_base(path: Path, vae: AutoencoderKL, captions: Sequence[str]) -> None:
    """Write the file that the training of the U-Net starts from, in float32. The text encoders stay as they are here.

    They are random, but for the projection of the second: with it the pooled vectors of `captions` have the second moment POOLED_SCALE^2 in
    every direction and none between directions. Words that all captions share would else drown those that tell them apart.

    Raises:
        OSError: from the file system; nothing is left behind.
    """
    state = vae.state_dict()

    def write(target: Path, projection: Tensor) -> None:
        def weights(entry: Entry, drawn: Tensor) -> Tensor:
            if entry.part == "vae":
                return torch.cat([state[name] for name in entry.modules]).reshape(entry.shape)
            if entry.part == "unet":
                return torch.zeros_like(drawn) if entry.name.endswith(_ENDS_OF_BRANCHES) else drawn
            return projection if entry.name.endswith("text_projection") else _text_weights(entry.name, drawn)

        write_tiny_sdxl(target, **SIZES, change=weights)

    plain = path.with_name(f"{path.stem}-plain.safetensors")
    write(plain, torch.eye(TE_WIDTHS[1]))
    write(path, whitening(_pooled(plain, captions)))
    plain.unlink()


def whitening(vectors: Tensor) -> Tensor:
    """The symmetric matrix P for which v @ P has the second moment POOLED_SCALE^2 x identity over the rows v. [width, width].

    Directions in which the rows hardly differ are amplified at most 1,000 times as much as the others: they may be none but rounding.

    Args:
        vectors: [N, width], N >= 1.
    """
    moments, directions = torch.linalg.eigh(vectors.double().T @ vectors.double() / len(vectors))
    factors = POOLED_SCALE * moments.clamp_min(1e-6 * moments.max().item()).rsqrt()
    return ((directions * factors) @ directions.T).float()


def _pooled(file: Path, captions: Sequence[str]) -> Tensor:
    """[N, width of TE2]"""
    encoders = load_text_encoders(open_checkpoint(str(file)), torch.float32)
    tokenizer = load_tokenizers(None, None)
    ids = [tokenizer.tokenize(caption, 75)[:2] for caption in captions]
    with torch.no_grad():
        return encode_prompts(torch.tensor([one[0] for one in ids]), torch.tensor([one[1] for one in ids]), *encoders, clip_skip=1)[1]


def _text_weights(name: str, drawn: Tensor) -> Tensor:
    """Random, but so that captions that differ lie far apart."""
    if name.endswith("token_embedding.weight"):
        words = 10 * drawn
        words[-2:] = 0  # the markers, which every caption has
        return words
    return drawn
