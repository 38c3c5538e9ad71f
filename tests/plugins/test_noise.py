"""Offset, pyramid and input-perturbation noise: statistics of the oracles, and each sample's independence of its batch."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdxl_train.randomness import StepRandom, sample_place
from sdxl_train_plugins.noise import IpNoise, MultiresNoise, NoiseOffset, pyramid_noise, pyramid_sizes

ORACLES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text("utf-8"))


def cases(group: str) -> list[tuple[dict, dict]]:
    return list(zip(ORACLES[group]["inputs"], ORACLES[group]["expected"], strict=True))


def draws(num_samples: int, name: str = "shape_noise", first: int = 0) -> StepRandom:
    return StepRandom([sample_place(7, 1, f"k{i}", 0) for i in range(first, first + num_samples)], name)


def white(num_samples: int, side: int, first: int = 0) -> Tensor:
    return draws(num_samples, "noise", first).normal(4, side, side)


def offset(noise_offset: float, adaptive_noise_scale: float | None = None) -> NoiseOffset:
    return NoiseOffset(NoiseOffset.Options(noise_offset=noise_offset, adaptive_noise_scale=adaptive_noise_scale))


def multires(iterations: int, discount: float = 0.25) -> MultiresNoise:
    return MultiresNoise(MultiresNoise.Options(multires_noise_iterations=iterations, multires_noise_discount=discount))


@pytest.mark.parametrize(("given", "expected"), cases("noise_offset"))
def test_offset_noise_has_the_oracle_spread(given: dict, expected: dict) -> None:
    noise = white(2500, given["height"])
    latents = torch.full_like(noise, given["z0"])
    shaped = offset(given["noise_offset"], given["adaptive_noise_scale"]).shape_noise(noise, latents, draws(2500))
    assert shaped.mean(dim=(2, 3)).std().item() == pytest.approx(expected["channel_mean_std"], rel=0.04)
    assert shaped.var().item() == pytest.approx(expected["total_variance"], rel=0.04)


def test_offset_is_one_number_per_sample_and_channel() -> None:
    noise = white(3, 8)
    added = offset(0.5).shape_noise(noise, torch.zeros_like(noise), draws(3)) - noise
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added))
    assert len(set(added[:, :, 0, 0].flatten().tolist())) == 12


def test_offset_scales_with_each_channels_own_mean_and_not_below_zero() -> None:
    noise = white(1, 8)
    latents = torch.tensor([0.0, 1.0, -3.0, 9.0]).view(1, 4, 1, 1).expand(1, 4, 8, 8)
    added = (offset(0.4, -0.1).shape_noise(noise, latents, draws(1)) - noise)[0, :, 0, 0]
    unscaled = (offset(1.0).shape_noise(noise, latents, draws(1)) - noise)[0, :, 0, 0]
    torch.testing.assert_close(added / unscaled, torch.tensor([0.4, 0.3, 0.1, 0.0]), atol=1e-5, rtol=1e-4)


def test_offset_of_zero_is_off_whatever_the_adaptive_scale() -> None:
    noise = white(2, 8)
    assert offset(0.0, 5.0).shape_noise(noise, torch.ones_like(noise), draws(2)) is noise


@pytest.mark.parametrize(("given", "expected"), cases("pyramid_noise"))
def test_pyramid_noise_has_the_oracle_spread(given: dict, expected: dict) -> None:
    plugin = multires(given["multires_noise_iterations"], given["multires_noise_discount"])
    shaped = torch.cat([plugin.shape_noise(white(100, given["height"], first), draws(100, first=first)) for first in range(0, 2100, 100)])
    assert shaped.std(dim=(1, 2, 3)).sub(expected["sample_std"]).abs().max().item() < 1e-3
    assert shaped.mean(dim=(2, 3)).std().item() == pytest.approx(expected["channel_mean_std"], rel=0.08)


def test_pyramid_noise_leaves_the_given_noise_alone() -> None:
    noise = white(2, 16)
    before = noise.clone()
    shaped = multires(4).shape_noise(noise, draws(2))
    assert torch.equal(noise, before)
    assert not torch.equal(shaped, noise)


def test_pyramid_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    together = multires(5, 0.8).shape_noise(white(3, 32), draws(3))
    alone = [multires(5, 0.8).shape_noise(white(1, 32, i), draws(1, first=i)) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_pyramid_levels_shrink_by_powers_and_end_at_a_side_of_1() -> None:
    assert pyramid_sizes(64, 48, [3.9, 2.0, 2.5, 3.0, 2.0]) == [(64, 48), (32, 24), (10, 7), (2, 1)]
    assert pyramid_sizes(64, 48, [2.0]) == [(64, 48)]
    assert pyramid_sizes(1, 48, [2.0, 2.0]) == [(1, 48)]


def test_pyramid_sum_is_the_weighted_upsampled_levels() -> None:
    noise = torch.zeros(1, 2, 2)
    full = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    coarse = torch.full((1, 1, 1), 2.0)
    expected = torch.tensor([[[1.0 + 0.5 * 2, 1.0], [1.0, 1.0]]])
    torch.testing.assert_close(pyramid_noise(noise, [full, coarse], 0.5), expected / expected.std())


def test_level_0_has_weight_1_even_without_a_discount_left() -> None:
    shaped = multires(3, 0.0).shape_noise(torch.zeros(1, 4, 8, 8), draws(1))
    assert shaped.std().item() == pytest.approx(1.0, abs=1e-5)  # zeros alone could not be normalised


def test_a_huge_number_of_levels_draws_no_more_than_can_be_used() -> None:
    assert torch.isfinite(multires(10**12, 0.9).shape_noise(white(1, 8), draws(1))).all()


def test_pyramid_is_off_at_zero_levels() -> None:
    noise = white(2, 8)
    assert multires(0).shape_noise(noise, draws(2)) is noise


def test_input_perturbation_adds_fresh_noise_of_its_scale() -> None:
    noise = white(50, 16)
    plugin = IpNoise(IpNoise.Options(ip_noise_gamma=0.1))
    added = plugin.shape_input_noise(noise, draws(50, "shape_input_noise")) - noise
    assert added.std().item() == pytest.approx(0.1, rel=0.02)
    assert torch.corrcoef(torch.stack([added.flatten(), noise.flatten()]))[0, 1].abs().item() < 0.02
    assert not hasattr(plugin, "shape_noise")  # the target keeps the noise


def test_input_perturbation_is_off_at_zero() -> None:
    noise = white(2, 8)
    assert IpNoise(IpNoise.Options()).shape_input_noise(noise, draws(2)) is noise
