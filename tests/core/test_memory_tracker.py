"""A step of the real loop on the meta device: operations, kernels, waits, and the limits of memory for full SDXL."""

import pytest
from memory_runs import measured

from sdxl_train.memory_estimate import GRADIENTS, TEXT_ENCODERS, VAE, WEIGHT_COPIES, WEIGHTS
from sdxl_train.memory_tracker import MeasuredStep
from sdxl_train.model.architecture import SDXL
from sdxl_train.model.tiny import tiny_architecture
from sdxl_train.step_costs import StepCosts, Trained, num_parameters

TINY = tiny_architecture(unet_channels=(32, 64, 64))
SIZE = (256, 256)


@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer_type": "AdamW"},
        {"optimizer_type": "AdaFactor", "mixed_precision": "bf16"},
        {"optimizer_type": "AdamW", "mixed_precision": "bf16", "full_bf16": True, "max_grad_norm": 1.0},
        {"optimizer_type": "AdaFactor", "mixed_precision": "bf16", "fused_backward": True, "noise_offset": 0.1},
    ],
)
def test_a_step_never_waits_and_costs_what_the_closed_form_says(config, keys: dict) -> None:
    step = measured(config, TINY, SIZE, batch_size=3, **keys)
    assert step.waits == []
    assert step.flops == pytest.approx(3 * StepCosts(TINY, Trained()).of_sample(SIZE, 1), rel=1e-3)


def test_the_second_forward_pass_of_checkpointing_is_seen(config) -> None:
    plain = measured(config, TINY, SIZE, batch_size=4)
    checkpointed = measured(config, TINY, SIZE, batch_size=4, gradient_checkpointing=True)
    assert 1.1 < checkpointed.flops / plain.flops < 4 / 3 and checkpointed.total < plain.total


def test_trained_text_encoders_cost_what_the_closed_form_says(config) -> None:
    step = measured(config, TINY, SIZE, train_text_encoder=True, batch_size=2, max_token_length=150)
    costs = StepCosts(TINY, Trained(text_encoder=True, text_encoder_2=True))
    assert step.flops == pytest.approx(2 * costs.of_sample(SIZE, 2), rel=1e-2)


def test_frozen_blocks_cost_what_the_closed_form_says(config) -> None:
    rates = [0.0] * 12 + [1e-5] * 11
    step = measured(config, TINY, SIZE, block_lr=rates, batch_size=2)
    costs = StepCosts(TINY, Trained(frozenset(range(12, 23))))
    assert step.flops == pytest.approx(2 * costs.of_sample(SIZE, 1), rel=1e-2)


def test_encoding_in_the_step_is_counted(config) -> None:
    step = measured(config, TINY, SIZE, cache_latents=False, batch_size=2)
    assert step.flops == pytest.approx(2 * StepCosts(TINY, Trained(), encodes_latents=True).of_sample(SIZE, 1), rel=1e-3)


def test_the_loss_scaling_of_fp16_waits_and_is_found(config) -> None:
    assert measured(config, TINY, SIZE, mixed_precision="fp16").waits


def test_weights_and_their_copies_are_told_apart(config) -> None:
    counts = num_parameters(TINY)
    step = measured(config, TINY, SIZE, mixed_precision="bf16", batch_size=4)
    assert step.bytes_by_part[WEIGHTS] == 4 * counts["unet"] and step.bytes_by_part[VAE] == 2 * counts["vae"]
    assert step.bytes_by_part[WEIGHT_COPIES] == pytest.approx(2 * counts["unet"], rel=0.05)
    accumulated = measured(config, TINY, SIZE, gradient_accumulation_steps=4, batch_size=4)
    assert accumulated.bytes_by_part[GRADIENTS] >= 4 * counts["unet"]


def gib_of_unet(step: MeasuredStep) -> float:
    return (step.total - step.bytes_by_part[TEXT_ENCODERS] - step.bytes_by_part[VAE]) / 2**30


FUSED = {"optimizer_type": "AdaFactor", "fused_backward": True, "gradient_checkpointing": True, "mixed_precision": "bf16"}


@pytest.mark.slow
def test_full_sdxl_trains_in_float32_weights_with_adamw(config) -> None:
    keys = {"optimizer_type": "AdamW", "gradient_checkpointing": True, "mixed_precision": "bf16", "batch_size": 4}
    step = measured(config, SDXL, (1024, 1024), **keys)
    assert gib_of_unet(step) <= 41.5 and step.waits == []
    assert step.flops == pytest.approx(4 * (25.443e12 + 0.111e12), rel=1e-3)
    assert step.num_kernels < 18_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "keys"),
    [
        (5.9, {**FUSED, "full_bf16": True, "batch_size": 1}),
        (16.5, {**FUSED, "full_bf16": True, "batch_size": 16}),
        (11.0, {**FUSED, "batch_size": 1}),
    ],
)
def test_full_sdxl_trains_in_little_memory_with_a_fused_backward_pass(config, limit: float, keys: dict) -> None:
    step = measured(config, SDXL, (1024, 1024), **keys)
    assert gib_of_unet(step) <= limit and step.waits == []
    assert step.flops == pytest.approx(keys["batch_size"] * (25.443e12 + 0.111e12), rel=1e-3)
