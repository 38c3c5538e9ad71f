"""What is train_and_compare, in which precision, seen in the saved files of real runs."""

from pathlib import Path

import pytest
import torch

from sdxl_train.learning_rates import block_of

UNET, TE1, TE2 = "model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1."


@pytest.mark.parametrize(
    ("keys", "changed_parts"),
    [
        ({"train_text_encoder": True}, {UNET, TE1, TE2}),
        ({"train_text_encoder": True, "learning_rate_te1": 0.0}, {UNET, TE2}),
        ({"train_text_encoder": True, "learning_rate_te2": 0.0}, {UNET, TE1}),
        ({"train_text_encoder": True, "learning_rate": 0.0, "learning_rate_te1": 1e-3, "learning_rate_te2": 1e-3}, {TE1, TE2}),
    ],
)
def test_exactly_the_parts_with_a_rate_change(train_and_compare, metrics, tmp_path: Path, keys, changed_parts) -> None:
    changed, _, _ = train_and_compare(**keys)
    assert {part for part in (UNET, TE1, TE2) if any(name.startswith(part) for name in changed)} == changed_parts
    assert all(name.startswith((UNET, TE1, TE2)) for name in changed)
    tags = {UNET: "lr/unet", TE1: "lr/text_encoder1", TE2: "lr/text_encoder2"}
    assert {name for name in metrics(tmp_path / "out")[0] if name.startswith("lr/")} == {tags[part] for part in changed_parts}


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_the_layers_of_text_encoder_1_that_nobody_reads_stay_as_they_were(train_and_compare, clip_skip) -> None:
    changed, after, _ = train_and_compare(train_text_encoder=True, clip_skip=clip_skip)
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in after if name.startswith(TE1) and ".layers." in name}
    trained_layers = {int(name.split(".layers.")[1].split(".")[0]) for name in changed if name.startswith(TE1) and ".layers." in name}
    assert trained_layers == {layer for layer in layers if layer < len(layers) - clip_skip}
    assert not any("final_layer_norm" in name for name in changed if name.startswith(TE1))


def test_a_block_at_rate_0_stays_bit_identical_and_the_others_change(train_and_compare, metrics, tmp_path: Path) -> None:
    rates = [0.0 if block in (3, 11) else 1e-3 for block in range(23)]
    changed, _, ended = train_and_compare(block_lr=rates)
    blocks = {block_of(name.removeprefix(UNET)) for name in changed}
    assert blocks == set(range(23)) - {3, 11}
    assert "block_lr is deprecated" in ended.err
    assert {name for name in metrics(tmp_path / "out")[0] if name.startswith("lr/")} == {f"lr/block{b}" for b in range(23) if rates[b]}


@pytest.mark.parametrize("optimizer", ["AdaFactor", "AdamW"])
def test_full_bf16_holds_all_trained_weights_in_bf16_and_learns(train_and_compare, optimizer) -> None:
    changed, after, ended = train_and_compare(full_bf16=True, mixed_precision="bf16", train_text_encoder=True, save_precision="keep", optimizer_type=optimizer)
    trained_dtypes = {after[name].dtype for name in changed}
    assert trained_dtypes == {torch.bfloat16}
    assert "bfloat16, also weights and gradients" in ended.err
    _, frozen, _ = train_and_compare("frozen", full_bf16=True, mixed_precision="bf16", save_precision="keep", optimizer_type=optimizer)
    untrained = [name for name in frozen if name.startswith((TE1, TE2)) and frozen[name].is_floating_point()]
    assert {frozen[name].dtype for name in untrained} == {torch.float32}, "frozen values went through another dtype"


@pytest.mark.parametrize("keys", [{"full_bf16": True}, {"full_fp16": True}, {"full_bf16": True, "full_fp16": True, "mixed_precision": "bf16"}])
def test_half_precision_weights_need_the_same_mixed_precision(cli, config, keys) -> None:
    ended = cli(config(**keys))
    assert (ended.code == 2 and "mixed_precision" in ended.err) or "both true" in ended.err
