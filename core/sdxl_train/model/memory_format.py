"""How kernels and activations of convolutions are laid out in memory."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn


def to_channels_last(network: nn.Module) -> None:
    """Lays convolutions out with their channels innermost, in place, as they are fastest on GPUs.

    Activations follow from the kernels. Values, shapes and saved files stay the same. Call it once, before the optimizer is made: its
    states take the layout of their parameters.
    """
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportArgumentType, reportCallIssue]
    for module in network.modules():
        if isinstance(module, Transformer2DModel):  # it lays its output out with channels outermost; every layer after it would copy
            module.register_forward_hook(_channels_last_output)


def _channels_last_output(module: nn.Module, args: object, output: tuple[Tensor]) -> tuple[Tensor]:
    return (output[0].contiguous(memory_format=torch.channels_last),)
