"""Loss weights at the timesteps of the oracles, on the plain and the rescaled schedule."""

import json
from pathlib import Path

import pytest
import torch

from sdxl_train.diffusion import NoiseSchedule
from sdxl_train_plugins.loss_weights import LOWEST_PLAIN_SNR, Debiased, MinSnr, ScaleVPred, VPredLike

ORACLES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text("utf-8"))
EPSILON, VELOCITY = "epsilon", "v_prediction"
WEIGHTS = {
    "min_snr_eps_gamma5": (MinSnr(MinSnr.Options()), EPSILON),
    "min_snr_eps_gamma1": (MinSnr(MinSnr.Options(min_snr_gamma=1.0)), EPSILON),
    "min_snr_v_gamma5": (MinSnr(MinSnr.Options()), VELOCITY),
    "scale_v_pred": (ScaleVPred(ScaleVPred.Options(scale_v_pred_loss_like_noise_pred=True)), VELOCITY),
    "v_pred_like_factor_0.1": (VPredLike(VPredLike.Options(v_pred_like_loss=0.1)), EPSILON),
    "debiased_eps": (Debiased(Debiased.Options(debiased_estimation_loss=True)), EPSILON),
    "debiased_v": (Debiased(Debiased.Options(debiased_estimation_loss=True)), VELOCITY),
}


def cases(group: str) -> list[tuple[int, str, float]]:
    pairs = zip(ORACLES[group]["inputs"], ORACLES[group]["expected"], strict=True)
    return [(given["t"], name, value) for given, expected in pairs for name, value in expected.items() if name in WEIGHTS]


@pytest.mark.parametrize(("t", "name", "expected"), cases("schedule_weights"))
def test_weights_on_the_plain_schedule_hold_the_oracle_values(t: int, name: str, expected: float) -> None:
    plugin, prediction_type = WEIGHTS[name]
    weight = plugin.weigh_loss(NoiseSchedule().snr(torch.tensor([t])), prediction_type)
    assert weight.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("t", "name", "expected"), cases("zero_terminal_snr"))
def test_weights_on_the_rescaled_schedule_hold_the_oracle_values(t: int, name: str, expected: float) -> None:
    plugin, prediction_type = WEIGHTS[name]
    snr = NoiseSchedule("v_prediction", zero_terminal_snr=True).snr(torch.tensor([t]))
    assert plugin.weigh_loss(snr, prediction_type).item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_oracles_hold_every_weight() -> None:
    assert {name for _, name, _ in cases("schedule_weights")} == set(WEIGHTS)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_is_finite_and_not_negative_at_every_timestep(name: str, zero_terminal_snr: bool) -> None:
    plugin, prediction_type = WEIGHTS[name]
    snr = NoiseSchedule("v_prediction", zero_terminal_snr).snr(torch.arange(1000))
    weight = plugin.weigh_loss(snr, prediction_type)
    assert (weight.shape, weight.dtype) == ((1000,), torch.float32)
    assert torch.isfinite(weight).all() and (weight >= 0).all()


def test_the_lowest_snr_is_that_of_the_plain_schedule() -> None:
    assert NoiseSchedule().snr_table[999].item() == pytest.approx(LOWEST_PLAIN_SNR, rel=1e-12)


@pytest.mark.parametrize(
    ("plugin", "prediction_type"),
    [
        (MinSnr(MinSnr.Options(min_snr_gamma=0.0)), EPSILON),
        (MinSnr(MinSnr.Options(min_snr_gamma=0.0)), VELOCITY),
        (ScaleVPred(ScaleVPred.Options()), VELOCITY),
        (ScaleVPred(ScaleVPred.Options(scale_v_pred_loss_like_noise_pred=True)), EPSILON),
        (VPredLike(VPredLike.Options()), EPSILON),
        (VPredLike(VPredLike.Options(v_pred_like_loss=0.5)), VELOCITY),
        (Debiased(Debiased.Options()), EPSILON),
        (Debiased(Debiased.Options()), VELOCITY),
    ],
)
def test_a_weight_is_one_when_off_or_meant_for_the_other_prediction(plugin, prediction_type: str) -> None:
    assert torch.equal(plugin.weigh_loss(torch.tensor([0.0, 3.0, 1175.0]), prediction_type), torch.ones(3))
