"""How attention is computed in U-Net and VAE."""

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from sdxl_train.errors import ConfigError


def set_attention(unet: UNet2DConditionModel, vae: AutoencoderKL, backend: str) -> None:
    """Makes all attention of both networks use one backend: "sdpa" (torch's fused kernels) or "plain" (matrix products and softmax).

    Raises:
        ConfigError: for another backend.
    """
    processors = {"sdpa": AttnProcessor2_0, "plain": AttnProcessor}
    if backend not in processors:
        raise ConfigError(f"attention backend {backend!r} is not available; available: {', '.join(processors)}")
    for network in (unet, vae):
        network.set_attn_processor(processors[backend]())
