"""Gradient checkpointing: activations inside a block are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def checkpoint_activations(unet: UNet2DConditionModel, text_encoders: Iterable[PreTrainedModel]) -> None:
    """Turns it on, for each ResNet and transformer block of the U-Net and each layer of the text encoders.

    Same loss, bit-equal gradients. Text encoders do it in train mode only, so they are put into it.

    Args:
        text_encoders: those that are trained; a frozen one keeps no activations.
    """
    unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=_draws(unet)))
    for encoder in text_encoders:
        encoder.train()
        encoder.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": _draws(encoder)})
        encoder.disable_input_require_grads()  # only reentrant checkpointing needs inputs with gradients


def _draws(network: nn.Module) -> bool:
    """Whether a forward pass draws random numbers, which the second one then has to repeat. SDXL has no dropout."""
    attention = getattr(network.config, "attention_dropout", 0.0)
    return attention > 0 or any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())
