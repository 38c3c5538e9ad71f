"""Rendering pictures with the model as it is, without leaving a trace in the training."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sdxl_train.model.architecture import LATENT_CHANNELS, PX_PER_LATENT
from sdxl_train.model.sdxl import decode_latents, make_add_time_ids, nonfinite_samples, predict
from sdxl_train.model.text import encode_prompts
from sdxl_train.sample_benchmark import SampleEntry

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from PIL.Image import Image

    from sdxl_train.model.tokenizer import PromptTokenizer
    from sdxl_train.run import Run



@dataclass(frozen=True)
class SampleModels:
    """What renders: the networks without wrappers for several processes, and how they are used in training.

    Attributes:
        device: where to render; networks that are elsewhere are brought there for the time.
        dtype: of autocast; float32: none.
        no_half_vae: decode without autocast.
    """

    unet: nn.Module
    text_encoders: tuple[nn.Module, nn.Module]
    vae: AutoencoderKL
    tokenizer: PromptTokenizer
    device: torch.device
    max_token_length: int
    clip_skip: int
    dtype: torch.dtype = torch.float32
    no_half_vae: bool = False

    @classmethod
    def of_run(cls, run: Run, tokenizer: PromptTokenizer) -> SampleModels:
        """The networks of a training, with text and precision as its configuration says."""
        return cls(
            unet=run.unet,
            text_encoders=run.text_encoders,
            vae=run.vae,
            tokenizer=tokenizer,
            device=run.device,
            max_token_length=run.config["max_token_length"],
            clip_skip=run.config["clip_skip"],
            dtype=run.dtype,
            no_half_vae=run.config["no_half_vae"],
        )

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.unet, *self.text_encoders, self.vae)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """The precision context of one call. Without the weight cache, which would keep a second copy of all weights through it."""
        is_on = enabled and self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype if is_on else None, enabled=is_on, cache_enabled=False)


@dataclass(frozen=True)
class Condition:
    """What the U-Net is told: prompt_embeds [rows, 75 n + 2, width], pooled_prompt_embeds [rows, projection], add_time_ids [rows, 6]."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    add_time_ids: Tensor


@dataclass(frozen=True)
class Picture:
    """Picture b of an entry. `image` is None where numbers were not finite; `problem` then says which and what would do."""

    b: int
    seed: int
    image: Image | None
    problem: str | None = None


