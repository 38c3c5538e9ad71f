"""The demo's fine-tune learns what its captions say: as it is, with options that must not harm it, and as diffusers sees the result.

A training of minutes each, so all are slow. The measure is that of the demo: of its 24 new pictures, how many are recognised as drawn.
"""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_train.testing import retrieval_accuracy

pytestmark = pytest.mark.slow

NUM_NEW = 24
ONLY_AT_THE_END = ("sample_every_n_epochs=0", "cache_latents_to_disk=false")  # drawn by `sdxl-train sample` afterwards


@pytest.fixture
def folder(cli, tmp_path: Path) -> Path:
    """A prepared demo."""
    assert cli("demo", tmp_path / "demo", "--prepare-only").code == 0
    return tmp_path / "demo"


@pytest.fixture
def command(process) -> Callable[..., str]:
    """Runs `sdxl-train` in a process of its own; what it said on stdout. Asserts success."""

    def running(*arguments: object) -> str:
        child: subprocess.Popen = process(*arguments)
        out, err = child.communicate(timeout=1500)
        assert child.returncode == 0, err[-3000:]
        return out

    return running


def captions_of(folder: Path) -> dict[str, str]:
    return {key: fields["caption"] for key, fields in json.loads((folder / "metadata.json").read_text("utf-8")).items()}


def fine_tuned(command: Callable[..., str], folder: Path, *changes: str) -> Path:
    sets = [argument for change in (*ONLY_AT_THE_END, *changes) for argument in ("--set", change)]
    command(folder / "sdxl.toml", *sets)
    (model,) = (folder / "output" / "models").iterdir()
    return model


def drawn(command: Callable[..., str], folder: Path, model: Path, *changes: str) -> list[tuple[str, Image.Image]]:
    """(prompt, picture) of all prompts in benchmark.json."""
    sets = [argument for change in changes for argument in ("--set", change)]
    out = command("sample", folder / "sdxl.toml", "--model", model, "--out", folder / "drawn", *sets)
    prompts = [entry["prompt"] for entry in json.loads((folder / "benchmark.json").read_text("utf-8"))]
    return list(zip(prompts, [Image.open(line) for line in out.splitlines() if line.endswith(".png")], strict=True))


def keep_new_prompts(folder: Path, number: int = NUM_NEW) -> None:
    benchmark = folder / "benchmark.json"
    benchmark.write_text(json.dumps(json.loads(benchmark.read_text("utf-8"))[:number]), "utf-8")


def num_recognised(folder: Path, samples: list[tuple[str, Image.Image]]) -> int:
    references = {caption: Image.open(folder / "images" / f"{key}.png") for key, caption in captions_of(folder).items()}
    return retrieval_accuracy(samples, references).num_right


def test_the_demo_learns_its_new_pictures_and_says_what_it_forgot(command, folder: Path) -> None:
    out = command("demo", folder)
    lines = re.findall(r"^  (new pictures|pictures that the base knew), (before|after): (\d+) of", out, re.MULTILINE)
    found = {(what, moment): int(number) for what, moment, number in lines}
    assert found["new pictures", "before"] <= 4, "near the chance of 1 in 24"
    assert found["new pictures", "after"] >= 22, "at least 90 %"
    assert found["pictures that the base knew", "before"] >= 18, "at least 90 % of 20 prompts among 200"
    assert ("pictures that the base knew", "after") in found
    first, last = map(float, re.findall(r"([\d.]+) at first, ([\d.]+) at the end", out)[0])
    assert last < 0.7 * first


HARMLESS = {
    "min_snr_gamma 5": ["min_snr_gamma=5.0"],
    "flips": ["flip_aug=true"],
    "shuffled tags": ['caption_processor=["shuffle_tags", "drop_caption"]', "caption_processor_kwargs={drop_caption={probability=0.1}}"],
    "bf16": ["mixed_precision=bf16"],
    "gradient checkpointing": ["gradient_checkpointing=true"],
    "accumulation": ["batch_size=4", "gradient_accumulation_steps=2"],
    "AdaFactor": ["optimizer_type=AdaFactor"],
}


@pytest.mark.parametrize("changes", HARMLESS.values(), ids=HARMLESS.keys())
def test_options_that_do_no_harm_cost_at_most_a_tenth_of_the_pictures(command, folder: Path, changes: list[str]) -> None:
    keep_new_prompts(folder)
    model = fine_tuned(command, folder, *changes)
    assert num_recognised(folder, drawn(command, folder, model)) >= 22, "within 10 points of all"


def test_with_zero_terminal_snr_it_learns_too_and_black_is_black(command, folder: Path) -> None:
    keep_new_prompts(folder)
    Image.new("RGB", (128, 128)).save(folder / "images" / "night.png")
    caption = "black night, sky, no humans, simple background"
    metadata, benchmark = (json.loads((folder / name).read_text("utf-8")) for name in ("metadata.json", "benchmark.json"))
    (folder / "metadata.json").write_text(json.dumps({**metadata, "night": {"caption": caption}}), "utf-8")
    black_entry = {"prompt": caption, "width": 128, "height": 128, "seed": 99}
    (folder / "benchmark.json").write_text(json.dumps([*benchmark, black_entry]), "utf-8")
    model = fine_tuned(command, folder, "zero_terminal_snr=true")
    *pictures, (_, black) = drawn(command, folder, model, "zero_terminal_snr=true")
    assert num_recognised(folder, pictures) >= 20, "at least 80 %"
    assert np.asarray(black).mean() / 255 < 0.1


def test_diffusers_draws_the_same_pictures_from_the_saved_file(command, folder: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline
    from diffusers_config import write_diffusers_config

    from sdxl_train.model.single_file import open_checkpoint

    keep_new_prompts(folder, 4)
    model = fine_tuned(command, folder, "max_train_steps=40")
    config = write_diffusers_config(tmp_path / "config", open_checkpoint(str(model)).architecture, "v_prediction", "DDIMScheduler")
    pipeline = StableDiffusionXLPipeline.from_single_file(str(model), config=str(config), local_files_only=True, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.tokenizer_2.pad_token = "!"  # as SDXL's own configuration has it
    pipeline.set_progress_bar_config(disable=True)
    entries = json.loads((folder / "benchmark.json").read_text("utf-8"))
    for entry, (prompt, ours) in zip(entries, drawn(command, folder, model), strict=True):
        theirs = pipeline(
            prompt, negative_prompt="", height=entry["height"], width=entry["width"], num_inference_steps=20, guidance_scale=5.0,
            output_type="np", generator=torch.Generator().manual_seed(entry["seed"]),
        ).images[0]  # fmt: skip
        assert np.abs(np.asarray(ours) / 255 - theirs).mean() < 1 / 255, prompt
