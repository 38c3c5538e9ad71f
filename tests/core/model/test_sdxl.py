"""Size conditions, prediction, latents."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from sdxl_train.model.sdxl import LATENT_SCALE, decode_latents, encode_latents, make_add_time_ids, nonfinite_samples, predict
from sdxl_train.model.single_file import Checkpoint, load_unet, load_vae

ORACLES = json.loads((Path(__file__).parents[2] / "oracles.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def unet(tiny: Checkpoint) -> UNet2DConditionModel:
    return load_unet(tiny, torch.float32)


@pytest.fixture(scope="module")
def vae(tiny: Checkpoint) -> AutoencoderKL:
    return load_vae(tiny, torch.float32)


def cases(group: str) -> list[tuple[dict, dict]]:
    return list(zip(ORACLES[group]["inputs"], ORACLES[group]["expected"], strict=True))


@pytest.mark.parametrize(("given", "expected"), cases("size_embedding_scalar"))
def test_the_unet_embeds_a_size_as_the_oracle(unet: UNet2DConditionModel, given: dict, expected: dict) -> None:
    embedded = unet.add_time_proj(torch.tensor([given["value"]]))[0]
    assert embedded.dtype == torch.float32 and embedded.shape == (256,)
    assert embedded[given["indices"]].tolist() == pytest.approx(expected["elements"], abs=6e-5)
    assert embedded.norm().item() == pytest.approx(expected["l2_norm"], abs=1e-4)


@pytest.mark.parametrize(("given", "expected"), cases("size_embedding_vector"))
def test_the_six_numbers_are_embedded_in_the_order_of_the_oracle(unet: UNet2DConditionModel, given: dict, expected: dict) -> None:
    pairs = [torch.tensor([given[key]]) for key in ("original_hw", "crop_top_left", "target_hw")]
    vector = unet.add_time_proj(make_add_time_ids(*pairs).flatten()).flatten()
    assert len(vector) == expected["length"]
    assert vector[given["indices"]].tolist() == pytest.approx(expected["elements"], abs=6e-5)
    assert vector.sum().item() == pytest.approx(expected["sum"], abs=5e-3)


def inputs(samples: int = 2) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(samples, 4, 16, 8, generator=draw), torch.randn(samples, 77, 40, generator=draw)
    sizes = torch.tensor([[1023, 769]] * samples)
    return latents, torch.tensor([7, 993][:samples]), text, torch.randn(samples, 24, generator=draw), make_add_time_ids(sizes, sizes, sizes)


@torch.no_grad()
def test_the_prediction_depends_on_every_input_and_not_on_other_samples(unet: UNet2DConditionModel) -> None:
    given = inputs()
    prediction = predict(unet, *given)
    assert prediction.shape == (2, 4, 16, 8)
    assert torch.allclose(prediction[1:], predict(unet, *(tensor[1:] for tensor in given)), atol=1e-5)
    for number, tensor in enumerate(given):
        changed = [*given[:number], tensor + 1, *given[number + 1 :]]
        assert not torch.allclose(predict(unet, *changed), prediction, atol=1e-6), number


@torch.no_grad()
def test_sizes_are_not_rounded_where_weights_are_half_precision(tiny: Checkpoint) -> None:
    unet = load_unet(tiny, torch.bfloat16)
    embedded: list[torch.Tensor] = []
    unet.add_time_proj.register_forward_hook(lambda module, args, output: embedded.append(output))
    predict(unet, *inputs())
    assert embedded[0].dtype == torch.float32
    assert embedded[0][0, 0].item() == pytest.approx(torch.tensor(1023.0).cos().item(), abs=6e-5)  # bf16 would make it cos 1024


def test_latents_are_mean_and_noise_of_the_posterior(vae: AutoencoderKL) -> None:
    draw = torch.Generator().manual_seed(0)
    pixels, noise = torch.rand(2, 3, 32, 48, generator=draw) * 2 - 1, torch.randn(2, 4, 4, 6, generator=draw)
    with torch.no_grad():
        mean, logvar = vae.encode(pixels).latent_dist.parameters.chunk(2, dim=1)
    expected = mean + (logvar.clamp(-30, 20) / 2).exp() * noise
    assert torch.allclose(encode_latents(vae, pixels, noise, scaled=False), expected, atol=1e-5)
    assert torch.allclose(encode_latents(vae, pixels, noise), expected * 0.13025, atol=1e-5)
    assert torch.allclose(encode_latents(vae, pixels, None, scaled=False), mean, atol=1e-6)


def test_decoding_undoes_the_scale(vae: AutoencoderKL) -> None:
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample
    assert torch.equal(decode_latents(vae, latents, scaled=False), expected)
    assert torch.allclose(decode_latents(vae, latents * LATENT_SCALE), expected, atol=1e-4)
    assert expected.shape == (1, 3, 32, 48)


def test_latents_of_a_half_precision_vae_are_float32(tiny: Checkpoint) -> None:
    half = load_vae(tiny, torch.bfloat16)
    latents = encode_latents(half, torch.zeros(1, 3, 32, 32), None)
    assert latents.dtype == decode_latents(half, latents).dtype == torch.float32


def test_samples_that_are_not_finite_are_reported_and_not_repaired(tiny: Checkpoint) -> None:
    vae = load_vae(tiny, torch.float32)
    pixels = torch.zeros(3, 3, 16, 16)
    pixels[1, 0, 0, 0] = float("nan")
    latents = encode_latents(vae, pixels, None)
    assert nonfinite_samples(latents) == [1] and latents[1].isnan().any()
    latents[2, 0, 0, 0] = float("inf")
    assert nonfinite_samples(latents) == [1, 2]
