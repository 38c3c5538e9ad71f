"""The networks of an architecture on the meta device: all shapes, no values and no memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train.model.architecture import Architecture

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection


def blank_unet(architecture: Architecture, dtype: torch.dtype | None = None) -> UNet2DConditionModel:
    """The U-Net; `dtype`: of its weights, None is float32."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**architecture.to_diffusers_configs()["unet"]).to(dtype)  # pyright: ignore[reportArgumentType]


def blank_vae(architecture: Architecture, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """The VAE; `dtype` as in `blank_unet`."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**architecture.to_diffusers_configs()["vae"]).to(dtype)  # pyright: ignore[reportArgumentType]


def blank_text_encoder(architecture: Architecture, dtype: torch.dtype | None = None) -> CLIPTextModel:
    """Text encoder 1; `dtype` as in `blank_unet`."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(**architecture.to_diffusers_configs()["text_encoder"])).to(dtype)  # pyright: ignore[reportArgumentType]


def blank_text_encoder_2(architecture: Architecture, dtype: torch.dtype | None = None) -> CLIPTextModelWithProjection:
    """Text encoder 2, with its projection; `dtype` as in `blank_unet`."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        config = CLIPTextConfig(**architecture.to_diffusers_configs()["text_encoder_2"])
        return CLIPTextModelWithProjection(config).to(dtype)  # pyright: ignore[reportArgumentType]
