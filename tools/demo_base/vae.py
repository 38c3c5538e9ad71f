"""The VAE of the demo's base: trained on crops of the pictures, then brought to the latent scale that SDXL fixes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdxl_train.atomic import atomic_file
from sdxl_train.errors import ConfigError
from sdxl_train.model.architecture import Architecture
from sdxl_train.model.sdxl import LATENT_SCALE

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

CROP_PX = 64
CROPPED_PX = (48, 97)  # side of a crop before it is resized: from, below
LOG_EVERY = 50
SAVE_EVERY = 50
PX_PER_LATENT = 8
START_LOG_VARIANCE = -8.0  # of the posterior: noise of deviation 1 would drown the latents that are still small
# Rows: brightness, red against blue, green against both; of red, green and blue.
COLOUR_AXES = torch.tensor([[0.3, 0.6, 0.1], [0.5, 0.0, -0.5], [-0.5, 1.0, -0.5]])


@dataclass(frozen=True)
class VaeSettings:
    """How the VAE is trained.

    Attributes:
        kl_weight: factor on the mean Kullback-Leibler divergence per latent number; the rest of the loss is per pixel value.
        lr: peak of Adam's rate, after a warm-up of 100 steps and before half a cosine down to 0.
        guide_weight: factor on the guide, see `train_vae`; it falls to 0 over the first nine tenths of the steps.
    """

    num_steps: int = 1000
    batch_size: int = 16
    lr: float = 2e-3
    kl_weight: float = 1e-5
    guide_weight: float = 0.3
    seed: int = 1


def load_pixels(paths: Sequence[Path]) -> list[Tensor]:
    """Pictures as [3, H, W] float32 in [-1, 1]."""
    return [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 127.5 - 1 for path in paths]


def train_vae(
    architecture: Architecture, pictures: Sequence[Tensor], settings: VaeSettings, state_file: Path, say: Callable[[str], None]
) -> AutoencoderKL:
    """Train a VAE, going on from `state_file` where there is one; the result does not depend on how often it was interrupted.

    The loss is mean |d| + mean d^2 of the pixels, with d the difference of a picture and what is decoded of a draw from its posterior,
    + kl_weight x KL (Kingma & Welling 2013, arXiv:1312.6114). At first a guide is added: the squared distance of the first three latents
    from the mean colours of their 8x8 px, in axes of equal variance. Without it latents learn brightness first and one colour axis next;
    green against red and blue, which is rare in pictures, they had not learned after 1,000 steps.

    Args:
        pictures: [3, H, W] in [-1, 1], each side at least CROPPED_PX[1] - 1.
        state_file: written every SAVE_EVERY steps and at the end.
    Raises:
        ConfigError: the state is of other settings.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(settings.seed)
    vae = AutoencoderKL(**architecture.to_diffusers_configs()["vae"])
    assert vae.quant_conv is not None and vae.quant_conv.bias is not None
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = START_LOG_VARIANCE
    colours = MeanColours(pictures)
    optimizer = torch.optim.Adam(vae.parameters(), lr=settings.lr, betas=(0.9, 0.99))
    step = _load_state(state_file, vae, optimizer, settings)
    losses: list[float] = []
    while step < settings.num_steps:
        random = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _schedule(step, settings.num_steps)
        pixels = _crops(pictures, settings.batch_size, random)  # [B, 3, CROP_PX, CROP_PX]
        guide_weight = settings.guide_weight * max(0.0, 1 - step / (0.9 * settings.num_steps))
        loss = _loss(vae, pixels, colours(pixels), settings.kl_weight, guide_weight, random)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if step % LOG_EVERY == 0:
            say(f"vae: step {step} of {settings.num_steps}, loss {np.mean(losses[-LOG_EVERY:]):.4f}")
        if step % SAVE_EVERY == 0 or step == settings.num_steps:
            with atomic_file(state_file) as temporary:
                state = {"step": step, "vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "settings": vars(settings)}
                torch.save(state, temporary)
    return vae.eval().requires_grad_(False)


def _load_state(path: Path, vae: AutoencoderKL, optimizer: torch.optim.Optimizer, settings: VaeSettings) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["settings"] != vars(settings):
        raise ConfigError(f"{path} was trained with {state['settings']}, not with {vars(settings)}; remove it to begin anew")
    vae.load_state_dict(state["vae"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _schedule(step: int, num_steps: int) -> float:
    return min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * step / num_steps)) / 2


def _crops(pictures: Sequence[Tensor], batch_size: int, random: torch.Generator) -> Tensor:
    """Crops of random pictures, places and scales, half of them mirrored and a quarter dimmed. [B, 3, CROP_PX, CROP_PX]."""

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=random))

    crops: list[Tensor] = []
    for _ in range(batch_size):
        picture = pictures[draw(len(pictures))]
        side = CROPPED_PX[0] + draw(CROPPED_PX[1] - CROPPED_PX[0])
        side = min(side, *picture.shape[1:])
        top, left = draw(picture.shape[1] - side + 1), draw(picture.shape[2] - side + 1)
        crop = picture[:, top : top + side, left : left + side]
        crop = F.interpolate(crop[None], (CROP_PX, CROP_PX), mode="bilinear", antialias=True)
        crop = crop.flip(-1) if draw(2) else crop
        crops.append(crop if draw(4) else _dimmed(crop, 3 if draw(2) else 1, random))
    return torch.cat(crops)


