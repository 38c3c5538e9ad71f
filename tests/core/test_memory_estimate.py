"""The closed form of a step's memory agrees with the step itself, run on the meta device."""

import json
import re
from pathlib import Path

import pytest
from memory_runs import measured, predicted

from sdxl_train.memory_estimate import ACTIVATIONS, CONTEXT, CONTEXT_BYTES, GRADIENTS, OPTIMIZER, TEXT_ENCODERS, WEIGHTS, largest_bucket
from sdxl_train.model.architecture import SDXL
from sdxl_train.model.tiny import tiny_architecture
from sdxl_train.optimizer_memory import optimizer_memory
from sdxl_train.step_costs import num_parameters

SMALL = tiny_architecture(unet_channels=(64, 128, 256), transformer_layers=(0, 1, 2), te_widths=(64, 64))
BF16, FULL = {"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "full_bf16": True}
ADAMW, FUSED = {"optimizer_type": "AdamW"}, {"fused_backward": True, "gradient_checkpointing": True}


def agrees(config, architecture, size: tuple[int, int], keys: dict) -> None:
    form, step = predicted(config, architecture, size, **keys), measured(config, architecture, size, **keys)
    assert form.total - CONTEXT_BYTES == pytest.approx(step.total, rel=0.05), (form.bytes_by_part, step.bytes_by_part)


@pytest.mark.parametrize(
    "keys",
    [
        {**ADAMW},
        {**FULL, **ADAMW, "batch_size": 8},
        {**BF16, "gradient_checkpointing": True, "batch_size": 16},
        {**BF16, "train_text_encoder": True},
        pytest.param({**FULL, **FUSED}, marks=pytest.mark.slow),
        pytest.param({"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        {**BF16, "sdpa": False},
    ],
)
def test_the_closed_form_agrees_for_a_small_model(config, keys: dict) -> None:
    agrees(config, SMALL, (512, 384), {"batch_size": 4, **keys})


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {**FULL, **FUSED, "batch_size": 1},
        {**FULL, **FUSED, "batch_size": 16},
        {**BF16, **FUSED, "batch_size": 1},
        {**BF16, **ADAMW, "gradient_checkpointing": True, "batch_size": 4},
        {**FULL, **ADAMW, "batch_size": 4},
        {**BF16, **ADAMW, "batch_size": 1},
        {**BF16, **ADAMW, "batch_size": 2, "train_text_encoder": True, "gradient_checkpointing": True},
        {**BF16, "batch_size": 1, "sdpa": False},
        {"batch_size": 1},
        {**FULL, **FUSED, "batch_size": 4, "cache_latents": False},
    ],
)
def test_the_closed_form_agrees_for_full_sdxl(config, keys: dict) -> None:
    agrees(config, SDXL, (1024, 1024), keys)


def test_the_parts_are_what_the_keys_say(config) -> None:
    counts = num_parameters(SDXL)
    parts = predicted(config, SDXL, (1024, 1024), **BF16, **ADAMW, gradient_checkpointing=True).bytes_by_part
    assert parts[WEIGHTS] == 4 * counts["unet"] and parts[OPTIMIZER] == 8 * counts["unet"] and parts[CONTEXT] == CONTEXT_BYTES
    assert parts[TEXT_ENCODERS] == 2 * (counts["text_encoder"] + counts["text_encoder_2"])
    full = predicted(config, SDXL, (1024, 1024), **FULL, **FUSED, batch_size=1).bytes_by_part
    assert full[WEIGHTS] == 2 * counts["unet"] and full[OPTIMIZER] < 20 * 2**20 and full[GRADIENTS] < 64 * 2**20


def test_more_of_everything_needs_more(config) -> None:
    small = predicted(config, SDXL, (1024, 1024), **BF16, batch_size=1)
    assert predicted(config, SDXL, (1024, 1024), **BF16, batch_size=2).total > small.total
    assert predicted(config, SDXL, (1152, 1152), **BF16, batch_size=1).total > small.total
    assert predicted(config, SDXL, (1024, 1024), **BF16, batch_size=1, max_token_length=225).total > small.total
    plain = predicted(config, SDXL, (1024, 1024), **BF16, batch_size=1, sdpa=False)
    assert plain.bytes_by_part[ACTIVATIONS] > 2 * small.bytes_by_part[ACTIVATIONS]


@pytest.mark.parametrize(
    ("name", "options", "weight_bytes", "of_a_number"),
    [
        ("AdamW", {}, 4, 8),
        ("AdamW", {}, 2, 4),
        ("AdamW", {"state_dtype": "float32"}, 2, 8),
        ("AdamW", {"state_dtype": "bfloat16"}, 4, 4),
        ("AdamW", {"amsgrad": True}, 4, 12),
        ("adamw8bit", {}, 4, 2),
        ("Lion8bit", {}, 4, 1),
        ("AdaFactor", {}, 4, 0),
        ("AdaFactor", {"beta1": 0.9}, 4, 4),
    ],
)
def test_the_state_of_known_optimizers(name: str, options: dict, weight_bytes: int, of_a_number: float) -> None:
    memory = optimizer_memory(name, options, weight_bytes)
    assert memory.is_known and memory.state((1280, 1280)) / 1280**2 == pytest.approx(of_a_number, abs=0.04)


def test_a_convolution_is_factored_as_a_matrix() -> None:
    assert optimizer_memory("AdaFactor", {}, 4).state((640, 320, 3, 3)) == 4 * (640 + 320 * 9)


def test_an_unknown_optimizer_counts_8_bytes_and_says_so(config) -> None:
    assert optimizer_memory("mine", {}, 4).state((3, 5)) == 8 * 15 and not optimizer_memory("mine", {}, 4).is_known
    assert "unknown" not in str(predicted(config, SMALL, (512, 512), **ADAMW))
    assert "; unknown optimizer state counted as 8 bytes a parameter" in str(predicted(config, SMALL, (512, 512), optimizer_type="Adagrad"))


def test_the_line_says_the_sum_and_its_parts(config) -> None:
    line = str(predicted(config, SDXL, (1024, 1024), **FULL, **FUSED, batch_size=1))
    total, *parts = map(float, re.findall(r"\d+\.\d", line))
    assert re.match(r"\d+\.\d GiB = weights 4\.8 \+ text encoders 1\.5 \+ ", line)
    assert sum(parts) == pytest.approx(total, abs=0.05 * len(parts) + 0.1)


def test_the_largest_bucket_has_the_most_pixels() -> None:
    assert largest_bucket([(1024, 1024), (832, 1248), (1152, 896)]) == (1024, 1024)


def test_check_and_the_banner_say_what_a_run_needs(config, cli, tmp_path: Path) -> None:
    path = config(num_train_epochs=1, max_train_steps=1)
    said = r"\d+\.\d GiB = CUDA context 0\.7"
    assert re.search(rf"memory at its peak, for a batch of 4 at 64x64:\n  predicted: {said}", cli("check", path).out)
    assert re.search(f"predicted peak memory: {said}", cli("train", path).err)


def test_check_measures_the_step_when_asked(config, cli) -> None:
    path = config()
    plain, asked = (json.loads(cli("check", path, "--json", *more).out)["memory"] for more in ((), ("--memory",)))
    assert plain["measured"] is None and plain["predicted"]["total"] == sum(plain["predicted"]["bytes_by_part"].values())
    assert asked["predicted"] == plain["predicted"] and asked["measured"]["waits"] == [] and asked["measured"]["num_kernels"] > 0
    assert asked["measured"]["total"] == sum(asked["measured"]["bytes_by_part"].values())
    assert re.search(r"measured:  .* GiB.*\n  the step: .* TFLOP, \d+ kernels, 0 waits for the device", cli("check", path, "--memory").out)


def test_check_says_what_keeps_the_step_from_running(config, cli) -> None:
    ended = cli("check", config(fused_backward=True, optimizer_type="SGDNesterov"), "--memory")
    assert ended.code == 2 and "fused_backward" in ended.out
