"""The distributions of timesteps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl_train.options import resolve_aliases
from sdxl_train.randomness import StepRandom, sample_place
from sdxl_train_plugins.timesteps import Beta, Cubic, Density, LogitNormal, Uniform, logit_normal_timesteps, timestep_weights, timesteps_at

ORACLES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text("utf-8"))
CASES = list(zip(ORACLES["logit_normal"]["inputs"], ORACLES["logit_normal"]["expected"], strict=True))


def draws(num_samples: int) -> StepRandom:
    return StepRandom([sample_place(3, 1, f"k{i}", 0) for i in range(num_samples)], "sample_timesteps")


@pytest.mark.parametrize(("given", "expected"), CASES)
def test_logit_normal_has_the_oracle_distribution(given: dict, expected: dict) -> None:
    low, high = given["min_timestep"], given["max_timestep"]
    plugin = LogitNormal(LogitNormal.Options(mu=given["mu"], sigma=given["sigma"]))
    drawn = plugin.sample_timesteps(low, high, draws(20_000)).double()
    span = high - low
    quantiles = torch.quantile(drawn, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double())
    assert quantiles.tolist() == pytest.approx(expected["quantiles"], abs=0.015 * span)
    assert drawn.mean().item() == pytest.approx(expected["mean"], abs=0.015 * span)
    share = (drawn - low) / span
    assert (share < 0.25).double().mean().item() == pytest.approx(expected["share_below_quarter"], abs=0.015)
    assert (share >= 0.75).double().mean().item() == pytest.approx(expected["share_above_three_quarters"], abs=0.015)


def test_logit_normal_is_the_floored_sigmoid() -> None:
    # sigmoid(0) = 0.5; sigmoid(ln 3) = 0.75; sigmoid(-ln 3) = 0.25
    normal = torch.tensor([0.0, 1.0, -1.0])
    assert logit_normal_timesteps(normal, 0.0, 1.0986123, 200, 602).tolist() == [401, 501, 300]


def test_a_sigmoid_of_1_stays_below_the_upper_end() -> None:
    assert torch.sigmoid(torch.tensor(40.0)).item() == 1.0
    assert logit_normal_timesteps(torch.tensor([40.0, -400.0]), 0.0, 1.0, 0, 1000).tolist() == [999, 0]


def options(**given: float) -> LogitNormal.Options:
    return LogitNormal.Options(**resolve_aliases(LogitNormal.Options, given))


@pytest.mark.parametrize("alias", ["sigma", "scale", "std", "s"])
def test_every_name_of_sigma_takes_effect(alias: str) -> None:
    narrow = LogitNormal(options(**{alias: 0.01})).sample_timesteps(0, 1000, draws(200))
    assert narrow.double().std().item() < 10  # 1.0 would give about 200


@pytest.mark.parametrize("alias", ["mu", "loc", "mean", "m"])
def test_every_name_of_mu_takes_effect(alias: str) -> None:
    assert LogitNormal(options(**{alias: 3.0})).sample_timesteps(0, 1000, draws(200)).double().mean().item() > 850


def test_two_names_of_one_option_are_an_error_even_if_one_is_zero() -> None:
    with pytest.raises(ValueError, match="mu and mean"):
        options(mu=0.0, mean=1.0)


def test_sigma_must_be_positive() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        LogitNormal.Options(sigma=0.0)


def test_uniform_is_flat_over_the_range_and_keeps_to_it() -> None:
    drawn = Uniform().sample_timesteps(100, 104, draws(8000))
    counts = torch.bincount(drawn, minlength=104)[100:]
    assert drawn.dtype == torch.int64
    assert (drawn.min().item(), drawn.max().item()) == (100, 103)
    assert (counts - 2000).abs().max().item() < 160  # four standard deviations


def test_a_sample_draws_the_same_timestep_in_any_batch() -> None:
    assert torch.equal(Uniform().sample_timesteps(0, 1000, draws(5))[:2], Uniform().sample_timesteps(0, 1000, draws(2)))


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 2.0), (0.5, 0.5), (5.0, 1.5), (1.0, 1.0)])
def test_beta_has_the_mean_and_spread_of_its_distribution_over_the_range(alpha: float, beta: float) -> None:
    drawn = Beta(Beta.Options(alpha=alpha, beta=beta)).sample_timesteps(200, 1000, draws(20_000)).double()
    mean, variance = alpha / (alpha + beta), alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))
    assert drawn.mean().item() == pytest.approx(200 + 800 * mean - 0.5, abs=8)  # floored: half a timestep lower
    assert drawn.std().item() == pytest.approx(800 * variance**0.5, rel=0.03)


def test_beta_at_its_extremes_keeps_to_the_range() -> None:
    drawn = Beta(Beta.Options(alpha=0.001, beta=0.001)).sample_timesteps(100, 900, draws(500))
    assert {drawn.min().item(), drawn.max().item()} == {100, 899}


def test_cubic_has_the_distribution_of_one_minus_a_cube() -> None:
    drawn = Cubic().sample_timesteps(0, 1000, draws(20_000)).double()
    for t in (100, 500, 900, 990, 999):  # P(1 - u ** 3 < s) = 1 - (1 - s) ** (1 / 3)
        assert (drawn < t).double().mean().item() == pytest.approx(1 - (1 - t / 1000) ** (1 / 3), abs=0.015)


def test_a_share_of_1_stays_below_the_upper_end() -> None:
    assert timesteps_at(torch.tensor([0.0, 1.0]), 10, 20).tolist() == [10, 19]


def density(*weights: float) -> Density:
    return Density(Density.Options(density=weights))


def test_density_gives_each_part_its_share_and_is_flat_within() -> None:
    drawn = density(1.0, 0.0, 3.0, 4.0).sample_timesteps(0, 1000, draws(20_000))
    parts = torch.bincount(drawn // 250, minlength=4).double() / 20_000
    assert parts.tolist() == pytest.approx([0.125, 0.0, 0.375, 0.5], abs=0.015)
    assert drawn[drawn >= 750].double().mean().item() == pytest.approx(874.5, abs=4)


def test_density_of_a_narrower_range_is_that_of_the_range_alone() -> None:
    drawn = density(1.0, 3.0).sample_timesteps(400, 600, draws(20_000))
    assert (drawn.min().item(), drawn.max().item()) == (400, 599)
    assert (drawn < 500).double().mean().item() == pytest.approx(0.25, abs=0.015)


def test_a_timestep_on_the_border_of_two_parts_has_a_share_of_both() -> None:
    weights = timestep_weights([3.0, 0.0, 6.0])  # parts end at 333 1/3 and 666 2/3
    assert len(weights) == 1000
    assert weights[332:335] == pytest.approx([3.0, 1.0, 0.0]) and weights[665:668] == pytest.approx([0.0, 2.0, 6.0])
    assert sum(weights) == pytest.approx(3000)
    table = np.random.default_rng(0).random(1000)
    np.testing.assert_allclose(timestep_weights(table.tolist()), table)


def test_a_density_of_huge_and_tiny_weights_neither_overflows_nor_draws_a_weight_of_0() -> None:
    assert set(density(1e308, 1e308).sample_timesteps(0, 1000, draws(50)).tolist()) <= set(range(1000))
    tiny = density(1e308, 0.0, 1e-300, 0.0).sample_timesteps(250, 1000, draws(200))
    assert tiny.min().item() >= 500 and tiny.max().item() < 750


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -1.0), (1.0,) * 1001])
def test_a_density_that_is_none_is_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="density"):
        Density.Options(density=weights)


@pytest.mark.parametrize("plugin", [Beta(Beta.Options()), Cubic(), density(1.0, 2.0)])
def test_new_samplers_draw_a_sample_alike_in_any_batch(plugin) -> None:
    together = plugin.sample_timesteps(0, 1000, draws(5))
    assert together.dtype == torch.int64 and torch.equal(together[:2], plugin.sample_timesteps(0, 1000, draws(2)))
