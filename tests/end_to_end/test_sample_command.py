"""`sdxl-train sample`: what it renders, where to, what it refuses, and how it ends."""

import json
import os
import signal
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_train.sample_command import evaluation_dir

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers with numpy 2
SMALL = "[sample_params]\nwidth = 64\nheight = 64\nsteps = 2\n"
BENCHMARK = [{"prompt": "一只猫", "negative_prompt": "blurry", "seed": 3}, {"prompt": "dog", "batch_size": 2, "batch_count": 2, "scale": 1.0}]
NAMES = ["ddim", "ddpm", "pndm", "lms", "euler", "euler_a", "dpmsolver", "dpmsolver++", "dpmsingle", "heun", "dpm_2", "dpm_2_a"]
NO_DATA = {"image_dirs": None, "metadata_files": ["gone.json"]}


@pytest.fixture
def sample_config(config, tmp_path: Path):
    """Writes a configuration with a benchmark."""

    def writing(name: str = "sdxl.toml", entries: object = BENCHMARK, **keys) -> Path:
        (tmp_path / "bench.json").write_text(json.dumps(entries), "utf-8")
        return config(name, SMALL, **{"sample_benchmark": str(tmp_path / "bench.json"), **keys})

    return writing


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def parameters(path: Path) -> str:
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 1
        return image.text["parameters"]  # type: ignore[attr-defined]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- What it renders ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [{}, {"prediction_type": "v_prediction", "zero_terminal_snr": True, "sample_sampler": "ddim"}, {"clip_skip": 2, "max_token_length": 225, "sdpa": False}],
    ids=["plain", "zero SNR", "text and attention"],
)
def test_a_saved_model_gives_the_pictures_of_the_training_at_that_step(cli, sample_config, tmp_path: Path, keys: dict) -> None:
    shared = {"sample_every_n_steps": 2, "save_every_n_steps": 2, "max_train_steps": 2, "optimizer_type": "AdamW", "learning_rate": 0.05, **keys}
    ended = cli(sample_config(**shared))
    assert ended.code == 0, ended.err
    (model,) = (tmp_path / "out/models").iterdir()
    ended = cli("sample", sample_config("again.toml", **{**shared, **NO_DATA, "image_dirs": ["gone"]}), "--model", model, "--out", tmp_path / "eval")
    assert ended.code == 0, ended.err
    trained = {path.name.split("_", 3)[3]: path for path in (tmp_path / "out/samples/step_2").iterdir()}
    for now, then in (("0000-0", "00"), ("0001-0", "01"), ("0001-1", "01-1"), ("0001-2", "01-2"), ("0001-3", "01-3")):
        path = tmp_path / "eval" / f"{now}.png"
        assert np.array_equal(pixels(path), pixels(trained[f"{then}.png"]))
        assert parameters(path) + ", Epoch: 1, Step: 2" == parameters(trained[f"{then}.png"])
    untrained = next((tmp_path / "out/samples/step_0").glob("*_00.png"))
    assert not np.array_equal(pixels(tmp_path / "eval" / "0000-0.png"), pixels(untrained))


def test_without_options_the_base_model_of_the_file_goes_into_the_project_folder(cli, sample_config, tmp_path: Path) -> None:
    ended = cli("sample", sample_config(**NO_DATA))
    assert ended.code == 0, ended.err
    (folder,) = (tmp_path / "out" / "samples").iterdir()
    assert folder.name.startswith("eval_2") and len(folder.name) == len("eval_20240412205011")
    assert ended.out.splitlines() == [str(folder / f"{name}.png") for name in ("0000-0", "0001-0", "0001-1", "0001-2", "0001-3")]
    assert names(folder) == sorted(Path(line).name for line in ended.out.splitlines())
    assert parameters(folder / "0000-0.png") == (
        "一只猫\nNegative prompt: blurry\nSteps: 2, Sampler: euler_a, CFG scale: 7.5, Seed: 3, Size: 64x64, Original size: 64x64"
    )
    assert "5 pictures" in ended.err and "sampling 5/5" in ended.err and "\x1b" not in ended.err
    assert names(tmp_path / "out") == ["samples"], "no lock, no logs: nothing is claimed"


