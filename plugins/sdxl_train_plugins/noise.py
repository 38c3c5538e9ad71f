"""What shapes the noise: a random offset per channel, coarse noise of several sizes, and a perturbation of the U-Net's input only.

All arithmetic is in float32, and every draw of a sample comes from that sample's own stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sdxl_train
from sdxl_train import hookimpl, option

if TYPE_CHECKING:
    from torch import Tensor


def offset_noise(noise: Tensor, normal: Tensor, latents: Tensor, noise_offset: float, adaptive_noise_scale: float | None) -> Tensor:
    """Shift each channel of each sample by one random number, so that the mean brightness is trained too.

    noise + o * normal, with o = `noise_offset`, or max(0, noise_offset + adaptive_noise_scale * |mean of the channel|)
    (Guttenberg 2023, "Diffusion with Offset Noise"; the adaptive form as in sd-scripts).

    Args:
        noise, latents: [B, C, h, w] float32.
        normal: draws of N(0, 1). [B, C, 1, 1] float32.
    Returns:
        [B, C, h, w] float32.
    """
    if adaptive_noise_scale is None:
        return noise + noise_offset * normal
    channel_means = latents.float().mean(dim=(2, 3), keepdim=True)  # [B, C, 1, 1]
    scale = (noise_offset + adaptive_noise_scale * channel_means.abs()).clamp(min=0)
    return noise + scale * normal


def pyramid_sizes(height: int, width: int, ratios: list[float]) -> list[tuple[int, int]]:
    """The (height, width) of each level i: the full size divided by ratios[i] ** i, at least 1. A level with a side of 1 is the last."""
    sizes = []
    for level, ratio in enumerate(ratios):
        sizes.append((max(1, int(height / ratio**level)), max(1, int(width / ratio**level))))
        if 1 in sizes[-1]:
            break
    return sizes


def pyramid_noise(noise: Tensor, levels: list[Tensor], discount: float) -> Tensor:
    """Add noise of coarser sizes to the noise of one sample, and bring the sum back to standard deviation 1.

    noise + the sum of discount ** i * upsampled level i, divided by its standard deviation (Whitaker 2023, "Multi-Resolution Noise for
    Diffusion Model Training").

    Args:
        noise: [C, h, w] float32; it is not changed.
        levels: draws of N(0, 1), level i being [C, h_i, w_i] float32; level 0 has the full size.
        discount: the weight of a level relative to the one before, >= 0.
    Returns:
        [C, h, w] float32.
    """
    from torch.nn.functional import interpolate

    for i, level in enumerate(levels):
        noise = noise + discount**i * interpolate(level[None], size=noise.shape[-2:], mode="bilinear", align_corners=False)[0]
    return noise / noise.std()


class NoiseOffset:
    """Offset noise: helps with very dark and very bright pictures."""

    class Options(sdxl_train.Options):
        noise_offset: float = option(
            0.0,
            "scale of one random offset per sample and channel of the noise, helps very dark or bright pictures; 0 turns it off",
            zh="噪声偏移量，帮助生成很暗或很亮的图像；0 为关闭",
            flat=True,
            ge=0,
        )
        adaptive_noise_scale: float | None = option(
            None,
            "adds this multiple of the latents' absolute channel mean to noise_offset; absent: the offset is the same for all",
            zh="自适应噪声缩放：按潜变量通道均值的绝对值增加噪声偏移量；缺省为关闭",
            flat=True,
        )

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def shape_noise(self, noise: Tensor, latents: Tensor, random: Any) -> Tensor:
        if self._options.noise_offset == 0:
            return noise
        normal = random.normal(noise.shape[1], 1, 1)
        return offset_noise(noise, normal, latents, self._options.noise_offset, self._options.adaptive_noise_scale)


class MultiresNoise:
    """Pyramid noise: adds coarse structure to the noise."""

    class Options(sdxl_train.Options):
        multires_noise_iterations: int = option(
            0, "levels of pyramid noise, each coarser than the last; 0 turns it off", zh="多分辨率噪声的层数；0 为关闭", flat=True, ge=0
        )
        multires_noise_discount: float = option(
            0.25,
            "weight of a pyramid level relative to the one before; no effect without multires_noise_iterations",
            zh="多分辨率噪声每层相对前一层的权重",
            flat=True,
            ge=0,
        )

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def shape_noise(self, noise: Tensor, random: Any) -> Tensor:
        import torch

        iterations, discount = self._options.multires_noise_iterations, self._options.multires_noise_discount
        if iterations == 0:
            return noise
        channels, height, width = noise.shape[1:]
        # Level i has at most side / 2 ** i pixels, so a level beyond the side's bit length is never reached.
        num_levels = min(iterations, min(height, width).bit_length())
        # The sizes of the levels must be known here, so all of them are read back at once.
        all_ratios = (2 + 2 * random.cpu().uniform(num_levels)).tolist()  # [B][num_levels], each in [2, 4)
        shaped = []
        for i, ratios in enumerate(all_ratios):
            levels = [random[i].normal(channels, *size)[0] for size in pyramid_sizes(height, width, ratios)]
            shaped.append(pyramid_noise(noise[i], levels, discount))
        return torch.stack(shaped)


class IpNoise:
    """Input perturbation (Ning et al. 2023, arXiv:2301.11706): the U-Net sees noise that differs a little from what it is to predict."""

    class Options(sdxl_train.Options):
        ip_noise_gamma: float = option(
            0.0,
            "scale of fresh noise added to the U-Net's input but not to its target; 0.1 in the paper, 0 turns it off",
            zh="输入扰动噪声的强度，只加在输入上；0 为关闭",
            flat=True,
            ge=0,
        )

    def __init__(self, options: Options) -> None:
        self._gamma = options.ip_noise_gamma

    @hookimpl
    def shape_input_noise(self, noise: Tensor, random: Any) -> Tensor:
        return noise if self._gamma == 0 else noise + self._gamma * random.normal(*noise.shape[1:])
