"""The layers of U-Net and VAE in the order in which they run, as far as their cost goes. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sdxl_train.model.architecture import LATENT_CHANNELS, Architecture


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution with a square kernel.

    Attributes:
        level: of its output: 0 has the full size, each further one half of it in each direction.
        block: of `block_lr`; 0 in the VAE. The same in the other layers.
        resamples: "down": its output is of the next level; "up": its input was enlarged to that of its output.
    """

    level: int
    block: int
    inputs: int
    channels: int
    kernel: int = 3
    resamples: Literal["down", "up"] | None = None


@dataclass(frozen=True, slots=True)
class ResNet:
    """Two norms and 3x3 convolutions, and a 1x1 convolution beside them where the number of channels changes.

    Attributes:
        skipped: how many of `inputs` come from a skip connection; they are put together with the others into a new tensor.
    """

    level: int
    block: int
    inputs: int
    channels: int
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Transformer:
    """`layers` blocks of self-attention, cross-attention and a gated MLP, between two linear layers."""

    level: int
    block: int
    channels: int
    heads: int
    layers: int


@dataclass(frozen=True, slots=True)
class PlainAttention:
    """The VAE's attention over all pixels, with one head."""

    level: int
    channels: int


UNetLayer = Conv | ResNet | Transformer
VaeLayer = Conv | ResNet | PlainAttention


def unet_layers(architecture: Architecture) -> Iterator[UNetLayer]:
    """All layers but the embeddings of time and sizes."""
    channels, depths, heads = architecture.unet_channels, architecture.transformer_layers, architecture.unet_heads
    last = len(channels) - 1
    block, width = 1, channels[0]
    skips = [width]
    yield Conv(0, block, LATENT_CHANNELS, width)
    for level, out in enumerate(channels):
        for _ in range(2):
            block += 1
            yield ResNet(level, block, width, out)
            if depths[level]:
                yield Transformer(level, block, out, heads[level], depths[level])
            width = out
            skips.append(width)
        if level < last:
            block += 1
            yield Conv(level + 1, block, width, width, resamples="down")
            skips.append(width)
    yield ResNet(last, block + 1, width, width)
    yield Transformer(last, block + 2, width, heads[last], depths[last])
    yield ResNet(last, block + 3, width, width)
    block += 3
    for level in range(last, -1, -1):
        for i in range(3):
            block += 1
            skipped = skips.pop()
            yield ResNet(level, block, width + skipped, channels[level], skipped)
            width = channels[level]
            if depths[level]:
                yield Transformer(level, block, width, heads[level], depths[level])
            if level > 0 and i == 2:
                yield Conv(level - 1, block, width, width, resamples="up")
    yield Conv(0, block + 1, width, LATENT_CHANNELS)


def vae_encoder_layers(architecture: Architecture) -> Iterator[VaeLayer]:
    """From pixels to mean and variance of the latents; level 0 are the pixels."""
    channels = architecture.vae_channels
    last, width = len(channels) - 1, channels[0]
    yield Conv(0, 0, 3, width)
    for level, out in enumerate(channels):
        yield ResNet(level, 0, width, out)
        yield ResNet(level, 0, out, out)
        width = out
        if level < last:
            yield Conv(level + 1, 0, width, width, resamples="down")
    yield from _vae_middle(last, width)
    yield Conv(last, 0, width, 2 * LATENT_CHANNELS)
    yield Conv(last, 0, 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, kernel=1)


def vae_decoder_layers(architecture: Architecture) -> Iterator[VaeLayer]:
    """From latents to pixels; level 0 are the pixels."""
    channels = architecture.vae_channels
    last, width = len(channels) - 1, channels[-1]
    yield Conv(last, 0, LATENT_CHANNELS, LATENT_CHANNELS, kernel=1)
    yield Conv(last, 0, LATENT_CHANNELS, width)
    yield from _vae_middle(last, width)
    for level in range(last, -1, -1):
        for _ in range(3):
            yield ResNet(level, 0, width, channels[level])
            width = channels[level]
        if level > 0:
            yield Conv(level - 1, 0, width, width, resamples="up")
    yield Conv(0, 0, width, 3)


def _vae_middle(level: int, width: int) -> Iterator[VaeLayer]:
    yield ResNet(level, 0, width, width)
    yield PlainAttention(level, width)
    yield ResNet(level, 0, width, width)


def level_sizes(width: int, height: int, levels: int) -> list[int]:
    """Pixels of each level: sides are halved and rounded up."""
    sizes = []
    for _ in range(levels):
        sizes.append(width * height)
        width, height = -(-width // 2), -(-height // 2)
    return sizes