def test_every_sampler_renders(sample_config, tiny_base: Path, tmp_path: Path) -> None:
    import torch

    from sdxl_train.config import load_settings
    from sdxl_train.diffusion import NoiseSchedule
    from sdxl_train.model.single_file import load_text_encoders, load_unet, load_vae, open_checkpoint
    from sdxl_train.model.tokenizer import PromptTokenizer
    from sdxl_train.sample_round import render_evaluation_round
    from sdxl_train.sampling import SampleModels

    file, base = sample_config(entries=[{"prompt": "a cat", "steps": 4}], **NO_DATA), open_checkpoint(str(tiny_base))
    networks = load_unet(base, torch.float32), load_text_encoders(base, torch.float32), load_vae(base, torch.float32)
    models = SampleModels(*networks, PromptTokenizer(), torch.device("cpu"), max_token_length=75, clip_skip=1)
    for name in NAMES:
        settings = load_settings(file, [f"sample_sampler={name}"], needs=("samples",))
        build = lambda hooks=settings.plugins.hooks: hooks.build_sampler(noise_scheduler=NoiseSchedule())  # noqa: E731
        done = render_evaluation_round(settings.samples, tmp_path / name, models, build, settings.values["sample_sampler"])
        assert [path.name for path in done.paths] == ["0000-0.png"], name
        assert f"Sampler: {name}, " in parameters(done.paths[0]) and pixels(done.paths[0]).std() > 1


def test_text_vae_and_sampling_keys_change_the_picture(cli, sample_config, tmp_path: Path) -> None:
    from sdxl_train.model.tiny import write_tiny_sdxl

    write_tiny_sdxl(tmp_path / "other.safetensors", seed=5)
    file = sample_config(entries=[{"prompt": "red green blue " * 40, "steps": 3}], **NO_DATA)
    changes = (
        "seed=42", "clip_skip=2", "max_token_length=150", f"vae={tmp_path}/other.safetensors", "prediction_type=v_prediction",
        "mixed_precision=bf16", "sample_params.scale=1.0", "sample_params.seed=9", "sample_sampler=ddim",
    )  # fmt: skip
    seen = set()
    for number, change in enumerate(changes):
        ended = cli("sample", file, "--out", tmp_path / str(number), "--set", change)
        assert ended.code == 0, ended.err
        seen.add(pixels(tmp_path / str(number) / "0000-0.png").tobytes())
    assert len(seen) == len(changes)


def test_a_diffusers_directory_is_a_model_too(cli, sample_config, tiny_base: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from sdxl_train.model.single_file import load_text_encoders, load_unet, load_vae, open_checkpoint

    base = open_checkpoint(str(tiny_base))
    parts = load_vae(base, torch.float32), *load_text_encoders(base, torch.float32), None, None, load_unet(base, torch.float32)
    StableDiffusionXLPipeline(*parts, EulerDiscreteScheduler(), add_watermarker=False).save_pretrained(tmp_path / "directory")  # type: ignore[arg-type]
    file = sample_config(entries=BENCHMARK[:1], **NO_DATA)
    for name, model in (("file", tiny_base), ("folder", tmp_path / "directory")):
        ended = cli("sample", file, "--model", model, "--out", tmp_path / name)
        assert ended.code == 0, ended.err
    assert np.array_equal(pixels(tmp_path / "file" / "0000-0.png"), pixels(tmp_path / "folder" / "0000-0.png"))


def test_save_latents_and_a_random_seed_work_as_in_a_training(cli, sample_config, tmp_path: Path) -> None:
    entries = [{"prompt": "a cat", "save_latents": True}, {"prompt": "a dog", "seed": None}]
    ended = cli("sample", sample_config(entries=entries, **NO_DATA), "--out", tmp_path / "eval")
    assert ended.code == 0 and len(ended.out.splitlines()) == 2
    assert len(names(tmp_path / "eval")) == 4 and len([name for name in names(tmp_path / "eval") if "-t=" in name]) == 2


# ---- Where to -------------------------------------------------------------------------------------------------------------------------


def test_placeholders_stand_for_the_run_that_was_started_last(tmp_path: Path) -> None:
    pattern, now = str(tmp_path / "%date%" / "run-%index%"), datetime(2024, 4, 12, 20, 50, 11)
    assert evaluation_dir(pattern, now) == tmp_path / "2024-04-12/run-0/samples/eval_20240412205011", "none yet: as for a training"
    for number, index in enumerate((10, 9, 2)):
        logs = tmp_path / f"2024-03-0{number + 1}/run-{index}/logs"
        logs.mkdir(parents=True)
        os.utime(logs, (number, number))
    (tmp_path / "2024-03-09/run-x/logs").mkdir(parents=True)
    newest = tmp_path / "2024-03-03/run-2/samples"
    assert evaluation_dir(pattern, now) == newest / "eval_20240412205011"
    assert evaluation_dir(pattern, now) == newest / "eval_20240412205012", "a name that is taken counts on"
    assert names(newest) == ["eval_20240412205011", "eval_20240412205012"]


def test_an_output_folder_that_cannot_be_made_is_named(cli, sample_config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = sample_config(output_dir=str(tmp_path / "file" / "out"), **NO_DATA)
    for arguments, said in (((), "output_dir"), (("--out", tmp_path / "file"), "--out")):
        ended = cli("sample", file, *arguments)
        assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err


# ---- What it refuses ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sample_benchmark": None}, "sample_benchmark is needed"),
        ({"entries": []}, "lists nothing"),
        ({"entries": [{"prompt": 5}]}, "entry 0: prompt"),
        ({"prediction_type": "v_prediction", "zero_terminal_snr": True, "sample_sampler": "heun"}, "heun"),
        ({"sample_sampler": "eulr"}, 'did you mean "euler"?'),
        ({"pretrained_model_name_or_path": "gone.safetensors"}, "gone.safetensors"),
        ({"clip_skip": 12}, "clip_skip"),
    ],
    ids=["no benchmark", "empty", "entry", "zero SNR", "unknown sampler", "no model", "clip_skip"],
)
def test_what_cannot_be_rendered_is_refused_before_anything_is_made(cli, sample_config, tmp_path: Path, keys: dict, said: str) -> None:
    ended = cli("sample", sample_config(**keys))
    assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err and ended.out == ""
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_marked_as_v_prediction_is_not_sampled_as_epsilon_by_default(cli, sample_config, tmp_path: Path) -> None:
    assert cli(sample_config(prediction_type="v_prediction", max_train_steps=1)).code == 0
    (model,) = (tmp_path / "out/models").iterdir()
    ended = cli("sample", sample_config(**NO_DATA), "--model", model, "--out", tmp_path / "eval")
    assert ended.code == 2 and 'prediction_type = "v_prediction"' in ended.err and not (tmp_path / "eval").exists()
    for explicitly in ("v_prediction", "epsilon"):
        assert cli("sample", sample_config(**NO_DATA, prediction_type=explicitly), "--model", model).code == 0


