import dataclasses
import logging
import random
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sdxl_train.model.compiling import compile_regions
from sdxl_train.model.single_file import load_text_encoders, load_unet, load_vae, open_checkpoint
from sdxl_train.model.text import encode_prompts
from sdxl_train.model.tokenizer import PromptTokenizer
from sdxl_train.sample_benchmark import SampleEntry
from sdxl_train.sample_round import render_evaluation_round, render_training_round
from sdxl_train.sampling import SampleModels, render_batch

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers makes arrays of tensors

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**SCHEDULE)


def entry(**fields) -> SampleEntry:
    given = {
        "prompt": "a photo of a cat", "negative_prompt": "", "steps": 2, "batch_size": 1, "batch_count": 1, "scale": 3.0, "seed": 7,
        "width": 64, "height": 64, "original_width": None, "original_height": None, "original_scale_factor": 1.0, "save_latents": False,
    }  # fmt: skip
    return SampleEntry(**{**given, **fields})


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer()


@pytest.fixture
def models(tiny_base, tokenizer) -> SampleModels:
    base = open_checkpoint(str(tiny_base))
    encoders = load_text_encoders(base, torch.float32)
    unet, vae = load_unet(base, torch.float32), load_vae(base, torch.float32)
    return SampleModels(unet, encoders, vae, tokenizer, torch.device("cpu"), max_token_length=75, clip_skip=1)


def levels(picture) -> np.ndarray:
    assert picture.image is not None, picture.problem
    return np.asarray(picture.image).astype(int)


def calls_of(module: nn.Module) -> list[dict]:
    """Positional and named arguments of each call from now on."""
    seen: list[dict] = []
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.append({"args": args, **kwargs}), with_kwargs=True)
    return seen


def break_weights(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))


# ---- What is rendered -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DDPMScheduler, KDPM2AncestralDiscreteScheduler, PNDMScheduler]
)
def test_picture_b_of_a_batch_is_the_picture_of_seed_plus_b_rendered_alone(models, scheduler):
    arguments = {**SCHEDULE, "clip_sample": False} if scheduler is DDPMScheduler else SCHEDULE
    together = render_batch(entry(batch_size=3, steps=4), 0, models, scheduler(**arguments))
    assert [(picture.b, picture.seed) for picture in together] == [(0, 7), (1, 8), (2, 9)]
    for picture in together:
        (alone,) = render_batch(entry(seed=picture.seed, steps=4), 0, models, scheduler(**arguments))
        assert abs(levels(alone) - levels(picture)).max() <= 1
    assert abs(levels(together[0]) - levels(together[1])).max() > 10


def test_a_second_batch_goes_on_with_the_seeds(models):
    whole = entry(batch_size=2, batch_count=2)
    (third, _) = render_batch(whole, 2, models, euler())
    (alone,) = render_batch(entry(seed=9), 0, models, euler())
    assert (third.b, third.seed) == (2, 9) and abs(levels(third) - levels(alone)).max() <= 1


