"""The networks of an architecture on the meta device: all shapes, no values and no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from sdxl_train.model.architecture import Architecture

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    Network = TypeVar("Network", bound=torch.nn.Module)


def blank_unet(architecture: Architecture, dtype: torch.dtype | None = None) -> UNet2DConditionModel:
    """The U-Net; `dtype`: of its weights, None is float32."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return _blank(lambda: UNet2DConditionModel(**architecture.to_diffusers_configs()["unet"]), dtype)


def blank_vae(architecture: Architecture, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """The VAE; `dtype` as in `blank_unet`."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return _blank(lambda: AutoencoderKL(**architecture.to_diffusers_configs()["vae"]), dtype)


def blank_text_encoder(architecture: Architecture, dtype: torch.dtype | None = None) -> CLIPTextModel:
    """Text encoder 1; `dtype` as in `blank_unet`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return _blank(lambda: CLIPTextModel(CLIPTextConfig(**architecture.to_diffusers_configs()["text_encoder"])), dtype)


def blank_text_encoder_2(architecture: Architecture, dtype: torch.dtype | None = None) -> CLIPTextModelWithProjection:
    """Text encoder 2, with its projection; `dtype` as in `blank_unet`."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(**architecture.to_diffusers_configs()["text_encoder_2"])
    return _blank(lambda: CLIPTextModelWithProjection(config), dtype)


def _blank(make: Callable[[], Network], dtype: torch.dtype | None) -> Network:
    import torch

    with torch.device("meta"):
        network = make()
    torch.nn.Module.to(network, dtype)  # diffusers' own `to` warns that rounding may do harm, and there is nothing to round
    return network
