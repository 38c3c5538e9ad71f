"""The demo's base model: a tiny SDXL in the real file layout whose weights come from code alone.

The U-Net and the text encoders have random weights. The VAE works: it is built by hand, since without one every picture would be noise,
and no minute of training gives one. Four signals run through all its layers, signal k as +s in channel 2k and as -s in channel 2k + 1.
Encoding takes the mean of each 8 x 8 px, decoding interpolates, so pictures come back blurred, with their colours in place.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sdxl_train.model.key_names import PREFIXES, Entry
from sdxl_train.model.sdxl import LATENT_SCALE
from sdxl_train.model.tiny import write_tiny_sdxl

VAE_WIDTH = 16
NUM_SIGNALS = 4
NUM_LATENTS = 4

# Rows: the first three signals, of the darkness 1 - x of red, green and blue, which is 0 in white and 2 in black. Brightness; red
# against blue; green against both. Signal 3 is the brightness less the mean of its eight neighbours.
COLOURS = torch.tensor([[0.3, 0.6, 0.1], [0.5, 0.0, -0.5], [-0.5, 1.0, -0.5]])
SHARPENING = 0.5  # times signal 3, added to the brightness when decoding: it makes up for the interpolation
# Of the signals over the demo's pictures at 128 px; with them the scaled latents have about mean 0 and standard deviation 1.
MEANS = torch.tensor([0.554, -0.110, 0.080, 0.018])
DEVIATIONS = torch.tensor([0.443, 0.293, 0.354, 0.186])
LOG_VARIANCE = -20.0  # of the posterior: next to nothing is drawn

# Each half ends in GroupNorm and SiLU. Eight channels are raised by this much, far above the signals, and the other eight are lowered by
# it: then mean and deviation are 0 and LIFT whatever the picture is, SiLU changes nothing, and +s and -s come through.
LIFT = 64.0

# Weights at the end of residual branches. At 0 each branch starts as the identity, which trains faster, as in the models of Dhariwal &
# Nichol 2021 (arXiv:2105.05233), and the U-Net predicts 0: the first losses are about 1.
_ENDS_OF_BRANCHES = ("out_layers.3.weight", "out_layers.3.bias", "proj_out.weight", "proj_out.bias", ".out.2.weight", ".out.2.bias")


def write_demo_base(path: Path) -> None:
    """Write the base model, 14 MB in fp16; the same bytes each time.

    Raises:
        OSError: from the file system; nothing is left behind.
    """
    write_tiny_sdxl(
        path,
        unet_channels=(32, 48, 64),
        transformer_layers=(0, 0, 1),
        vae_channels=(VAE_WIDTH,) * 4,
        vae_norm_groups=1,
        te_widths=(32, 64),
        te_layers=(2, 2),
        dtype=torch.float16,
        change=_demo_weights,
    )


def _demo_weights(entry: Entry, drawn: Tensor) -> Tensor:
    if entry.part == "vae":
        return _vae_weights(entry.name.removeprefix(PREFIXES["vae"]), drawn)
    if entry.part == "unet":
        return torch.zeros_like(drawn) if entry.name.endswith(_ENDS_OF_BRANCHES) else drawn
    return _text_weights(entry.name, drawn)


def _text_weights(name: str, drawn: Tensor) -> Tensor:
    """Random, but so that captions that differ look different to the U-Net within a minute of training."""
    if name.endswith("token_embedding.weight"):
        words = 10 * drawn
        words[-2:] = 0  # the markers, which every caption has
        return words
    if name.endswith("text_projection"):
        return 6 * drawn  # else the 1,536 numbers of the size embedding drown it
    return drawn


def _vae_weights(name: str, drawn: Tensor) -> Tensor:
    half, _, inner = name.partition(".")
    weights = torch.zeros_like(drawn)
    match half, inner:
        case (("quant_conv" | "post_quant_conv"), "weight"):
            weights[:, :, 0, 0] = torch.eye(len(weights))
        case "encoder", "conv_in.weight":
            weights[:, :, 1, 1] = _with_both_signs(-_signals_of_darkness())
        case "encoder", "conv_in.bias":
            weights += _with_both_signs(_signals_of_darkness()).sum(1)
        case "encoder", _ if inner.endswith("downsample.conv.weight"):
            weights[:, :, :2, :2] = torch.eye(VAE_WIDTH)[:, :, None, None] / 4
        case "encoder", "conv_out.weight":
            weights[:NUM_LATENTS] = _latents_of_signals()
        case "encoder", "conv_out.bias":
            weights[:NUM_LATENTS] = -MEANS / DEVIATIONS / LATENT_SCALE
            weights[NUM_LATENTS:] = LOG_VARIANCE
        case "decoder", "conv_in.weight":
            weights[:, :, 1, 1] = _with_both_signs(_sharpened() * DEVIATIONS * LATENT_SCALE)
        case "decoder", "conv_in.bias":
            weights += _with_both_signs((_sharpened() @ MEANS)[:, None])[:, 0]
        case "decoder", _ if inner.endswith("upsample.conv.weight"):
            hat = torch.tensor([0.25, 0.5, 0.25])  # on doubled pixels it interpolates linearly
            weights += torch.eye(VAE_WIDTH)[:, :, None, None] * torch.outer(hat, hat)
        case "decoder", "conv_out.weight":
            weights[:, :, 1, 1] = -torch.linalg.inv(COLOURS) @ _signals_of_lifted()[:3]
        case "decoder", "conv_out.bias":
            weights += 1  # white
        case ("encoder", "mid.block_2.conv2.bias") | ("decoder", "up.0.block.2.conv2.bias"):  # the last layers before the final norm
            weights += LIFT * torch.tensor([1.0, -1.0]).repeat_interleave(2 * NUM_SIGNALS)
        case _, "norm_out.weight":
            weights += LIFT
        case _ if ".norm" in inner or ".conv1." in inner or (".attn_1." in inner and ".proj_out." not in inner):
            return drawn  # the inside of branches that end in 0
    return weights


def _with_both_signs(signals: Tensor) -> Tensor:
    """[4, n] -> [16, n]: row k as row 2k, and with the other sign as row 2k + 1; rows 8 to 15 are 0."""
    rows = torch.zeros(VAE_WIDTH, signals.shape[1])
    rows[0 : 2 * NUM_SIGNALS : 2] = signals
    rows[1 : 2 * NUM_SIGNALS : 2] = -signals
    return rows


def _signals_of_darkness() -> Tensor:
    """[4, 3]; signal 3 comes later, from the brightness."""
    return torch.cat([COLOURS, torch.zeros(1, 3)])


def _signals_of_lifted() -> Tensor:
    """[4, 16]: ((LIFT + s) - (LIFT - s)) / 2 = s."""
    return _with_both_signs(torch.eye(NUM_SIGNALS) / 2).T


def _latents_of_signals() -> Tensor:
    """[4, 16, 3, 3]: the last convolution of the encoder."""
    weights = torch.zeros(NUM_LATENTS, VAE_WIDTH, 3, 3)
    weights[:, :, 1, 1] = _signals_of_lifted()
    against_neighbours = torch.full((3, 3), -1 / 8)
    against_neighbours[1, 1] = 1
    weights[3] = _signals_of_lifted()[0, :, None, None] * against_neighbours
    return weights / (DEVIATIONS * LATENT_SCALE)[:, None, None, None]


def _sharpened() -> Tensor:
    """[4, 4]: signals as decoded, of signals as encoded."""
    mix = torch.eye(NUM_SIGNALS)
    mix[0, 3] = SHARPENING
    mix[3, 3] = 0
    return mix
