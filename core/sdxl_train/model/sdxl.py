"""The model as training and sampling see it: latents, size conditions, prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

LATENT_SCALE = 0.13025  # SDXL: the U-Net's latents are the VAE's times this


def make_add_time_ids(original_hw: Tensor, crop_top_left: Tensor, target_hw: Tensor) -> Tensor:
    """Size conditions as the U-Net takes them: original height, width, crop top, left, target height, width. [B, 6] int64.

    They stay integers until the U-Net embeds them in float32 (cosines, then sines of v / 10000^(i/128)): as floating-point numbers a
    wrapper for mixed precision would round them first, and bf16 knows no 1023.

    Args:
        original_hw, crop_top_left, target_hw: [B, 2] integers, px.
    """
    return torch.cat([original_hw, crop_top_left, target_hw], dim=1).to(torch.int64)


def predict(
    unet: nn.Module, noisy_latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, add_time_ids: Tensor
) -> Tensor:
    """The U-Net's prediction, [B, 4, h, w].

    Latents and text are cast to the weights' dtype; under autocast these are float32 and autocast decides. Call it with the wrapped
    U-Net where there is one, or gradients are not shared between processes.
    """
    dtype = next(unet.parameters()).dtype
    return unet(
        noisy_latents.to(dtype),
        timesteps,
        encoder_hidden_states=prompt_embeds.to(dtype),
        added_cond_kwargs={"text_embeds": pooled_prompt_embeds.to(dtype), "time_ids": add_time_ids},
        return_dict=False,
    )[0]


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: Tensor, noise: Tensor | None, scaled: bool = True) -> Tensor:
    """Draws latents from the VAE's posterior: mean + std x noise, computed in float32. [B, 4, H/8, W/8] float32.

    Values that are not finite (SDXL's own VAE overflows in fp16) are returned as they are: see `nonfinite_samples`.

    Args:
        pixels: [B, 3, H, W] in [-1, 1].
        noise: standard normal [B, 4, H/8, W/8]; None takes the mean.
        scaled: times 0.13025, as the U-Net takes them; False: as the latent cache stores them.
    """
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    latents = posterior.mean.float()
    if noise is not None:
        latents = latents + torch.exp(0.5 * posterior.logvar.float()) * noise.to(latents)
    return latents * LATENT_SCALE if scaled else latents


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, scaled: bool = True) -> Tensor:
    """Pixels of latents: [B, 3, 8h, 8w] float32, about [-1, 1], not clamped.

    Args:
        latents: [B, 4, h, w]; as the U-Net makes them if `scaled`, else as the latent cache stores them.
    """
    latents = latents.float() / LATENT_SCALE if scaled else latents
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()  # pyright: ignore[reportArgumentType]


def nonfinite_samples(latents: Tensor) -> Sequence[int]:
    """The rows of a batch that hold NaN or infinity. Waits for the device."""
    finite = torch.isfinite(latents).flatten(1).all(dim=1)
    return torch.nonzero(~finite).flatten().tolist()
