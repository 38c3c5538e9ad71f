"""What layers keep of a sample for their backward pass, by closed forms, as CUDA with fused attention keeps it. Needs no torch.

A unit is what gradient checkpointing computes again as a whole: a ResNet block or a block of a transformer. Bytes are for one sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sdxl_train.model.architecture import CONTEXT_LENGTH, LATENT_CHANNELS, PX_PER_LATENT, Architecture, TextArchitecture
from sdxl_train.model.layers import Conv, ResNet, Transformer, level_sizes, unet_layers
from sdxl_train.step_costs import Trained

FLOAT32 = 4


@dataclass(frozen=True)
class Computation:
    """
    Attributes:
        weight_bytes, compute_bytes: of a number in trained weights, and in what is computed; they differ under autocast.
        checkpoints: gradient checkpointing.
        keeps_scores: attention keeps its matrix of scores.
    """

    weight_bytes: int
    compute_bytes: int
    checkpoints: bool
    keeps_scores: bool

    @property
    def uses_autocast(self) -> bool:
        return self.weight_bytes != self.compute_bytes

    def of_norm(self, elements: int, readers: int = 1) -> int:
        """Bytes that a norm and the layers behind it keep: input and output. Under autocast a norm takes float32, and each matrix product
        makes a copy of its own of the output."""
        if self.uses_autocast:
            return elements * (FLOAT32 + readers * self.compute_bytes)
        return elements * 2 * self.compute_bytes


@dataclass(frozen=True)
class Unit:
    """
    Attributes:
        kept: from the forward pass to the unit's backward pass.
        again: what gradient checkpointing computes for that, beside `kept`.
        work: what the backward pass needs for a moment.
        copied: bytes of the copy of its weights that autocast makes, whatever the batch size.
        gradients: bytes of the gradients of its weights.
        largest: numbers in the largest of them.
    """

    kept: int
    again: int
    work: int
    copied: int
    gradients: int
    largest: int


def unet_units(architecture: Architecture, size: tuple[int, int], tokens: int, trained: Trained, computation: Computation) -> list[Unit]:
    """All units of the U-Net in the order of the forward pass.

    Args:
        size: (w, h) of the bucket in px.
        tokens: length of the text embedding, 77, 152 or 227.
    """
    pixels = level_sizes(size[0] // PX_PER_LATENT, size[1] // PX_PER_LATENT, len(architecture.unet_channels))
    time_width = 4 * architecture.unet_channels[0]
    units: list[Unit] = []
    for layer in unet_layers(architecture):
        n, is_trained = pixels[layer.level], layer.block in trained.blocks
        if isinstance(layer, ResNet):
            units.append(_resnet_unit(layer, n, time_width, is_trained, computation))
        elif isinstance(layer, Transformer):
            units += _transformer_units(layer, n, tokens, architecture.context_width, is_trained, computation)
        else:
            units.append(_conv_unit(layer, pixels, is_trained, computation))
    return units


def _conv_unit(layer: Conv, pixels: list[int], is_trained: bool, computation: Computation) -> Unit:
    """A convolution keeps its input: what it halves, or what was enlarged before it. The last one has a norm and a SiLU before it."""
    n, inputs, c = pixels[layer.level], layer.inputs, computation.compute_bytes
    kept = inputs * (pixels[layer.level - 1] if layer.resamples == "down" else n) * c
    if layer.channels == LATENT_CHANNELS:
        kept = computation.of_norm(inputs * n) + inputs * n * (FLOAT32 if computation.uses_autocast else c)
    parameters = layer.kernel**2 * inputs * layer.channels
    return _unit(kept, kept, (inputs + layer.channels) * n * c, parameters, parameters, is_trained, computation, checkpointed=False)


def _resnet_unit(layer: ResNet, n: int, time_width: int, is_trained: bool, computation: Computation) -> Unit:
    """Two times norm, SiLU and convolution; the input is kept once more for the shortcut where autocast keeps the norm's in float32."""
    inputs, width, c = layer.inputs * n, layer.channels * n, computation.compute_bytes
    of_silu = FLOAT32 if computation.uses_autocast else c
    full = computation.of_norm(inputs) + computation.of_norm(width) + of_silu * (inputs + width)
    if computation.uses_autocast and layer.inputs != layer.channels:
        full += inputs * c
    largest = 9 * layer.channels * max(layer.inputs, layer.channels)
    parameters = (9 * (layer.inputs + layer.channels) + time_width + layer.inputs * (layer.inputs != layer.channels)) * layer.channels
    work = (27 if computation.uses_autocast else 9 * c) * width  # measured: gradients on their way through the second half
    return _unit(inputs * c, full, work, parameters, largest, is_trained, computation)


