"""The losses of a sample: closed forms in float64, and what float32 must not lose."""

import numpy as np
import pytest
import torch

from sdxl_train.diffusion import NoiseSchedule
from sdxl_train_plugins.losses import (
    L1,
    Huber,
    HuberOptions,
    Mse,
    SmoothL1,
    huber_threshold,
    mean_squared_error,
    pseudo_huber_error,
)

TIMESTEPS = torch.tensor([0, 250, 999])


def test_mse_is_the_mean_of_each_sample_alone() -> None:
    model_pred = torch.zeros(2, 4, 2, 2)
    target = torch.stack([torch.full((4, 2, 2), 2.0), torch.zeros(4, 2, 2)])
    target[1, 0, 0, 0] = 4.0
    assert Mse().compute_loss(model_pred, target).tolist() == [4.0, 1.0]


def test_mse_is_computed_in_float32() -> None:
    model_pred, target = torch.full((1, 4, 8, 8), 300.0).half(), torch.zeros(1, 4, 8, 8).half()
    loss = mean_squared_error(model_pred, target)
    assert loss.dtype == torch.float32
    assert loss.item() == 90_000.0  # float16 ends at 65504


def test_mse_keeps_the_graph() -> None:
    model_pred = torch.ones(1, 4, 1, 1, requires_grad=True)
    mean_squared_error(model_pred, torch.zeros(1, 4, 1, 1)).sum().backward()
    assert model_pred.grad is not None and torch.equal(model_pred.grad, torch.full((1, 4, 1, 1), 0.5))


def asked(plugin, model_pred: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor, zero_terminal_snr: bool = False) -> torch.Tensor:
    snr = NoiseSchedule("v_prediction", zero_terminal_snr).snr(timesteps)
    return plugin.compute_loss(model_pred, target, timesteps=timesteps, snr=snr)


def expected_threshold(t: int, schedule: str, c: float) -> float:
    """The three schedules in float64, from the plain noise schedule, as sd-scripts documents them."""
    a = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[t]
    sigma = ((1 - a) / a) ** 0.5
    return {"constant": c, "exponential": float(np.exp(np.log(c) * t / 1000)), "snr": float((1 - c) / (1 + sigma) ** 2 + c)}[schedule]


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("huber_c", [0.1, 0.01, 3.0])
def test_the_threshold_follows_its_schedule(schedule: str, huber_c: float) -> None:
    found = huber_threshold(TIMESTEPS, NoiseSchedule().snr(TIMESTEPS), schedule, huber_c, 1.8)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([1.8 * expected_threshold(t, schedule, huber_c) for t in TIMESTEPS.tolist()], rel=1e-5)


def test_the_snr_schedule_ends_at_huber_c_where_the_snr_is_0() -> None:
    assert huber_threshold(torch.tensor([999]), torch.zeros(1), "snr", 0.1, 1.0).tolist() == pytest.approx([0.1], rel=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_pseudo_huber_losses_hold_their_closed_form_and_are_finite_at_snr_0(schedule: str, zero_terminal_snr: bool) -> None:
    draw = np.random.default_rng(0)
    model_pred, target = draw.standard_normal((3, 4, 5, 6)), draw.standard_normal((3, 4, 5, 6))
    options = HuberOptions(huber_schedule=schedule, huber_c=0.2)
    snr = NoiseSchedule("v_prediction", zero_terminal_snr).snr(TIMESTEPS)
    c = huber_threshold(TIMESTEPS, snr, schedule, 0.2, 1.0).double().numpy()[:, None, None, None]
    plain = 2 * (np.sqrt((model_pred - target) ** 2 + c**2) - c)
    given = torch.tensor(model_pred, dtype=torch.float32), torch.tensor(target, dtype=torch.float32)
    for plugin, errors in ((SmoothL1(options), plain), (Huber(options), c * plain)):
        loss = asked(plugin, *given, TIMESTEPS, zero_terminal_snr)
        assert (loss.shape, loss.dtype) == ((3,), torch.float32) and torch.isfinite(loss).all()
        assert loss.tolist() == pytest.approx(errors.mean(axis=(1, 2, 3)).tolist(), rel=1e-5)


def test_small_errors_keep_their_digits_in_float32() -> None:
    c, d = 0.5, 1e-4
    found = pseudo_huber_error(torch.full((1, 4, 2, 2), d), torch.zeros(1, 4, 2, 2), torch.tensor([c]))
    exact = 2 * d**2 / ((d**2 + c**2) ** 0.5 + c)
    naive = 2 * (torch.tensor(d**2 + c**2).sqrt() - c)
    assert found.item() == pytest.approx(exact, rel=1e-6)
    assert naive.item() != pytest.approx(exact, rel=0.1)


def test_huber_is_near_mse_below_the_threshold_and_smooth_l1_near_twice_l1_above() -> None:
    model_pred, target = torch.full((1, 4, 2, 2), 0.3), torch.zeros(1, 4, 2, 2)
    t = torch.tensor([500])
    high, low = HuberOptions(huber_schedule="constant", huber_c=100.0), HuberOptions(huber_schedule="constant", huber_c=1e-4)
    assert asked(Huber(high), model_pred, target, t).item() == pytest.approx(0.09, rel=1e-4)
    assert asked(SmoothL1(low), model_pred, target, t).item() == pytest.approx(0.6, rel=1e-3)
    assert L1().compute_loss(model_pred, target).item() == pytest.approx(0.3)


@pytest.mark.parametrize("huber_c", [1e-4, 1e4])
@pytest.mark.parametrize("huber_scale", [1e-4, 1e4])
@pytest.mark.parametrize("error", [0.0, 1e-6, 1e4])
def test_losses_and_gradients_are_finite_at_the_bounds_of_the_options(huber_c: float, huber_scale: float, error: float) -> None:
    options = HuberOptions(huber_c=huber_c, huber_scale=huber_scale)
    for plugin in (Huber(options), SmoothL1(options)):
        model_pred = torch.full((3, 4, 2, 2), error, requires_grad=True)
        loss = asked(plugin, model_pred, torch.zeros(3, 4, 2, 2), TIMESTEPS, zero_terminal_snr=True)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and model_pred.grad is not None and torch.isfinite(model_pred.grad).all()