def _dimmed(crop: Tensor, num_factors: int, random: torch.Generator) -> Tensor:
    """As in coloured light (3 factors) or less of it (1): all pictures are on white, and black ones must come back black too."""
    factors = torch.rand(num_factors, 1, 1, generator=random).square()
    return (crop + 1) * factors - 1


class MeanColours:
    """Mean colours of 8x8 px on COLOUR_AXES, each with mean 0 and variance 1 over given pictures.

    Args:
        pictures: [3, H, W] in [-1, 1].
    """

    def __init__(self, pictures: Sequence[Tensor]) -> None:
        known = torch.cat([self._on_axes(picture[None])[0].flatten(1) for picture in pictures], dim=1)  # [3, N]
        self._means, self._deviations = known.mean(1)[:, None, None], known.std(1)[:, None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 3, H / 8, W / 8]."""
        return (self._on_axes(pixels) - self._means) / self._deviations

    @staticmethod
    def _on_axes(pixels: Tensor) -> Tensor:
        return F.conv2d(F.avg_pool2d(pixels, PX_PER_LATENT), COLOUR_AXES[:, :, None, None])


def _loss(vae: AutoencoderKL, pixels: Tensor, colours: Tensor, kl_weight: float, guide_weight: float, random: torch.Generator) -> Tensor:
    posterior = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    noise = torch.randn(posterior.mean.shape, generator=random)
    decoded = vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
    difference = decoded - pixels
    kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
    guide = (posterior.mean[:, :3] - colours).square().mean()
    return difference.abs().mean() + difference.square().mean() + kl_weight * kl + guide_weight * guide


@torch.no_grad()
def to_sdxl_scale(vae: AutoencoderKL, pictures: Sequence[Tensor]) -> None:
    """Change the VAE so that each channel of latents x 0.13025 has mean 0 and variance 1 over the pictures, and decodes as before.

    Latents z become (z - mean) / (deviation x 0.13025): the last layer of the encoder gives them so, the first of the decoder undoes it.
    """
    latents = torch.cat([_mean_latents(vae, picture).flatten(2) for picture in pictures], dim=2)[0]  # [4, N]
    means, factors = latents.mean(1), 1 / (latents.std(1) * LATENT_SCALE)
    to_moments, from_latents = vae.quant_conv, vae.post_quant_conv
    assert to_moments is not None and to_moments.bias is not None
    assert from_latents is not None and from_latents.bias is not None
    to_moments.weight[:4] *= factors[:, None, None, None]
    to_moments.bias[:4] = (to_moments.bias[:4] - means) * factors
    to_moments.bias[4:] += 2 * factors.log()  # the logarithm of the posterior's variance
    from_latents.bias += from_latents.weight[:, :, 0, 0] @ means
    from_latents.weight /= factors[:, None, None]


@torch.no_grad()
def psnr_db(vae: AutoencoderKL, pictures: Sequence[Tensor]) -> float:
    """Mean over the pictures of 10 log10(4 / mean squared error) of what the VAE gives back, in dB; values in [-1, 1]."""
    return float(np.mean(list(_psnrs(vae, pictures))))


def _psnrs(vae: AutoencoderKL, pictures: Sequence[Tensor]) -> Iterator[float]:
    for picture in pictures:
        decoded = vae.decode(_mean_latents(vae, picture), return_dict=False)[0]  # pyright: ignore[reportArgumentType]
        yield 10 * math.log10(4 / (decoded[0].clamp(-1, 1) - picture).square().mean().item())


def _mean_latents(vae: AutoencoderKL, picture: Tensor) -> Tensor:
    return vae.encode(picture[None]).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