def render_batch(
    entry: SampleEntry,
    first: int,
    models: SampleModels,
    sampler: Any,
    *,
    on_step: Callable[[int, float, list[Picture]], None] | None = None,
    check_stop: Callable[[], bool] = lambda: False,
) -> list[Picture] | None:
    """Render pictures first ... first + batch_size - 1 of an entry, each as if it were rendered alone.

    Picture b has its own CPU generator, seeded with seed + b, for the initial noise and then for the sampler's; it is drawn in float32.
    Guidance is u + scale (c - u), Ho & Salimans 2022, arXiv:2207.12598. Everything the training relies on is as before afterwards, also
    after an exception: mode and device of the networks, and the global generators of torch, numpy and `random`.

    Args:
        entry: with a seed.
        sampler: a fresh diffusers scheduler. `step` is given a list of generators, one for each picture, if it takes `generator`.
        on_step: told after each denoising step: its number from 0, its timestep, and the pictures as decoded then.
        check_stop: asked before each denoising step; True gives up the batch.
    Returns:
        batch_size pictures; None when it was stopped.
    """
    if entry.seed is None:
        raise ValueError("the entry's seed is not drawn yet")
    seeds = {b: entry.seed + b for b in range(first, first + entry.batch_size)}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds.values()]
    sampler_noise = {"generator": generators} if "generator" in inspect.signature(sampler.step).parameters else {}
    with _borrowed(models):
        told = _told(entry, models)
        sampler.set_timesteps(entry.steps, device=models.device)
        shape = (1, LATENT_CHANNELS, entry.height // PX_PER_LATENT, entry.width // PX_PER_LATENT)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        latents = noise.to(models.device) * float(sampler.init_noise_sigma)  # [B, 4, h, w] float32
        for step, timestep in enumerate(sampler.timesteps):
            if check_stop():
                return None
            model_pred = _guided_prediction(sampler.scale_model_input(latents, timestep), timestep, told, entry.scale, models)
            latents = sampler.step(model_pred, timestep, latents, **sampler_noise).prev_sample
            if on_step:
                on_step(step, float(timestep), _decode(latents, seeds, models))
        return _decode(latents, seeds, models)


def _told(entry: SampleEntry, models: SampleModels) -> Condition:
    """What the U-Net is told of one picture: a row of the negative prompt where there is guidance, then one of the prompt."""
    prompts = [entry.negative_prompt, entry.prompt] if entry.scale > 1 else [entry.prompt]
    chunks = [models.tokenizer.tokenize(prompt, models.max_token_length)[:2] for prompt in prompts]
    ids_te1, ids_te2 = (torch.tensor(ids, device=models.device) for ids in zip(*chunks, strict=True))  # [1 or 2, n, 77]
    original_width, original_height = entry.original_size
    sizes = [(original_height, original_width), (0, 0), (entry.height, entry.width)]
    add_time_ids = make_add_time_ids(*(torch.tensor([size] * len(prompts), device=models.device) for size in sizes))
    with models.autocast():
        prompt_embeds, pooled_prompt_embeds = encode_prompts(ids_te1, ids_te2, *models.text_encoders, models.clip_skip)
    return Condition(prompt_embeds, pooled_prompt_embeds, add_time_ids)


def _guided_prediction(noisy_latents: Tensor, timestep: Tensor, told: Condition, scale: float, models: SampleModels) -> Tensor:
    """The prediction for every picture, guided where `told` has a negative row. [B, 4, h, w] float32."""
    rows, batch = len(told.prompt_embeds), len(noisy_latents)

    def for_each_picture(row_wise: Tensor) -> Tensor:
        return row_wise.repeat_interleave(batch, dim=0)  # all negative rows, then all others

    with models.autocast():
        model_pred = predict(
            models.unet,
            noisy_latents.repeat(rows, 1, 1, 1),
            timestep,
            for_each_picture(told.prompt_embeds),
            for_each_picture(told.pooled_prompt_embeds),
            for_each_picture(told.add_time_ids),
        ).float()
    if rows == 1:
        return model_pred
    negative, positive = model_pred.chunk(2)
    return negative + scale * (positive - negative)


def _decode(latents: Tensor, seeds: dict[int, int], models: SampleModels) -> list[Picture]:
    """The picture of each row; one at a time, since decoding takes more memory than denoising."""
    broken = nonfinite_samples(latents)
    pictures: list[Picture] = []
    for row, (b, seed) in enumerate(seeds.items()):
        if row in broken:
            problem = "the denoised latents are not finite: the model or its precision (mixed_precision) fails at this prompt"
            pictures.append(Picture(b, seed, None, problem))
            continue
        with models.autocast(enabled=not models.no_half_vae):
            pixels = decode_latents(models.vae, latents[row : row + 1])
        if nonfinite_samples(pixels):
            problem = "the decoded pixels are not finite: the VAE overflows; set no_half_vae = true, or a repaired VAE as vae"
            pictures.append(Picture(b, seed, None, problem))
        else:
            pictures.append(Picture(b, seed, _image(pixels[0])))
    return pictures


def _image(pixels: Tensor) -> Image:
    """[3, H, W] float32 in [-1, 1], clamped, as an RGB picture."""
    from PIL import Image

    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


@contextmanager
def _borrowed(models: SampleModels) -> Iterator[None]:
    """The networks in eval mode on one device and without gradients; afterwards all is as it was, global generators included."""
    modes = [(module, module.training) for network in models.networks for module in network.modules()]
    devices = [next(network.parameters()).device for network in models.networks]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    generators = [models.device] if models.device.type == "cuda" else []
    # Compiled blocks would be compiled anew, without gradients, which takes longer than a round of pictures.
    uncompiled = torch.compiler.set_stance("force_eager")
    # Ours draw from none of the global generators, but a sampler of a plugin may.
    with uncompiled, torch.random.fork_rng(devices=generators), torch.no_grad():
        try:
            for network in models.networks:
                network.eval().to(models.device)
            yield
        finally:
            for network, device in zip(models.networks, devices, strict=True):
                network.to(device)
            for module, was_training in modes:
                module.training = was_training
            random.setstate(python_state)
            np.random.set_state(numpy_state)