def _transformer_units(layer: Transformer, n: int, tokens: int, context: int, is_trained: bool, computation: Computation) -> Iterator[Unit]:
    """Norm and linear layer, the blocks, and a linear layer."""
    width, c, channels = layer.channels * n, computation.compute_bytes, layer.channels
    square = channels * channels
    yield _unit(0, computation.of_norm(width), 2 * width * c, square, square, is_trained, computation, checkpointed=False)

    text = 2 * tokens * channels * c
    scores = layer.heads * n * (n + tokens) * _of_score(computation) if computation.keeps_scores else 2 * layer.heads * n * FLOAT32
    attention = computation.of_norm(width, readers=3) + 4 * width * c
    cross = computation.of_norm(width) + 2 * width * c + text
    if computation.uses_autocast:
        cross += 2 * tokens * context * c
    mlp = computation.of_norm(width) + (8 + 4 + 4) * width * c
    parameters = (6 + 12) * square + 2 * context * channels
    full = attention + cross + mlp + scores
    work = (28 if computation.uses_autocast else 20) * width * c + (layer.heads * n * n * FLOAT32 if computation.keeps_scores else 0)
    for _ in range(layer.layers):
        yield _unit(width * c, full, work, parameters, 8 * square, is_trained, computation)
    yield _unit(0, width * c, 2 * width * c, square, square, is_trained, computation, checkpointed=False)


def _of_score(computation: Computation) -> int:
    """Bytes of a score: the softmax keeps its output, in float32 under autocast, and the product with the values reads a copy of it."""
    return FLOAT32 + computation.compute_bytes if computation.uses_autocast else computation.compute_bytes


def _unit(
    kept: int, full: int, work: int, parameters: int, largest: int, is_trained: bool, computation: Computation, checkpointed: bool = True
) -> Unit:
    """A unit of which `kept` is kept with gradient checkpointing, and `full` without."""
    is_again = computation.checkpoints and checkpointed
    return Unit(
        kept=kept if is_again else full,
        again=full - kept if is_again else 0,
        work=work,
        copied=parameters * computation.compute_bytes * computation.uses_autocast,
        gradients=parameters * computation.weight_bytes * is_trained,
        largest=largest * is_trained,
    )


def text_units(architecture: Architecture, trained: Trained, tokens: int, computation: Computation) -> list[Unit]:
    """One unit for each trained text encoder."""
    parts = ((architecture.text_encoder, trained.text_encoder), (architecture.text_encoder_2, trained.text_encoder_2))
    return [_text_unit(text, tokens, computation) for text, is_trained in parts if is_trained]


def _text_unit(text: TextArchitecture, tokens: int, computation: Computation) -> Unit:
    """All layers of a text encoder: norm and attention, norm and two linear layers with an activation between them."""
    positions = -(-tokens // (CONTEXT_LENGTH - 2)) * CONTEXT_LENGTH
    width, mlp, c = text.width * positions, text.mlp_width * positions, computation.compute_bytes
    layer = computation.of_norm(width, readers=3) + 4 * width * c + computation.of_norm(width) + 3 * mlp * c
    of_layer = 4 * text.width**2 + 2 * text.width * text.mlp_width
    parameters = text.layers * of_layer
    return _unit(text.layers * layer, text.layers * layer, 4 * mlp * c, parameters, 0, True, computation, checkpointed=False)


def vae_encoder_bytes(architecture: Architecture, size: tuple[int, int], compute_bytes: int) -> int:
    """What encoding a picture needs at its peak, without gradients: the input of a level, and four tensors of its second ResNet block."""
    channels = architecture.vae_channels
    pixels = level_sizes(*size, len(channels))
    inputs = (channels[0], *channels)
    return max((inputs[level] + 4 * channels[level]) * pixels[level] for level in range(len(channels))) * compute_bytes
