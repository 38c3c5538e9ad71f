"""What a step costs: floating-point operations and numbers of parameters, by closed forms of the architecture. Needs no torch.

Counted as torch's `FlopCounterMode` does: matrix products and convolutions, a multiplication and an addition being two operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.learning_rates import NUM_BLOCKS, block_of, block_rates, text_encoder_rates
from sdxl_train.model.architecture import CONTEXT_LENGTH, NUM_SIZE_IDS, PX_PER_LATENT, Architecture, TextArchitecture
from sdxl_train.model.key_names import LOGIT_SCALE, POSITION_IDS, PREFIXES, PartName, file_entries
from sdxl_train.model.layers import (
    Conv,
    PlainAttention,
    ResNet,
    UNetLayer,
    VaeLayer,
    level_sizes,
    unet_layers,
    vae_decoder_layers,
    vae_encoder_layers,
)

if TYPE_CHECKING:
    from sdxl_train.keys import Config

ALL_BLOCKS = frozenset(range(NUM_BLOCKS))
GATED_MLP = 4  # width of the transformers' MLP / channels; the gate doubles its first half


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained: blocks of the U-Net by their numbers of `block_lr`, and the text encoders."""

    blocks: frozenset[int] = ALL_BLOCKS
    text_encoder: bool = False
    text_encoder_2: bool = False
    unused_layers: int = 1  # of text encoder 1: behind the states that are used, `clip_skip`

    @classmethod
    def of(cls, keys: Config) -> Trained:
        """What a configuration trains."""
        if keys.block_lr is None:
            blocks = ALL_BLOCKS if keys.learning_rate > 0 else frozenset[int]()
        else:
            blocks = frozenset(block for block, rate in enumerate(block_rates(keys.block_lr)) if rate > 0)
        first, second = text_encoder_rates(keys)
        return cls(blocks, first > 0, second > 0, max(1, keys.clip_skip))

    @property
    def text(self) -> bool:
        return self.text_encoder or self.text_encoder_2


