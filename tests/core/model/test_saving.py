"""What a saved file holds."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_train.errors import CheckpointError
from sdxl_train.model.architecture import METADATA_KEY
from sdxl_train.model.saving import file_markers, file_metadata, save_checkpoint
from sdxl_train.model.single_file import Checkpoint, load_text_encoders, load_unet, open_checkpoint
from sdxl_train.model.tiny import write_tiny_sdxl

TE1, TE2 = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
METADATA = file_metadata(step=7, epoch=2, prediction_type="epsilon", zero_terminal_snr=False, title="mine", resolution=1024)


@pytest.fixture(scope="module")
def tensors(tiny_path: Path) -> dict[str, Tensor]:
    return load_file(tiny_path)


@pytest.fixture
def rebuilt(tiny: Checkpoint, tmp_path: Path) -> Callable[[dict[str, Tensor]], Checkpoint]:
    def rebuilt(tensors: dict[str, Tensor]) -> Checkpoint:
        save_file(tensors, tmp_path / "base.safetensors", {METADATA_KEY: tiny.metadata[METADATA_KEY]})
        return open_checkpoint(str(tmp_path / "base.safetensors"))

    return rebuilt


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


def test_an_untrained_model_is_saved_bit_by_bit(tiny: Checkpoint, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    unet = load_unet(tiny, torch.float32)
    first, second = load_text_encoders(tiny, torch.float32)
    trained = {"unet": unet.state_dict(), "text_encoder": first.state_dict(), "text_encoder_2": second.state_dict()}
    for number, parts in enumerate(({}, trained)):
        path = tmp_path / f"{number}.safetensors"
        save_checkpoint(path, tiny, parts, "keep", METADATA)
        saved = load_file(path)
        assert saved.keys() == tensors.keys() and all(same_bits(saved[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp16", torch.float16), ("bf16", torch.bfloat16), ("float", torch.float32), ("fp32", torch.float32), ("float32", torch.float32)],
)
def test_the_precision_applies_to_floats_and_never_to_integers(
    tiny: Checkpoint, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    unet = load_unet(tiny, torch.float32)
    save_checkpoint(tmp_path / "m", tiny, {"unet": unet.state_dict()}, precision, METADATA)
    saved = load_file(tmp_path / "m")
    ids = saved.pop(TE1 + "embeddings.position_ids")
    assert ids.dtype == torch.int64 and ids.tolist() == [list(range(77))]
    assert {tensor.dtype for tensor in saved.values()} == {dtype}


def test_keep_writes_each_tensor_as_it_is_held(rebuilt: Callable, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    base = rebuilt(half)
    save_checkpoint(tmp_path / "m", base, {"unet": load_unet(base, torch.float32).state_dict()}, "keep", METADATA)
    saved = load_file(tmp_path / "m")
    assert saved["model.diffusion_model.out.2.weight"].dtype == torch.float32
    assert same_bits(saved["first_stage_model.quant_conv.weight"], half["first_stage_model.quant_conv.weight"])


def test_frozen_parts_are_converted_once_from_the_loaded_values(tiny: Checkpoint, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", tiny, {}, "fp16", METADATA)
    name = "first_stage_model.decoder.conv_in.weight"
    saved = load_file(tmp_path / "m")[name]
    assert same_bits(saved, tensors[name].half())
    assert not same_bits(saved, tensors[name].bfloat16().half())


def test_a_trained_tensor_replaces_the_base_and_left_out_ones_stay(tiny: Checkpoint, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0])
    projection = torch.arange(576.0).reshape(24, 24)
    trained = {"unet": {"conv_out.bias": bias}, "text_encoder_2": {"text_projection.weight": projection}}
    save_checkpoint(tmp_path / "m", tiny, trained, "keep", METADATA)
    saved = load_file(tmp_path / "m")
    assert torch.equal(saved.pop("model.diffusion_model.out.2.bias"), bias)
    assert torch.equal(saved.pop(TE2 + "text_projection"), projection.T)
    assert all(same_bits(saved[name], tensors[name]) for name in saved)


def test_queries_keys_and_values_are_stacked_in_this_order(tiny: Checkpoint, tmp_path: Path) -> None:
    layer = "text_model.encoder.layers.1.self_attn"
    trained = {f"{layer}.{letter}_proj.bias": torch.full((24,), float(i)) for i, letter in enumerate("qkv")}
    save_checkpoint(tmp_path / "m", tiny, {"text_encoder_2": trained}, "keep", METADATA)
    stacked = load_file(tmp_path / "m")[TE2 + "transformer.resblocks.1.attn.in_proj_bias"]
    assert stacked.tolist() == [0.0] * 24 + [1.0] * 24 + [2.0] * 24


def test_the_memory_layout_of_trained_weights_does_not_matter(tiny: Checkpoint, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    unet = load_unet(tiny, torch.float32).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    save_checkpoint(tmp_path / "m", tiny, {"unet": unet.state_dict()}, "keep", METADATA)
    saved = load_file(tmp_path / "m")
    assert all(same_bits(saved[name], tensors[name]) for name in tensors)


def test_names_of_wrappers_do_not_reach_the_file(tiny: Checkpoint, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    state = {f"module._orig_mod.{name}": tensor for name, tensor in load_unet(tiny, torch.float32).state_dict().items()}
    save_checkpoint(tmp_path / "m", tiny, {"unet": state}, "keep", METADATA)
    assert load_file(tmp_path / "m").keys() == tensors.keys()


def test_absent_position_ids_and_logit_scale_are_written_as_sdxl_has_them(
    rebuilt: Callable, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    absent = (TE1 + "embeddings.position_ids", TE2 + "logit_scale")
    save_checkpoint(tmp_path / "m", rebuilt({n: t for n, t in tensors.items() if n not in absent}), {}, "keep", METADATA)
    saved = load_file(tmp_path / "m")
    assert same_bits(saved[absent[0]], torch.arange(77).reshape(1, 77))
    assert saved[absent[1]].item() == pytest.approx(4.6052, abs=1e-4) and saved[absent[1]].shape == ()


def test_unknown_tensors_are_kept(rebuilt: Callable, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    extra = {"other.count": torch.tensor([3, 4]), "other.scale": torch.tensor([0.1])}
    save_checkpoint(tmp_path / "m", rebuilt({**tensors, **extra}), {}, "keep", METADATA)
    saved = load_file(tmp_path / "m")
    assert all(same_bits(saved[name], extra[name]) for name in extra)


@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal_snr", "expected"),
    [("epsilon", False, set()), ("v_prediction", False, {"v_pred"}), ("v_prediction", True, {"v_pred", "ztsnr"})],
)
def test_markers_say_what_holds(
    tiny: Checkpoint, tensors: dict[str, Tensor], tmp_path: Path, prediction_type: str, zero_terminal_snr: bool, expected: set[str]
) -> None:
    metadata = {**METADATA, "prediction_type": prediction_type, "zero_terminal_snr": str(zero_terminal_snr).lower()}
    save_checkpoint(tmp_path / "m", tiny, {}, "fp16", metadata, file_markers(prediction_type, zero_terminal_snr))
    saved = load_file(tmp_path / "m")
    assert saved.keys() - tensors.keys() == expected and all(saved[name].numel() == 0 for name in expected)
    again = open_checkpoint(str(tmp_path / "m"))
    assert (again.prediction_type, again.zero_terminal_snr) == (prediction_type, zero_terminal_snr)


def test_a_marker_of_the_base_is_kept_while_it_holds(rebuilt: Callable, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    base = rebuilt({**tensors, "v_pred": torch.zeros(0, dtype=torch.float16)})
    save_checkpoint(tmp_path / "v", base, {}, "float", METADATA, ["v_pred"])
    assert load_file(tmp_path / "v")["v_pred"].dtype == torch.float16
    save_checkpoint(tmp_path / "e", base, {}, "float", METADATA)
    assert "v_pred" not in load_file(tmp_path / "e")


def test_the_metadata_is_that_of_the_specification(tiny: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", tiny, {}, "fp16", {**METADATA, "plugin": "note"})
    with safe_open(tmp_path / "m", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop(METADATA_KEY) == tiny.metadata[METADATA_KEY]
    assert metadata == {
        "format": "pt",
        "epoch": "2",
        "step": "7",
        "prediction_type": "epsilon",
        "zero_terminal_snr": "false",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.title": "mine",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "1024x1024",
        "plugin": "note",
    }


@pytest.mark.parametrize(("value", "precision"), [(float("nan"), "keep"), (float("inf"), "bf16"), (70000.0, "fp16")])
def test_weights_that_are_not_finite_are_not_saved(tiny: Checkpoint, tmp_path: Path, value: float, precision: str) -> None:
    (tmp_path / "m").write_bytes(b"old")
    trained = {"unet": {"conv_out.bias": torch.tensor([0, 0, value, 0])}}
    with pytest.raises(CheckpointError, match=r"model\.diffusion_model\.out\.2\.bias"):
        save_checkpoint(tmp_path / "m", tiny, trained, precision, METADATA)
    assert (tmp_path / "m").read_bytes() == b"old" and os.listdir(tmp_path) == ["m"]


def test_a_refusing_disk_is_named_with_the_bytes_needed(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"quota.*; \d{8} bytes needed, \d+ free"):
        save_checkpoint(tmp_path / "m", tiny, {}, "keep", METADATA)
    assert os.listdir(tmp_path) == []


def test_the_tiny_model_has_the_same_bytes_in_every_run(tiny_path: Path, tmp_path: Path) -> None:
    write_tiny_sdxl(tmp_path / "again")
    write_tiny_sdxl(tmp_path / "other", seed=1)
    assert (tmp_path / "again").read_bytes() == tiny_path.read_bytes() != (tmp_path / "other").read_bytes()


def test_a_tiny_model_of_other_sizes_opens(tmp_path: Path) -> None:
    written = write_tiny_sdxl(
        tmp_path / "m", unet_channels=(32, 64, 128), transformer_layers=(0, 2, 3), te_widths=(64, 96), te_layers=(2, 5), dtype=torch.float16
    )
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    assert checkpoint.architecture == written
    assert checkpoint.read(TE2 + "text_projection").dtype == torch.float16
    load_unet(checkpoint, torch.float32)
