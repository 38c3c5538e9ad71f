"""A saved file means the same to diffusers' single-file loader as to us."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from diffusers_config import write_diffusers_config
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_train.model.saving import file_metadata, save_checkpoint
from sdxl_train.model.single_file import Checkpoint, load_text_encoders, load_unet, load_vae

IDS = torch.tensor([[49406, 320, 2368, 49407] + [49407] * 73, [49406, 1125, 539, 320] + [2368] * 72 + [49407]])


@pytest.fixture(scope="module")
def saved(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after all three trained parts changed and were saved from memory."""
    unet = load_unet(tiny, torch.float32)
    first, second = load_text_encoders(tiny, torch.float32)
    with torch.no_grad():
        for network in (unet, first, second):
            for parameter in network.parameters():
                parameter.mul_(1.25)
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    trained = {"unet": unet.state_dict(), "text_encoder": first.state_dict(), "text_encoder_2": second.state_dict()}
    metadata = file_metadata(step=1, epoch=1, prediction_type="epsilon", zero_terminal_snr=False, title="m", resolution=256)
    save_checkpoint(path, tiny, trained, "keep", metadata)
    return path


@pytest.fixture(scope="module")
def config_dir(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_diffusers_config(tmp_path_factory.mktemp("configs"), tiny.architecture, "epsilon")


@pytest.fixture(scope="module")
def reloaded(saved: Path) -> Checkpoint:
    from sdxl_train.model.single_file import open_checkpoint

    return open_checkpoint(str(saved))


def run_unet(unet: torch.nn.Module, architecture_context: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return unet(
            torch.randn(2, 4, 16, 8, generator=draw),
            torch.tensor([3, 999]),
            encoder_hidden_states=torch.randn(2, 77, architecture_context, generator=draw),
            added_cond_kwargs={"text_embeds": torch.randn(2, 24, generator=draw), "time_ids": torch.arange(12).reshape(2, 6) * 97},
        ).sample


def test_the_unet_computes_the_same(saved: Path, config_dir: Path, reloaded: Checkpoint) -> None:
    theirs = UNet2DConditionModel.from_single_file(str(saved), config=str(config_dir), subfolder="unet", local_files_only=True)
    ours = load_unet(reloaded, torch.float32)
    assert torch.equal(run_unet(ours, 40), run_unet(theirs, 40))


def test_the_vae_computes_the_same(saved: Path, config_dir: Path, reloaded: Checkpoint) -> None:
    theirs = AutoencoderKL.from_single_file(str(saved), config=str(config_dir), subfolder="vae", local_files_only=True)
    ours = load_vae(reloaded, torch.float32)
    pixels = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoded = [vae.encode(pixels).latent_dist.parameters for vae in (ours, theirs)]
        decoded = [vae.decode(encoded[0][:, :4]).sample for vae in (ours, theirs)]
    assert torch.equal(*encoded) and torch.equal(*decoded)


@pytest.mark.parametrize(
    ("index", "cls", "folder"), [(0, CLIPTextModel, "text_encoder"), (1, CLIPTextModelWithProjection, "text_encoder_2")]
)
def test_the_text_encoders_compute_the_same(
    saved: Path, config_dir: Path, reloaded: Checkpoint, index: int, cls: type, folder: str
) -> None:
    theirs = create_diffusers_clip_model_from_ldm(cls, load_file(saved), subfolder=folder, config=str(config_dir), local_files_only=True)
    ours = load_text_encoders(reloaded, torch.float32)[index]
    with torch.no_grad():
        mine, other = (network(IDS, output_hidden_states=True) for network in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(mine.hidden_states, other.hidden_states, strict=True))
    if index == 1:
        assert torch.equal(mine.text_embeds, other.text_embeds)


def test_the_whole_pipeline_loads_and_draws(saved: Path, config_dir: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_single_file(str(saved), config=str(config_dir), local_files_only=True)
    picture = pipeline("a cat", height=64, width=64, num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(0))
    assert picture.images.shape == (1, 64, 64, 3)
