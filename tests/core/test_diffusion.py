"""The noise schedule against the oracles and against closed forms computed with numpy alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl_train.diffusion import NoiseSchedule, betas_of, rescale_zero_terminal_snr

ORACLES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text("utf-8"))


def cases(group: str) -> list[tuple[dict, dict]]:
    return list(zip(ORACLES[group]["inputs"], ORACLES[group]["expected"], strict=True))


def plain_alphas_cumprod() -> np.ndarray:
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.mark.parametrize(("given", "expected"), cases("betas"))
def test_betas_are_a_squared_line(given: dict, expected: dict) -> None:
    assert NoiseSchedule().betas[given["t"]].item() == pytest.approx(expected["beta"], rel=1e-5)


@pytest.mark.parametrize(("given", "expected"), cases("schedule_weights"))
def test_plain_tables_hold_the_oracle_values(given: dict, expected: dict) -> None:
    schedule = NoiseSchedule()
    assert schedule.alphas_cumprod[given["t"]].item() == pytest.approx(expected["alpha_bar"], rel=1e-5)
    assert schedule.snr(torch.tensor([given["t"]])).item() == pytest.approx(expected["snr"], rel=1e-5)


@pytest.mark.parametrize(("given", "expected"), cases("snr_thresholds"))
def test_snr_falls_below_the_limit_at_the_oracle_timestep(given: dict, expected: dict) -> None:
    below = NoiseSchedule().snr(torch.arange(1000)) <= given["snr_below"]
    assert below.nonzero()[0].item() == expected["t"]


def test_the_whole_plain_table_is_numpys_float64_closed_form() -> None:
    np.testing.assert_allclose(NoiseSchedule().alphas_cumprod.numpy(), plain_alphas_cumprod(), rtol=1e-13)


@pytest.mark.parametrize(("given", "expected"), cases("zero_terminal_snr"))
def test_zero_terminal_snr_holds_the_oracle_values(given: dict, expected: dict) -> None:
    schedule = NoiseSchedule("v_prediction", zero_terminal_snr=True)
    assert schedule.alphas_cumprod[given["t"]].item() == pytest.approx(expected["alpha_bar"], rel=1e-4, abs=1e-7)
    assert schedule.betas[given["t"]].item() == pytest.approx(expected["beta"], rel=1e-4, abs=1e-7)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_its_first_timestep() -> None:
    schedule = NoiseSchedule("v_prediction", zero_terminal_snr=True)
    assert schedule.snr(torch.tensor([999])).item() == 0.0
    assert schedule.betas[999].item() == 1.0
    assert schedule.alphas_cumprod[0].item() == pytest.approx(plain_alphas_cumprod()[0], rel=1e-13)
    latents, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    last = torch.tensor([999, 999])
    assert torch.equal(schedule.add_noise(latents, noise, last), noise)
    assert torch.equal(schedule.target(latents, noise, last), -latents)


def test_betas_are_recovered_from_their_cumulative_product() -> None:
    betas = np.linspace(0.1, 0.4, 5)
    rescaled = rescale_zero_terminal_snr(torch.from_numpy(np.cumprod(1 - betas)))
    np.testing.assert_allclose(betas_of(torch.from_numpy(np.cumprod(1 - betas))).numpy(), betas)
    np.testing.assert_allclose(torch.cumprod(1 - betas_of(rescaled), 0).numpy(), rescaled.numpy(), atol=1e-15)


@pytest.mark.parametrize(("given", "expected"), cases("add_noise_velocity"))
def test_noisy_latents_and_velocity_hold_the_oracle_values(given: dict, expected: dict) -> None:
    latents, noise = torch.full((1, 4, 2, 2), given["z0"]), torch.full((1, 4, 2, 2), given["eps"])
    timesteps = torch.tensor([given["t"]])
    noisy = NoiseSchedule().add_noise(latents, noise, timesteps)
    velocity = NoiseSchedule("v_prediction").target(latents, noise, timesteps)
    torch.testing.assert_close(noisy, torch.full_like(noisy, expected["z_t"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(velocity, torch.full_like(velocity, expected["v"]), rtol=1e-5, atol=1e-6)


def test_each_sample_is_mixed_at_its_own_timestep() -> None:
    latents, noise = torch.ones(3, 4, 2, 2), torch.zeros(3, 4, 2, 2)
    noisy = NoiseSchedule().add_noise(latents, noise, torch.tensor([0, 500, 999]))
    np.testing.assert_allclose(noisy[:, 0, 0, 0].numpy(), np.sqrt(plain_alphas_cumprod()[[0, 500, 999]]), rtol=1e-6)


def test_the_target_of_epsilon_is_the_noise() -> None:
    noise = torch.randn(1, 4, 2, 2)
    assert torch.equal(NoiseSchedule().target(torch.randn(1, 4, 2, 2), noise, torch.tensor([3])), noise)


def test_half_precision_latents_are_mixed_in_float32() -> None:
    latents, noise = torch.randn(1, 4, 8, 8).half(), torch.randn(1, 4, 8, 8)
    noisy = NoiseSchedule().add_noise(latents, noise, torch.tensor([400]))
    a = plain_alphas_cumprod()[400]
    expected = np.sqrt(a) * latents.numpy().astype(np.float64) + np.sqrt(1 - a) * noise.numpy()
    assert noisy.dtype == torch.float32
    np.testing.assert_allclose(noisy.numpy(), expected, atol=1e-6)  # a half would be off by 1e-3
    assert NoiseSchedule("v_prediction").target(latents, noise.half(), torch.tensor([400])).dtype == torch.float32


def test_another_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="sample"):
        NoiseSchedule("sample")  # pyright: ignore[reportArgumentType]


def test_the_schedule_moves_with_its_settings() -> None:
    moved = NoiseSchedule("v_prediction", zero_terminal_snr=True).to("meta")
    assert moved.snr(torch.zeros(2, dtype=torch.int64, device="meta")).device.type == "meta"
    assert (moved.prediction_type, moved.zero_terminal_snr) == ("v_prediction", True)
    assert moved.betas.device.type == "cpu"
