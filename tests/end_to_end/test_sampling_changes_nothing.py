"""Rendering during a training: whatever happens to it, the training is bit for bit the one without it, and a signal ends both."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SAMPLERS = """
import os, random, time
import numpy
import torch
from diffusers import EulerDiscreteScheduler

class Nan(EulerDiscreteScheduler):
    def step(self, *arguments, **named):
        answer = super().step(*arguments, **named)
        answer.prev_sample.fill_(float("nan"))
        return answer

def raises(error):
    class Raises(EulerDiscreteScheduler):
        def step(self, *arguments, **named):
            torch.rand(3), random.random(), numpy.random.rand()
            raise error
    return Raises

class Careless(EulerDiscreteScheduler):
    def step(self, *arguments, **named):
        torch.manual_seed(1), random.seed(1), numpy.random.seed(1), torch.set_grad_enabled(True)
        return super().step(*arguments, **named)

class Slow(EulerDiscreteScheduler):
    def step(self, *arguments, **named):
        time.sleep(0.2)
        with open(os.environ["MARK"], "a") as file:
            file.write("x")
        return super().step(*arguments, **named)

def broken(noise_scheduler): return raises(KeyError("no picture today"))()
def full(noise_scheduler): return raises(torch.OutOfMemoryError("CUDA out of memory"))()
def no_memory(noise_scheduler): return raises(MemoryError())()
def nan(noise_scheduler): return Nan()
def careless(noise_scheduler): return Careless()
def slow(noise_scheduler): return Slow()
"""


@pytest.fixture
def sampled(config, tmp_path: Path):
    """Writes a configuration that renders before the first step and after every second step and every epoch, with a sampler of `SAMPLERS`."""
    (tmp_path / "samplers.py").write_text(SAMPLERS)

    def writing(sampler: str | None, entries: object = None, **keys) -> Path:
        (tmp_path / "bench.json").write_text(json.dumps(entries or [{"prompt": "x", "steps": 2}, {"prompt": "y", "steps": 1, "scale": 1, "seed": None}]))
        chosen = {"sample_sampler": f"{tmp_path}/samplers.py:{sampler}"} if sampler else {}
        triggers = {"sample_every_n_steps": 2, "sample_every_n_epochs": 1, "sample_benchmark": str(tmp_path / "bench.json")}
        return config("sampled.toml", "[sample_params]\nwidth = 64\nheight = 64\n", **{**triggers, **chosen, **keys})

    return writing


def result(folder: Path, metrics) -> tuple[list, dict[str, torch.Tensor]]:
    """Every logged number but the time, and the tensors of the last model."""
    (model,) = (folder / "models").iterdir()
    return [{name: value for name, value in line.items() if name != "time" and not name.startswith("speed/")} for line in metrics(folder)], load_file(model)


def assert_equal(one: tuple, other: tuple) -> None:
    assert one[0] == other[0] and len(one[0]) > 0
    assert one[1].keys() == other[1].keys() and all(torch.equal(value, other[1][name]) for name, value in one[1].items())


TRAINED_TEXT = {"train_text_encoder": True, "gradient_checkpointing": True, "clip_skip": 2}


@pytest.mark.parametrize(
    "keys",
    [
        {"mixed_precision": "bf16", **TRAINED_TEXT},
        {"mixed_precision": "bf16", "full_bf16": True, "train_text_encoder": True, "learning_rate_te1": 0.0},
        {"cache_latents": False, "noise_offset": 0.1, "gradient_accumulation_steps": 2},
    ],
    ids=["bf16 with text encoders", "full_bf16 with one", "float32 with encoding in every step"],
)
def test_losses_and_weights_are_those_of_a_training_without_samples(cli, config, sampled, metrics, tmp_path: Path, keys: dict) -> None:
    for name, file in (("without", config("without.toml", output_dir=str(tmp_path / "without"), **keys)), ("with", sampled(None, output_dir=str(tmp_path / "with"), **keys))):
        ended = cli(file)
        assert ended.code == 0, (name, ended.err)
    assert len(list((tmp_path / "with/samples").glob("*_*/*.png"))) >= 6
    assert_equal(result(tmp_path / "with", metrics), result(tmp_path / "without", metrics))


@pytest.mark.parametrize(
    ("sampler", "said"),
    [("broken", "no picture today"), ("full", "CUDA out of memory"), ("no_memory", "MemoryError"), ("nan", "latents are not finite"), ("careless", "sampled 2 pictures")],
)
def test_a_renderer_that_fails_is_logged_and_changes_nothing(cli, config, sampled, metrics, tmp_path: Path, sampler: str, said: str) -> None:
    keys = {"max_train_steps": 4, "train_text_encoder": True, "mixed_precision": "bf16"}
    assert cli(config("without.toml", output_dir=str(tmp_path / "without"), **keys)).code == 0
    ended = cli(sampled(sampler, output_dir=str(tmp_path / "with"), **keys))
    assert ended.code == 0 and said in ended.err, ended.err
    assert ("Traceback" in ended.err) == (sampler in ("broken", "full", "no_memory"))
    assert bool(list((tmp_path / "with/samples").rglob("*.png"))) == (sampler == "careless")
    assert_equal(result(tmp_path / "with", metrics), result(tmp_path / "without", metrics))


@pytest.mark.parametrize("in_the_way", ["sheets", "step_2"])
def test_a_folder_that_cannot_be_made_is_logged_and_ends_nothing(cli, sampled, tmp_path: Path, in_the_way: str) -> None:
    (tmp_path / "out/samples").mkdir(parents=True)
    (tmp_path / "out/samples" / in_the_way).touch()
    ended = cli(sampled(None, max_train_steps=2))
    assert ended.code == 0 and "Traceback" in ended.err, ended.err
    assert ("contact sheets" in ended.err) == (in_the_way == "sheets")
    assert len(list((tmp_path / "out/samples/step_0").iterdir())) == 2
    assert len(list((tmp_path / "out/models").iterdir())) == 1


@pytest.mark.parametrize(
    ("denoising_steps", "mark", "num_steps", "models"),
    [
        pytest.param(900, 1, 6, [], marks=pytest.mark.slow),
        (3, 4, 6, ["model_ep1_step2.safetensors"]),
        pytest.param(3, 4, 2, ["model_ep1_step2.safetensors"], marks=pytest.mark.slow),
    ],
    ids=["before the first step", "between steps", "after the last step"],
)
def test_a_signal_while_rendering_ends_the_run_with_its_code_and_what_was_trained(
    process, sampled, tmp_path: Path, denoising_steps: int, mark: int, num_steps: int, models: list[str]
) -> None:
    marks = tmp_path / "marks"  # of denoising steps; the round before the first step makes 3, so the 4th is of the one after step 2
    file = sampled("slow", [{"prompt": "x", "steps": denoising_steps}], max_train_steps=num_steps, sample_every_n_epochs=0)
    child = process(file, MARK=str(marks))
    end = time.monotonic() + 120
    while not marks.exists() or len(marks.read_text()) < mark:
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 143, err
    assert sorted(path.name for path in (tmp_path / "out/models").iterdir()) == models
    assert "Traceback" not in err and len(marks.read_text()) <= mark + 1
