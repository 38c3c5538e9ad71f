"""What may be given as the base model and as `vae`, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_train.errors import CheckpointError
from sdxl_train.model.architecture import METADATA_KEY
from sdxl_train.model.single_file import Checkpoint, load_text_encoders, load_unet, load_vae, open_checkpoint, vae_encoder_digest

TE1, TE2 = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
ATTENTION = "first_stage_model.encoder.mid.attn_1.q.weight"
POSITION_IDS = TE1 + "embeddings.position_ids"


@pytest.fixture(scope="module")
def tensors(tiny_path: Path) -> dict[str, Tensor]:
    return load_file(tiny_path)


@pytest.fixture
def write(tiny: Checkpoint, tmp_path: Path) -> Callable[..., str]:
    def write(tensors: dict[str, Tensor], name: str = "model.safetensors", **metadata: str) -> str:
        save_file(tensors, tmp_path / name, {METADATA_KEY: tiny.metadata[METADATA_KEY], **metadata})
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="module")
def diffusers_dir(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as diffusers and transformers save it."""
    root = tmp_path_factory.mktemp("diffusers")
    load_unet(tiny, torch.float32).save_pretrained(root / "unet", max_shard_size="400KB")
    load_vae(tiny, torch.float32).save_pretrained(root / "vae")
    first, second = load_text_encoders(tiny, torch.float32)
    first.save_pretrained(root / "text_encoder")
    second.save_pretrained(root / "text_encoder_2")
    return root


def assert_same_values(checkpoint: Checkpoint, expected: dict[str, Tensor], but: tuple[str, ...] = (POSITION_IDS,)) -> None:
    for name, tensor in expected.items():
        if name not in but:
            assert torch.equal(checkpoint.read(name), tensor), name


def test_all_tensors_are_read_by_their_names(tiny: Checkpoint, tensors: dict[str, Tensor]) -> None:
    assert_same_values(tiny, tensors)
    assert set(tiny.tensors) == set(tensors) - {POSITION_IDS}


def test_a_symbolic_link_is_followed_to_the_real_path(tiny: Checkpoint, tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tiny_path)
    (tmp_path / "two").symlink_to(tmp_path / "one")
    assert open_checkpoint(str(tmp_path / "two")).path == str(tiny_path.resolve())


@pytest.mark.parametrize("path", ["", "absent.safetensors", "a\0b"])
def test_a_missing_path_is_an_error(path: str) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(path)


def test_missing_unknown_misshapen_and_integer_tensors_are_named(tensors: dict[str, Tensor], write: Callable[..., str]) -> None:
    changed = dict(tensors)
    del changed[TE2 + "ln_final.bias"]
    changed[TE2 + "ln_final.scale"] = torch.zeros(24)
    changed["model.diffusion_model.out.2.bias"] = torch.zeros(5)
    changed["first_stage_model.quant_conv.bias"] = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write(changed))
    message = str(caught.value)
    assert f"1 missing: {TE2}ln_final.bias" in message
    assert f"1 unknown: {TE2}ln_final.scale" in message
    assert "1 of another shape: model.diffusion_model.out.2.bias [5] instead of [4]" in message
    assert "1 neither float16, bfloat16 nor float32: first_stage_model.quant_conv.bias I64" in message


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.", TE1, TE2])
def test_a_model_without_one_of_the_four_networks_is_not_sdxl(tensors: dict[str, Tensor], write: Callable[..., str], prefix: str) -> None:
    with pytest.raises(CheckpointError, match=f"not an SDXL model: .*{prefix}|not built like SDXL"):
        open_checkpoint(write({name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}))