@dataclass(frozen=True, slots=True)
class Flops:
    """
    Attributes:
        forward, backward: without what gradient checkpointing computes again.
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


NO_FLOPS = Flops(0, 0)


class StepCosts:
    """The operations of the steps of a run, forward and backward.

    Args:
        encodes_latents: the VAE encodes in each step.
    """

    def __init__(self, architecture: Architecture, trained: Trained, encodes_latents: bool = False) -> None:
        self._architecture = architecture
        self._trained = trained
        self._encodes_latents = encodes_latents
        self._known: dict[tuple[tuple[int, int], int], int] = {}

    @classmethod
    def of(cls, architecture: Architecture, keys: Config) -> StepCosts:
        """Those of a configuration."""
        return cls(architecture, Trained.of(keys), not keys.cache_latents)

    def of_sample(self, size: tuple[int, int], num_chunks: int) -> int:
        """One sample of a bucket of (w, h) px, its text cut into so many chunks of 77 tokens."""
        found = self._known.get((size, num_chunks))
        if found is None:
            found = step_flops(self._architecture, size, num_chunks, self._trained).total
            found += vae_encode_flops(self._architecture, size) if self._encodes_latents else 0
            self._known[size, num_chunks] = found
        return found


def num_parameters(architecture: Architecture) -> dict[PartName, int]:
    """How many parameters each network has."""
    counts: dict[PartName, int] = dict.fromkeys(PREFIXES, 0)
    for entry in file_entries(architecture):
        if entry.name not in (POSITION_IDS, LOGIT_SCALE):
            counts[entry.part] += math.prod(entry.shape)
    return counts


def block_parameters(architecture: Architecture) -> list[int]:
    """How many parameters each of the 23 blocks of the U-Net has."""
    counts = [0] * NUM_BLOCKS
    for entry in file_entries(architecture):
        if entry.part == "unet":
            counts[block_of(entry.name.removeprefix(PREFIXES["unet"]))] += math.prod(entry.shape)
    return counts


def step_flops(architecture: Architecture, size: tuple[int, int], chunks: int, trained: Trained) -> Flops:
    """Text encoders and U-Net for one sample; latents are encoded before.

    Args:
        size: (w, h) of the bucket in px.
        chunks: of 77 tokens, that a caption is cut into.
    """
    text, text_2 = architecture.text_encoder, architecture.text_encoder_2
    encoding = text_encoder_flops(text, trained.text_encoder, trained.unused_layers) + text_encoder_flops(text_2, trained.text_encoder_2)
    encoding = Flops(encoding.forward * chunks, encoding.backward * chunks)
    return encoding + unet_flops(architecture, size, chunks * (CONTEXT_LENGTH - 2) + 2, trained)


def unet_flops(architecture: Architecture, size: tuple[int, int], tokens: int, trained: Trained | None = None) -> Flops:
    """One sample through the U-Net and back.

    Args:
        size: (w, h) of the picture in px.
        tokens: length of the text embedding: 77, 152 or 227.
        trained: None: the whole U-Net.
    """
    trained = Trained() if trained is None else trained
    sizes = level_sizes(size[0] // PX_PER_LATENT, size[1] // PX_PER_LATENT, len(architecture.unet_channels))
    time_width, context = 4 * architecture.unet_channels[0], architecture.context_width
    total = _embedding_flops(architecture, trained)
    has_gradient = bool({0} & trained.blocks) or trained.text  # whether something before the layer is trained
    for layer in unet_layers(architecture):
        is_trained = layer.block in trained.blocks
        has_gradient = has_gradient or is_trained
        is_first = isinstance(layer, Conv) and layer.block == 1  # its input are the latents
        for product in _products(layer, sizes, time_width, context, tokens):
            total += product.flops(is_trained, has_gradient and not is_first, trained.text)
    return total


def text_encoder_flops(text: TextArchitecture, is_trained: bool = False, unused_layers: int = 0) -> Flops:
    """A chunk of 77 tokens through a text encoder and back. `unused_layers`: the last ones, of whose output nothing is trained."""
    width, tokens = text.width, CONTEXT_LENGTH
    layer = tokens * (4 * width * width + 2 * width * text.mlp_width) + 2 * tokens * tokens * width
    forward = 2 * (text.layers * layer + width * text.projection)
    return Flops(forward, 2 * (forward - 2 * unused_layers * layer) if is_trained else 0)


def vae_encode_flops(architecture: Architecture, size: tuple[int, int]) -> int:
    """A picture of (w, h) px to its latents."""
    return _vae_flops(vae_encoder_layers(architecture), size, len(architecture.vae_channels))


def vae_decode_flops(architecture: Architecture, size: tuple[int, int]) -> int:
    """Latents to a picture of (w, h) px."""
    return _vae_flops(vae_decoder_layers(architecture), size, len(architecture.vae_channels))


@dataclass(frozen=True, slots=True)
class _Product:
    """Multiplications and additions of a product, and what its operands are.

    Attributes:
        of_text: the operand besides the weights is the text embedding.
        of_weights: one operand are weights; else both were computed.
    """

    multiplications: int
    of_text: bool = False
    of_weights: bool = True

    def flops(self, is_trained: bool, has_gradient: bool, text_is_trained: bool) -> Flops:
        forward = 2 * self.multiplications
        if not self.of_weights:
            return Flops(forward, 2 * forward if has_gradient else 0)
        needs_input = text_is_trained if self.of_text else has_gradient
        return Flops(forward, forward * (is_trained + needs_input))


def _products(layer: UNetLayer | VaeLayer, sizes: list[int], time_width: int, context: int, tokens: int) -> Iterator[_Product]:
    """
    Args:
        sizes: pixels of each level.
        time_width: of the embedding of time and sizes; 0 where there is none.
        context, tokens: width and length of the text embedding.
    """
    pixels = sizes[layer.level]
    width = layer.channels
    if isinstance(layer, Conv):
        yield _Product(layer.kernel**2 * layer.inputs * width * pixels)
    elif isinstance(layer, ResNet):
        yield _Product(9 * (layer.inputs + width) * width * pixels)
        if time_width:
            yield _Product(time_width * width)
        if layer.inputs != width:
            yield _Product(layer.inputs * width * pixels)
    elif isinstance(layer, PlainAttention):
        yield _Product(4 * width * width * pixels)
        yield _Product(2 * width * pixels * pixels, of_weights=False)
    else:
        yield _Product(2 * width * width * pixels)  # into the blocks, and out of them
        queries_and_outs, mlp = 6 * width * width * pixels, 3 * GATED_MLP * width * width * pixels
        yield _Product(layer.layers * (queries_and_outs + mlp))
        yield _Product(layer.layers * 2 * context * width * tokens, of_text=True)
        yield _Product(layer.layers * 2 * width * pixels * (pixels + tokens), of_weights=False)


def _embedding_flops(architecture: Architecture, trained: Trained) -> Flops:
    """The embeddings of time and sizes: their first layers have inputs that are data."""
    width = architecture.unet_channels[0]
    sizes = architecture.text_encoder_2.projection + NUM_SIZE_IDS * architecture.size_embedding_width
    is_trained = 0 in trained.blocks
    first = _Product(width * 4 * width).flops(is_trained, False, False) + _Product(sizes * 4 * width).flops(
        is_trained, trained.text_encoder_2, False
    )
    return first + _Product(2 * (4 * width) ** 2).flops(is_trained, is_trained or trained.text_encoder_2, False)


def _vae_flops(layers: Iterable[VaeLayer], size: tuple[int, int], levels: int) -> int:
    sizes = level_sizes(*size, levels)
    return sum(2 * product.multiplications for layer in layers for product in _products(layer, sizes, 0, 0, 0))
