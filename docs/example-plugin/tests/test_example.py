"""The tests of a plugin package: each plugin by itself, and one training with both."""

from pathlib import Path

import pytest
import torch
from sdxl_train_example.timesteps import kumaraswamy

from sdxl_train.testing import check_plugin, training_project


@pytest.mark.parametrize("options", [{}, {"keep": 0}, {"keep": 2, "separator": "; "}])
def test_shuffle_tags_keeps_the_rules_of_its_hook(options: dict) -> None:
    check_plugin("caption_processor", "shuffle_after_first", **options)


@pytest.mark.parametrize("options", [{}, {"a": 0.5, "b": 3.0}])
def test_kumaraswamy_keeps_the_rules_of_its_hook(options: dict) -> None:
    check_plugin("timestep_sampler_type", "kumaraswamy", **options)


def test_kumaraswamy_has_the_distribution_function_one_minus_one_minus_x_to_the_a_to_the_b() -> None:
    uniform = torch.linspace(0, 1, 101, dtype=torch.float64)
    x = kumaraswamy(uniform, a=2.0, b=5.0)
    torch.testing.assert_close(1 - (1 - x**2.0) ** 5.0, uniform)


def test_a_training_uses_both(tmp_path: Path) -> None:
    project = training_project(
        tmp_path,
        caption_processor="shuffle_after_first",
        timestep_sampler_type="kumaraswamy",
        caption_processor_kwargs={"keep": 1},
        timestep_sampler_kwargs={"a": 2.0, "b": 2.0},
    )
    outcome = project.run().assert_success()
    assert [line["step"] for line in outcome.metrics] == [1, 2, 3, 4]
    assert [path.name for path in outcome.saved] == ["model_ep2_step4.safetensors"]
    assert "sdxl-train-example-plugin 0.1.0" in outcome.stderr
