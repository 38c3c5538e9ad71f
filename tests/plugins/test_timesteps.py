"""The distributions of timesteps."""

import json
from pathlib import Path

import pytest
import torch

from sdxl_train.options import resolve_aliases
from sdxl_train.randomness import StepRandom, sample_place
from sdxl_train_plugins.timesteps import LogitNormal, Uniform, logit_normal_timesteps

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