def test_a_picture_equals_that_of_the_diffusers_pipeline(models):
    given = entry(negative_prompt="blurry", steps=4, width=96, height=64, original_width=200, original_height=100)

    def encoded(text: str):
        te1, te2, _ = models.tokenizer.tokenize(text, 75)
        with torch.no_grad():
            return encode_prompts(torch.tensor([te1]), torch.tensor([te2]), *models.text_encoders, 1)

    pipeline = StableDiffusionXLPipeline(
        models.vae, *models.text_encoders, None, None, models.unet, EulerAncestralDiscreteScheduler(**SCHEDULE), add_watermarker=False
    )  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    (prompt, pooled), (negative, negative_pooled) = encoded(given.prompt), encoded("blurry")
    expected = pipeline(
        prompt_embeds=prompt, pooled_prompt_embeds=pooled, negative_prompt_embeds=negative, negative_pooled_prompt_embeds=negative_pooled,
        guidance_scale=3.0, num_inference_steps=4, width=96, height=64, original_size=(100, 200), target_size=(64, 96),
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    (picture,) = render_batch(given, 0, models, EulerAncestralDiscreteScheduler(**SCHEDULE))
    assert picture.image.size == (96, 64)
    assert abs(levels(picture) - np.asarray(expected).astype(int)).max() <= 1


class PooledMean(nn.Module):
    """A U-Net that predicts, for every pixel, the mean of the pooled embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, latents, timestep, encoder_hidden_states, added_cond_kwargs, return_dict):
        return (added_cond_kwargs["text_embeds"].mean(dim=1)[:, None, None, None].expand_as(latents),)


@pytest.mark.parametrize(("scale", "negative_share"), [(5.0, -4.0), (1.5, -0.5), (1.0, 0.0), (0.5, 0.0), (0.0, 0.0)])
def test_guidance_is_u_plus_scale_times_c_minus_u_and_off_at_scale_1_or_less(models, scale, negative_share):
    pooled = []
    for text in ("a photo of a cat", "a dog"):
        te1, te2, _ = models.tokenizer.tokenize(text, 75)
        with torch.no_grad():
            pooled.append(encode_prompts(torch.tensor([te1]), torch.tensor([te2]), *models.text_encoders, 1)[1].mean().item())
    stub = dataclasses.replace(models, unet=PooledMean())
    sampler = euler()
    predicted, step = [], sampler.step
    sampler.step = lambda model_pred, *args, generator=None, **kwargs: predicted.append(model_pred) or step(model_pred, *args, **kwargs)
    rows = calls_of(stub.unet)
    render_batch(entry(scale=scale, negative_prompt="a dog", batch_size=2), 0, stub, sampler)
    assert predicted[0].flatten().tolist() == pytest.approx([(1 - negative_share) * pooled[0] + negative_share * pooled[1]] * 512, rel=1e-4)
    assert {len(call["args"][0]) for call in rows} == {4 if scale > 1 else 2}
    assert predicted[0].dtype == torch.float32


@pytest.mark.parametrize(("max_token_length", "clip_skip", "positions"), [(75, 1, 77), (225, 2, 227)])
def test_the_unet_is_told_the_text_as_in_training_and_the_sizes(models, max_token_length, clip_skip, positions):
    models = dataclasses.replace(models, max_token_length=max_token_length, clip_skip=clip_skip)
    long = "red green blue " * 40
    calls = calls_of(models.unet)
    given = entry(prompt=long, negative_prompt="a dog", batch_size=2, width=96, original_scale_factor=1.5)
    render_batch(given, 0, models, euler())
    for rows, text in ((slice(0, 2), "a dog"), (slice(2, 4), long)):
        te1, te2, _ = models.tokenizer.tokenize(text, max_token_length)
        with torch.no_grad():
            prompt_embeds, pooled = encode_prompts(torch.tensor([te1]), torch.tensor([te2]), *models.text_encoders, clip_skip)
        told = calls[0]["encoder_hidden_states"][rows]
        assert told.shape[1] == positions
        torch.testing.assert_close(told, prompt_embeds.expand_as(told), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(calls[0]["added_cond_kwargs"]["text_embeds"][rows], pooled.expand(2, -1), rtol=1e-4, atol=1e-5)
    assert calls[0]["added_cond_kwargs"]["time_ids"].tolist() == [[96, 144, 0, 0, 64, 96]] * 4


@pytest.mark.parametrize("no_half_vae", [False, True])
def test_networks_compute_in_the_precision_of_training_and_the_vae_as_no_half_vae_says(models, no_half_vae):
    models = dataclasses.replace(models, dtype=torch.bfloat16, no_half_vae=no_half_vae)
    made: dict[str, torch.dtype] = {}
    models.unet.conv_in.register_forward_hook(lambda *call: made.update(unet=call[2].dtype))
    models.vae.decoder.conv_in.register_forward_hook(lambda *call: made.update(vae=call[2].dtype))
    (picture,) = render_batch(entry(), 0, models, euler())
    assert picture.image is not None
    assert made == {"unet": torch.bfloat16, "vae": torch.float32 if no_half_vae else torch.bfloat16}
    assert {parameter.dtype for network in models.networks for parameter in network.parameters()} == {torch.float32}


# ---- What it leaves behind ------------------------------------------------------------------------------------------------------------


class DrawsGlobally(EulerDiscreteScheduler):
    """A sampler of a careless plugin."""

    def step(self, *args, **kwargs):
        torch.rand(1), np.random.rand(), random.random()
        return super().step(*args, **kwargs)


class Fails(EulerDiscreteScheduler):
    def step(self, *args, **kwargs):
        torch.rand(1), np.random.rand(), random.random()
        raise RuntimeError("CUDA out of memory")


@pytest.mark.parametrize("scheduler", [DrawsGlobally, Fails])
def test_everything_the_training_relies_on_is_as_before_also_after_an_exception(models, scheduler):
    models.unet.train()
    models.unet.mid_block.eval()  # a mixture, as with a frozen part
    models.text_encoders[0].train()
    models.text_encoders[1].requires_grad_(False)
    models.vae.to(torch.bfloat16).requires_grad_(False)

    def state():
        modes = [module.training for network in models.networks for module in network.modules()]
        parameters = [(p.dtype, p.device, p.requires_grad, p.grad is None, id(p)) for n in models.networks for p in n.parameters()]
        values = [p.detach().clone() for network in models.networks for p in network.parameters()]
        draws = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])
        return modes, parameters, draws, torch.is_grad_enabled(), torch.get_default_dtype(), values

    *before, values_before = state()
    if scheduler is Fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            render_batch(entry(), 0, models, Fails(**SCHEDULE))
    else:
        assert render_batch(entry(), 0, models, DrawsGlobally(**SCHEDULE))[0].image is not None
    *after, values_after = state()
    assert after == before
    assert all(torch.equal(one, other) for one, other in zip(values_before, values_after, strict=True))


def test_networks_are_in_eval_mode_while_they_render(models):
    modes: list[bool] = []
    for network in models.networks:
        network.train()
    models.unet.register_forward_pre_hook(lambda module, _: modes.append(module.training or torch.is_grad_enabled()))
    models.text_encoders[0].register_forward_pre_hook(lambda module, _: modes.append(module.training or torch.is_grad_enabled()))
    render_batch(entry(), 0, models, euler())
    assert modes == [False] * 3


# ---- Rounds ---------------------------------------------------------------------------------------------------------------------------


def as_run(models: SampleModels, output_dir: Path, step: int, epoch: int) -> SimpleNamespace:
    config = {"max_token_length": 75, "clip_skip": 1, "no_half_vae": False, "sample_sampler": "euler"}
    return SimpleNamespace(
        unet=models.unet, text_encoders=models.text_encoders, vae=models.vae, device=models.device, dtype=models.dtype,
        config=config, output_dir=output_dir, step=step, epoch=epoch,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("moment", "folder", "place"), [("step", "step_30", "000030"), ("epoch", "epoch_2", "e000002"), ("train_end", "step_30", "000030")]
)
def test_a_training_round_writes_each_picture_under_its_name_with_its_text(models, tmp_path, moment, folder, place):
    entries = [entry(batch_size=2, batch_count=2), entry(prompt="猫", negative_prompt="bad", scale=1.0)]
    now = datetime(2024, 4, 12, 20, 50, 11)
    done = render_training_round(as_run(models, tmp_path, 30, 2), entries, models.tokenizer, euler, moment, now)  # type: ignore[arg-type]
    names = [f"sample_20240412205011_{place}_{rest}.png" for rest in ("00", "00-1", "00-2", "00-3", "01")]
    assert done.paths == [tmp_path / "samples" / folder / name for name in names] and (done.num_failed, done.was_stopped) == (0, False)
    assert sorted(path.name for path in done.paths[0].parent.iterdir()) == sorted(names)
    with Image.open(done.paths[3]) as image:
        assert image.text["parameters"].splitlines()[1] == (
            "Steps: 2, Sampler: euler, CFG scale: 3.0, Seed: 10, Size: 64x64, Original size: 64x64, Epoch: 2, Step: 30"
        )
    with Image.open(done.paths[4]) as image:
        assert image.text["parameters"].startswith("猫\nNegative prompt: bad\nSteps: 2")


def test_a_random_seed_is_new_each_time_and_stands_in_the_picture(models, tmp_path):
    seeds = []
    for name in ("one", "two"):
        done = render_evaluation_round([entry(seed=None)], tmp_path / name, models, euler, "euler")
        with Image.open(done.paths[0]) as image:
            assert done.paths[0].name == "0000-0.png" and "Step:" not in image.text["parameters"]
            seeds.append(int(image.text["parameters"].split("Seed: ")[1].split(",")[0]))
            (again,) = render_batch(entry(seed=seeds[-1]), 0, models, euler())
            assert np.array_equal(np.asarray(image), np.asarray(again.image))
    assert seeds[0] != seeds[1]


def test_save_latents_decodes_every_step_of_every_picture(models, tmp_path):
    sampler = euler()
    sampler.set_timesteps(3)
    done = render_evaluation_round([entry(), entry(steps=3, batch_size=2, save_latents=True)], tmp_path, models, euler, "euler")
    steps = [f"0001-{b}-t={round(float(t))}-i={i}.png" for i, t in enumerate(sampler.timesteps) for b in range(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["0000-0.png", "0001-0.png", "0001-1.png", *steps])
    assert [path.name for path in done.paths] == ["0000-0.png", "0001-0.png", "0001-1.png"]
    with Image.open(tmp_path / steps[-1]) as last, Image.open(tmp_path / "0001-1.png") as final, Image.open(tmp_path / steps[1]) as first:
        assert last.tobytes() == final.tobytes() != first.tobytes()
        assert last.text["parameters"] == final.text["parameters"]


def test_an_entry_that_fails_is_logged_with_its_traceback_and_the_others_are_rendered(models, tmp_path, caplog):
    samplers = iter([euler(), Fails(**SCHEDULE), euler()])
    entries = [entry(), entry(batch_count=3), entry()]
    with caplog.at_level(logging.WARNING, "sdxl_train"):
        done = render_evaluation_round(entries, tmp_path, models, lambda: next(samplers), "euler")
    assert [path.name for path in done.paths] == ["0000-0.png", "0002-0.png"] and done.num_failed == 3
    (record,) = caplog.records
    assert "entry 1 failed; 3 of its 3" in record.getMessage() and "CUDA out of memory" in caplog.text and "Traceback" in caplog.text


def test_a_picture_that_cannot_be_written_is_logged(models, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    done = render_evaluation_round([entry()], tmp_path / "file", models, euler, "euler")
    assert done.paths == [] and done.num_failed == 1 and "Traceback" in caplog.text


@pytest.mark.parametrize(("part", "said"), [("vae", "no_half_vae = true"), ("unet", "latents are not finite")])
def test_numbers_that_are_not_finite_give_no_picture_but_a_reason(models, tmp_path, caplog, part, said):
    break_weights(models.vae.decoder if part == "vae" else models.unet)
    done = render_evaluation_round([entry(batch_size=2)], tmp_path, models, euler, "euler")
    assert done.paths == [] and done.num_failed == 2 and list(tmp_path.iterdir()) == []
    assert len(caplog.records) == 2 and all(said in record.getMessage() for record in caplog.records)


def test_a_stop_request_ends_the_round_within_a_denoising_step(models, tmp_path):
    calls = calls_of(models.unet)
    done = render_evaluation_round([entry(), entry(steps=9), entry()], tmp_path, models, euler, "euler", check_stop=lambda: len(calls) >= 5)
    assert done.was_stopped and len(calls) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["0000-0.png"] == [path.name for path in done.paths]


def test_rendering_compiles_nothing_and_leaves_training_compiled(models) -> None:
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compile_regions(models.unet, counter)
    pictures = render_batch(entry(), 0, models, euler())
    assert counter.frame_count == 0 and pictures and pictures[0].image is not None
    text = torch.zeros(1, 77, models.unet.config.cross_attention_dim)
    times = {"text_embeds": torch.zeros(1, models.text_encoders[1].config.projection_dim), "time_ids": torch.zeros(1, 6)}
    models.unet(torch.zeros(1, 4, 8, 8), torch.tensor([5]), text, added_cond_kwargs=times)
    assert counter.frame_count > 0
    torch._dynamo.reset()
