"""How attention is computed in U-Net and VAE: which way the keys choose, whether it works here, setting it. torch is loaded when set."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdxl_train.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import PreTrainedModel

# The keys that choose a backend, the strongest first; with none of them attention is "plain": matrix products and a softmax.
BACKENDS = ("mem_eff_attn", "xformers", "diffusers_xformers", "sdpa")
OF_XFORMERS = ("xformers", "diffusers_xformers")


def active_backend(values: Mapping[str, Any]) -> str:
    """The one backend in use: the first true key of BACKENDS, else "plain".

    Args:
        values: every effective key.
    """
    return next((key for key in BACKENDS if values[key]), "plain")


def backend_problem(values: Mapping[str, Any]) -> str | None:
    """What keeps the chosen backend from working, as far as keys and installed packages tell; None where nothing is known to.

    Neither torch nor xformers is imported. `check_backend` finds the rest.
    """
    backend = active_backend(values)
    if backend not in OF_XFORMERS:
        return None
    if importlib.util.find_spec("xformers") is None:
        return _unusable(backend, "the package xformers is not installed")
    if values["cpu"]:
        return _unusable(backend, "xformers computes on GPUs only, and cpu = true")
    return None


def check_backend(backend: str, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> None:
    """Computes a little attention with xformers, where the backend is one of its two: it can be installed and still lack kernels for this
    device, these dtypes or this torch.

    Args:
        dtype: in which the U-Net computes.
    Raises:
        ConfigError: it cannot be used; with the cause.
    """
    if backend not in OF_XFORMERS:
        return
    import torch

    try:
        xops = importlib.import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # what a package built for another torch or CUDA raises
        raise ConfigError(_unusable(backend, f"xformers cannot be imported: {error}")) from error
    for channels, its_dtype, is_trained in ((64, dtype, True), (512, vae_dtype, False)):  # SDXL's U-Net and VAE, a head
        query = torch.ones(1, 8, 1, channels, device=device, dtype=its_dtype, requires_grad=is_trained)
        try:
            output = xops.memory_efficient_attention(query, query, query)
            if is_trained:
                output.sum().backward()
        except RuntimeError as error:  # also NotImplementedError, by which xformers says that no kernel fits
            cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
            message = f"xformers cannot compute {str(its_dtype).removeprefix('torch.')} on {device}: {cause}"
            raise ConfigError(_unusable(backend, message)) from error


def set_attention(unet: UNet2DConditionModel | None, vae: AutoencoderKL, backend: str) -> None:
    """Makes all attention of both networks use one backend.

    Args:
        unet: None where only the VAE is used.
        backend: one of BACKENDS or "plain"; checked by `check_backend`.
    Raises:
        ConfigError: for another backend, or one that diffusers refuses.
    """
    networks = [network for network in (unet, vae) if network is not None]
    if backend == "diffusers_xformers":
        for network in networks:
            try:
                network.enable_xformers_memory_efficient_attention()
            except (ImportError, RuntimeError, ValueError) as error:
                raise ConfigError(_unusable(backend, f"diffusers says: {error}")) from error
        return
    for network in networks:
        network.set_attn_processor(_processor(backend))


def _processor(backend: str) -> Any:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    from sdxl_train.model.attention_processor import HeadwiseProcessor, xformers_attention

    if backend == "mem_eff_attn":
        import torch

        from sdxl_train.model.chunked_attention import chunked_attention

        # Compiled, its loops would be another function for each number of chunks.
        return HeadwiseProcessor(torch.compiler.disable(chunked_attention))  # pyright: ignore[reportArgumentType]
    others = {"xformers": lambda: HeadwiseProcessor(xformers_attention()), "sdpa": AttnProcessor2_0, "plain": AttnProcessor}
    if backend not in others:
        raise ConfigError(f"attention backend {backend!r} is not available; available: {', '.join((*BACKENDS, 'plain'))}")
    return others[backend]()


def set_text_attention(text_encoder: PreTrainedModel, backend: str) -> None:
    """Attention of a text encoder: plain where the backend is, else torch's fused kernels; at 77 tokens the others would gain nothing."""
    text_encoder.set_attn_implementation("eager" if backend == "plain" else "sdpa")


def _unusable(backend: str, cause: str) -> str:
    return f"{backend} = true cannot be used: {cause}; use sdpa = true without {backend}"
