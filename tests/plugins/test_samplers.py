"""Every sampler denoises a point mass whose exact noise (or velocity) is known, on the schedule that is trained."""

import json
import math
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_train import ConfigError
from sdxl_train.diffusion import NoiseSchedule
from sdxl_train_plugins.samplers import DpmSolver, Euler, Lms

ORACLES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text("utf-8"))
NAMES = {entry.name: entry for entry in entry_points(group="sdxl_train.sample_sampler") if entry.dist and entry.dist.name == "sdxl-train"}
ZERO_SNR_NAMES = ["ddim", "ddpm", "euler", "k_euler", "euler_a", "k_euler_a", "dpmsolver", "dpmsolver++"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers with numpy 2
POINT = torch.tensor([0.5, -1.0, 2.0, 0.0]).view(1, 4, 1, 1).expand(1, 4, 8, 8)


def build(name: str, noise_scheduler: NoiseSchedule) -> Any:
    return NAMES[name].load()().build_sampler(noise_scheduler)


def alphas_cumprod_at(tables: NoiseSchedule, t: float) -> float:
    """The table at t; between two timesteps, where some samplers go, in a line of its logarithm."""
    low = int(t)
    if t == low:
        return tables.alphas_cumprod[low].item()
    below, above = tables.alphas_cumprod[low : low + 2].log().tolist()
    return math.exp(below + (t - low) * (above - below))


def denoise(sampler: Any, noise_scheduler: NoiseSchedule, num_steps: int) -> Tensor:
    """Sample with the exact prediction for data that is always POINT."""
    tables = NoiseSchedule(
        noise_scheduler.prediction_type, noise_scheduler.zero_terminal_snr and noise_scheduler.prediction_type != "epsilon"
    )
    generator = torch.Generator().manual_seed(0)
    sampler.set_timesteps(num_steps, device="cpu")
    latents = torch.randn(POINT.shape, generator=generator) * sampler.init_noise_sigma
    takes_generator = "generator" in type(sampler).step.__code__.co_varnames
    for t in sampler.timesteps:
        seen = sampler.scale_model_input(latents, t)
        a = alphas_cumprod_at(tables, float(t))
        noise = (seen - a**0.5 * POINT) / (1 - a) ** 0.5
        model_pred = noise if noise_scheduler.prediction_type == "epsilon" else a**0.5 * noise - (1 - a) ** 0.5 * POINT
        latents = sampler.step(model_pred, t, latents, **({"generator": generator} if takes_generator else {})).prev_sample
    return latents


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [10, 28])
@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_finds_the_point(name: str, num_steps: int, prediction_type: Any) -> None:
    noise_scheduler = NoiseSchedule(prediction_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # nothing that a user would see in the log
        sampler = build(name, noise_scheduler)
    found = denoise(sampler, noise_scheduler, num_steps)
    # 0.03 of noise are left at timestep 0, where some of them stop.
    torch.testing.assert_close(found, POINT, atol=0.15, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 10, 28, 61])
@pytest.mark.parametrize("name", ZERO_SNR_NAMES)
def test_velocity_samplers_find_the_point_from_zero_snr(name: str, num_steps: int) -> None:
    noise_scheduler = NoiseSchedule("v_prediction", zero_terminal_snr=True)
    found = denoise(build(name, noise_scheduler), noise_scheduler, num_steps)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, POINT, atol=0.15, rtol=0)


@pytest.mark.parametrize("name", ZERO_SNR_NAMES)
def test_zero_snr_samplers_hold_the_oracle_schedule(name: str) -> None:
    sampler = build(name, NoiseSchedule("v_prediction", zero_terminal_snr=True))
    for given, expected in zip(ORACLES["zero_terminal_snr"]["inputs"], ORACLES["zero_terminal_snr"]["expected"], strict=True):
        assert sampler.alphas_cumprod[given["t"]].item() == pytest.approx(expected["alpha_bar"], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", ZERO_SNR_NAMES)
def test_zero_snr_samplers_begin_at_the_last_timestep_whatever_the_number_of_steps(name: str) -> None:
    sampler = build(name, NoiseSchedule("v_prediction", zero_terminal_snr=True))
    for num_steps in (1, 2, 7, 28, 50, 61, 103, 244, 397, 999, 1000):  # for 61, 103, 244 and 397 numpy.arange gives one too many
        sampler.set_timesteps(num_steps, device="cpu")
        timesteps = sampler.timesteps.tolist()
        assert len(timesteps) == num_steps == sampler.num_inference_steps
        assert timesteps[0] == 999 and timesteps[-1] >= 0
        assert timesteps == sorted(set(timesteps), reverse=True)
        if hasattr(sampler, "sigmas"):
            assert len(sampler.sigmas) == num_steps + 1 and torch.isfinite(sampler.sigmas).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_epsilon_sampler_keeps_the_plain_schedule(name: str) -> None:
    plain, rescaled = (build(name, NoiseSchedule("epsilon", zero_terminal_snr)) for zero_terminal_snr in (False, True))
    assert torch.equal(plain.alphas_cumprod, rescaled.alphas_cumprod)
    torch.testing.assert_close(plain.alphas_cumprod.double(), NoiseSchedule().alphas_cumprod, rtol=1e-4, atol=0)
    assert plain.config.timestep_spacing == rescaled.config.timestep_spacing if "timestep_spacing" in plain.config else True


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ZERO_SNR_NAMES)))
def test_samplers_that_cannot_begin_at_zero_snr_say_so(name: str) -> None:
    with pytest.raises(ConfigError, match="zero_terminal_snr"):
        build(name, NoiseSchedule("v_prediction", zero_terminal_snr=True))


@pytest.mark.parametrize("name", NAMES)
def test_no_sampler_clips_and_each_knows_what_was_trained(name: str) -> None:
    for prediction_type in ("epsilon", "v_prediction"):
        config = build(name, NoiseSchedule(prediction_type)).config
        assert config.prediction_type == prediction_type
        assert not config.get("clip_sample", False)
        assert not config.get("thresholding", False)
        assert (config.num_train_timesteps, config.beta_start, config.beta_end) == (1000, 0.00085, 0.012)
        assert config.beta_schedule == "scaled_linear"


def test_dpmsolver_ends_at_the_lowest_sigma() -> None:
    sampler = DpmSolver().build_sampler(NoiseSchedule())
    assert (sampler.config.algorithm_type, sampler.config.final_sigmas_type) == ("dpmsolver", "sigma_min")


def test_lms_without_scipy_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match="scipy"):
        Lms().build_sampler(NoiseSchedule())


def test_each_call_builds_a_fresh_sampler() -> None:
    assert Euler().build_sampler(NoiseSchedule()) is not Euler().build_sampler(NoiseSchedule())