def test_a_model_option_that_names_nothing_is_refused(cli, sample_config) -> None:
    ended = cli("sample", sample_config(), "--model", 'gone "model"')
    assert ended.code == 2 and 'gone "model" is missing' in ended.err


# ---- How it ends ----------------------------------------------------------------------------------------------------------------------

BROKEN = """
import time
import torch
from diffusers import EulerDiscreteScheduler

built = []

class Slow(EulerDiscreteScheduler):
    def step(self, *arguments, **named):
        time.sleep(0.2)
        return super().step(*arguments, **named)

class Full(EulerDiscreteScheduler):
    def step(self, *arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

def slow(noise_scheduler): return Slow()
def full(noise_scheduler): return Full()
def full_once(noise_scheduler):
    built.append(1)
    return Full() if len(built) == 2 else EulerDiscreteScheduler()
"""


@pytest.mark.parametrize(("sampler", "written"), [pytest.param("full", 0, marks=pytest.mark.slow), ("full_once", 4)])
def test_pictures_that_fail_are_counted_and_the_exit_code_is_1(process, sample_config, tmp_path: Path, sampler: str, written: int) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    child = process("sample", sample_config(sample_sampler=f"{tmp_path}/broken.py:{sampler}"))
    out, err = child.communicate(timeout=120)
    assert child.returncode == 1 and len(out.splitlines()) == written, err
    assert f"sampled {written} of 5 pictures" in err and f"{5 - written} pictures failed" in err
    assert "CUDA out of memory" in err and "Traceback" in err
    assert len(list((tmp_path / "out/samples").iterdir())) == (1 if written else 0), "an empty folder is taken away"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_signal_ends_it_within_a_denoising_step_and_finished_pictures_stay(process, sample_config, tmp_path: Path, signum: int, code: int) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    entries = [{"prompt": "a cat", "steps": 1}, {"prompt": "a dog", "steps": 900}]  # the second takes three minutes
    child = process("sample", sample_config(entries=entries, sample_sampler=f"{tmp_path}/broken.py:slow"))
    first = Path(child.stdout.readline().strip())
    child.send_signal(signum)
    sent = time.monotonic()
    out, err = child.communicate(timeout=60)
    assert child.returncode == code and time.monotonic() - sent < 30, err
    assert out == "" and first.name == "0000-0.png" and parameters(first).startswith("a cat")
    assert "sampled 1 of 2" in err and "Traceback" not in err
    assert names(first.parent) == ["0000-0.png"], "no half-written picture"