def test_other_kinds_of_models_are_recognised(write: Callable[..., str]) -> None:
    with pytest.raises(CheckpointError, match="looks like Stable Diffusion 1 or 2"):
        open_checkpoint(write({"cond_stage_model.transformer.x": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="looks like a LoRA"):
        open_checkpoint(write({"lora_unet_mid.weight": torch.zeros(1)}))


def test_half_precision_in_any_mix_is_accepted(tensors: dict[str, Tensor], write: Callable[..., str]) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    mixed = {n: t.to(dtypes[i % 3]) if t.is_floating_point() else t for i, (n, t) in enumerate(tensors.items())}
    checkpoint = open_checkpoint(write(mixed))
    assert_same_values(checkpoint, mixed)
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(load_unet(checkpoint, torch.float32).conv_out.weight, mixed[name].float())


@pytest.mark.parametrize("ids", [None, torch.arange(77).half().reshape(1, 77), torch.arange(77)])
def test_position_ids_may_be_absent_or_of_any_kind(tensors: dict[str, Tensor], write: Callable[..., str], ids: Tensor | None) -> None:
    others = {name: tensor for name, tensor in tensors.items() if name != POSITION_IDS}
    checkpoint = open_checkpoint(write(others if ids is None else {**others, POSITION_IDS: ids}))
    first, _ = load_text_encoders(checkpoint, torch.float32)
    assert first.embeddings.position_ids.tolist() == [list(range(77))]


def test_tensors_at_odd_addresses_are_read(tiny_path: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    content = tiny_path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    checkpoint = open_checkpoint(str(odd))
    assert_same_values(checkpoint, tensors)
    assert torch.equal(load_unet(checkpoint, torch.float32).conv_out.weight, tensors["model.diffusion_model.out.2.weight"])


def test_linear_vae_attention_is_accepted(tensors: dict[str, Tensor], write: Callable[..., str]) -> None:
    flat = {n: t.flatten(1) if ".attn_1." in n and t.ndim == 4 else t for n, t in tensors.items()}
    assert flat[ATTENTION].ndim == 2
    assert_same_values(open_checkpoint(write(flat)), tensors)


def test_unknown_tensors_outside_the_networks_are_kept(tensors: dict[str, Tensor], write: Callable[..., str]) -> None:
    checkpoint = open_checkpoint(write({**tensors, "denoiser.sigmas": torch.arange(3.0)}))
    assert checkpoint.read("denoiser.sigmas").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("markers", "metadata", "expected"),
    [
        ([], {}, (None, None)),
        (["v_pred"], {}, ("v_prediction", None)),
        (["v_pred", "ztsnr"], {}, ("v_prediction", True)),
        ([], {"prediction_type": "v_prediction", "zero_terminal_snr": "true"}, ("v_prediction", True)),
        ([], {"modelspec.prediction_type": "v"}, ("v_prediction", None)),
        ([], {"prediction_type": "epsilon", "zero_terminal_snr": "false"}, ("epsilon", False)),
    ],
)
def test_marks_of_tensors_and_metadata_are_found(
    tensors: dict[str, Tensor], write: Callable[..., str], markers: list[str], metadata: dict[str, str], expected: tuple
) -> None:
    checkpoint = open_checkpoint(write({**tensors, **{name: torch.zeros(0) for name in markers}}, **metadata))
    assert (checkpoint.prediction_type, checkpoint.zero_terminal_snr) == expected


def test_training_in_place_does_not_reach_the_file(tiny_path: Path) -> None:
    before = tiny_path.read_bytes()
    checkpoint = open_checkpoint(str(tiny_path))
    unet = load_unet(checkpoint, torch.float32)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
        checkpoint.read(TE2 + "ln_final.bias").zero_()
    assert tiny_path.read_bytes() == before
    assert load_unet(checkpoint, torch.float32).conv_out.weight.abs().sum() > 0


def test_networks_are_contiguous_and_of_the_dtype_asked_for(tiny: Checkpoint) -> None:
    for network in (load_unet(tiny, torch.bfloat16), load_vae(tiny, torch.bfloat16), *load_text_encoders(tiny, torch.bfloat16)):
        assert all(p.dtype == torch.bfloat16 and p.is_contiguous() and p.requires_grad for p in network.parameters())


# diffusers directories


def test_a_diffusers_directory_is_the_same_model(diffusers_dir: Path, tiny: Checkpoint, tensors: dict[str, Tensor]) -> None:
    assert list((diffusers_dir / "unet").glob("*-of-*"))  # in shards
    checkpoint = open_checkpoint(str(diffusers_dir))
    assert checkpoint.architecture == tiny.architecture
    assert_same_values(checkpoint, tensors, but=(POSITION_IDS, TE2 + "logit_scale"))


def test_a_diffusers_directory_names_what_is_missing(diffusers_dir: Path, tmp_path: Path) -> None:
    for part in ("unet", "text_encoder", "text_encoder_2"):
        (tmp_path / part).symlink_to(diffusers_dir / part)
    with pytest.raises(CheckpointError, match="no folder vae"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text((diffusers_dir / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="pickled weights"):
        open_checkpoint(str(tmp_path))
    vae = load_file(diffusers_dir / "vae" / "diffusion_pytorch_model.safetensors")
    del vae["decoder.conv_out.bias"]
    save_file(vae, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.conv_out\.bias"):
        open_checkpoint(str(tmp_path))


def test_the_scheduler_of_a_diffusers_directory_is_a_mark(diffusers_dir: Path, tmp_path: Path) -> None:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (tmp_path / part).symlink_to(diffusers_dir / part)
    (tmp_path / "scheduler").mkdir()
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(tmp_path))
    assert (checkpoint.prediction_type, checkpoint.zero_terminal_snr) == ("v_prediction", True)


# vae


@pytest.fixture(scope="module")
def other_vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A different VAE, with single-file names."""
    return {name: tensor * 0.5 for name, tensor in tensors.items() if name.startswith("first_stage_model.")}


@pytest.mark.parametrize("form", ["ldm", "full", "diffusers names", "old diffusers names", "directory", "vae folder"])
def test_every_form_of_vae_replaces_the_own_one(
    form: str, tiny_path: Path, tensors: dict[str, Tensor], other_vae: dict[str, Tensor], write: Callable[..., str], tmp_path: Path
) -> None:
    full = write({**tensors, **other_vae}, "full.safetensors")
    vae = load_vae(open_checkpoint(full), torch.float32)
    state = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    path = tmp_path / "other.safetensors"
    if form == "ldm":
        save_file({n.removeprefix("first_stage_model."): t for n, t in other_vae.items()} | {"loss.logvar": torch.zeros(1)}, path)
    elif form == "full":
        path = Path(full)
    elif form == "diffusers names":
        save_file(state, path)
    elif form == "old diffusers names":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor for name, tensor in state.items()}
        save_file(state, path)
    else:
        path = tmp_path / "dir"
        vae.save_pretrained(path / "vae" if form == "vae folder" else path)
    checkpoint = open_checkpoint(str(tiny_path), vae=str(path))
    assert_same_values(checkpoint, {**tensors, **other_vae})
    assert vae_encoder_digest(checkpoint) == vae_encoder_digest(open_checkpoint(full))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_digest_is_that_of_the_values_in_float32(tensors: dict[str, Tensor], write: Callable[..., str], dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    widened = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    assert vae_encoder_digest(open_checkpoint(write(stored))) == vae_encoder_digest(open_checkpoint(write(widened)))


def test_the_digest_tells_encoders_apart_and_ignores_the_decoder(
    tiny: Checkpoint, tensors: dict[str, Tensor], write: Callable[..., str]
) -> None:
    own = vae_encoder_digest(tiny)
    decoder, encoder = "first_stage_model.decoder.conv_in.bias", "first_stage_model.quant_conv.bias"
    assert vae_encoder_digest(open_checkpoint(write({**tensors, decoder: tensors[decoder] + 1}))) == own
    assert vae_encoder_digest(open_checkpoint(write({**tensors, encoder: tensors[encoder] + 1}))) != own


def test_a_vae_of_another_shape_or_latent_space_is_refused(
    tiny: Checkpoint, tiny_path: Path, other_vae: dict[str, Tensor], write: Callable[..., str], tmp_path: Path
) -> None:
    missing = {n: t for n, t in other_vae.items() if not n.endswith("quant_conv.bias")}
    with pytest.raises(CheckpointError, match="2 missing: first_stage_model"):
        open_checkpoint(str(tiny_path), vae=write(missing, "vae.safetensors"))
    with pytest.raises(CheckpointError, match="no VAE in it"):
        open_checkpoint(str(tiny_path), vae=write({"x": torch.zeros(1)}, "x.safetensors"))
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(str(tiny_path), vae=str(tmp_path / "absent"))
    load_vae(tiny, torch.float32).save_pretrained(tmp_path / "sd1")
    config = json.loads((tmp_path / "sd1" / "config.json").read_text())
    (tmp_path / "sd1" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.18215}))
    with pytest.raises(CheckpointError, match=r"scaling_factor 0\.18215"):
        open_checkpoint(str(tiny_path), vae=str(tmp_path / "sd1"))
