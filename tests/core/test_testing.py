"""The kit for plugin authors: it passes what keeps the rules, and names what breaks them."""

from pathlib import Path

import pytest

from sdxl_train import PluginError
from sdxl_train.installed_plugins import installed_plugins
from sdxl_train.plugin_discovery import Catalogue, missing_packages
from sdxl_train.plugin_keys import PLUGIN_KEYS
from sdxl_train.testing import check_plugin, training_project

# The adafactor schedule needs an optimizer of its own kind, and so a test of its own.
BUILT_IN = [(one.key.key, one.name) for one in installed_plugins(built_in_only=True) if (one.key.key, one.name) != ("lr_scheduler", "adafactor")]
BREAKERS = """
import random

import torch

from sdxl_train import hookimpl


class FromTheGlobalGenerator:
    @hookimpl
    def sample_timesteps(self, batch_size):
        return torch.randint(100, 900, (batch_size,))


class FirstRowForAll:
    @hookimpl
    def sample_timesteps(self, batch_size, random):
        return random.integers(100, 900)[:1].expand(batch_size).clone()


class OutOfRange:
    @hookimpl
    def sample_timesteps(self, batch_size):
        return torch.full((batch_size,), 900)


class InPlace:
    @hookimpl
    def shape_noise(self, noise):
        return noise.mul_(2)


class DividesBySnr:
    @hookimpl
    def weigh_loss(self, snr):
        return 1 / snr


def counts(img_key, img_md, counter):
    counter["artist"]["x"] = 1
    return 1


class OwnRandom:
    @hookimpl
    def process_caption(self):
        return str(random.SystemRandom().random())


class OtherParameters:
    @hookimpl
    def build_optimizer(self, param_groups):
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
"""


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers hands tensors to numpy
@pytest.mark.parametrize(("key", "name"), BUILT_IN)
def test_every_built_in_plugin_keeps_the_rules(key: str, name: str) -> None:
    missing = missing_packages(Catalogue().find(PLUGIN_KEYS[key], name).value)
    if missing:
        pytest.skip(missing[0])
    required = {"piecewise_constant": {"step_rules": "1:10,0.1"}, "by_quality": {"repeats": {"best": 2}}, "drop_named_tags": {"tags": ["a"]},
                "density": {"density": [1.0, 2.0]}}  # fmt: skip
    check_plugin(key, name, **required.get(name, {}))


@pytest.mark.parametrize(
    ("key", "name", "options"),
    [
        ("noise_strategies", "noise_offset", {"noise_offset": 0.1, "adaptive_noise_scale": 0.05}),
        ("noise_strategies", "multires_noise", {"multires_noise_iterations": 6}),
        ("noise_strategies", "ip_noise", {"ip_noise_gamma": 0.1}),
        ("loss_type", "huber", {"huber_schedule": "exponential", "huber_c": 0.3}),
        ("loss_type", "smooth_l1", {"huber_schedule": "constant", "huber_scale": 2.0}),
        ("timestep_sampler_type", "beta", {"alpha": 0.5, "beta": 0.001}),
        ("loss_weightings", "debiased", {"debiased_estimation_loss": True}),
        ("loss_weightings", "scale_v_pred", {"scale_v_pred_loss_like_noise_pred": True}),
    ],
)
def test_built_in_plugins_keep_the_rules_when_they_are_on(key: str, name: str, options: dict) -> None:
    check_plugin(key, name, **options)


@pytest.mark.parametrize(
    ("key", "name", "said"),
    [
        ("timestep_sampler_type", "FromTheGlobalGenerator", "differently for the same batch"),
        ("timestep_sampler_type", "FirstRowForAll", "depends on the others of its batch"),
        ("timestep_sampler_type", "OutOfRange", r"in \[100, 900\)"),
        ("noise_strategies", "InPlace", "changes its argument noise"),
        ("loss_weightings", "DividesBySnr", "not finite"),
        ("num_repeats_getter", "counts", "changes the counter"),
        ("caption_processor", "OwnRandom", "differently for the same picture"),
        ("optimizer_type", "OtherParameters", "exactly the parameters"),
    ],
)
def test_a_plugin_that_breaks_a_rule_is_named_with_the_rule(key: str, name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "breakers.py").write_text(BREAKERS)
    with pytest.raises(PluginError, match=said) as caught:
        check_plugin(key, f"{tmp_path}/breakers.py:{name}")
    assert name in str(caught.value)


def test_a_wrapper_is_checked_around_the_built_in_answer(tmp_path: Path) -> None:
    wrapper = "from sdxl_train import hookimpl\n\nclass W:\n    @hookimpl(wrapper=True)\n    def sample_timesteps(self):\n        return (yield) + {}\n"
    for added in (0, 1000):
        (tmp_path / f"plus{added}.py").write_text(wrapper.format(added))
    check_plugin("plugins", f"{tmp_path}/plus0.py:W")
    with pytest.raises(PluginError, match="spoils its answer"):
        check_plugin("plugins", f"{tmp_path}/plus1000.py:W")


@pytest.mark.slow
def test_a_training_that_fails_shows_what_was_said(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def boom(img_info, **kwargs):\n    raise RuntimeError('no such luck')\n")
    outcome = training_project(tmp_path, caption_processor="./mine.py:boom").run()
    assert outcome.exit_code == 1 and outcome.metrics == ()
    with pytest.raises(AssertionError, match="no such luck"):
        outcome.assert_success()
