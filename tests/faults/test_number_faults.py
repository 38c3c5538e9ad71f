"""Numbers and memory that fail: NaN from the VAE or the loss, memory that does not suffice, and what a long run may grow by."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import contents, run_command, write_config
from forked_runs import ForkedRun
from train_states import by_step

from sdxl_train.errors import SdxlTrainError
from sdxl_train.out_of_memory import is_out_of_memory
from sdxl_train.state_directory import state_faults


@pytest.fixture
def nan_for_white(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A VAE that gives NaN for the one picture that is all white."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from PIL import Image

    Image.new("RGB", (64, 64), "white").save(pictures / "square3.png")
    real = AutoencoderKL.encode

    def encode(self: Any, x: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        answer = real(self, x, *arguments, **named)
        answer.latent_dist.mean[x.amin(dim=(1, 2, 3)) > 0.99] = float("nan")
        return answer

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    return pictures


def test_a_picture_that_becomes_nan_while_caching_exits_2_by_name_without_a_cache(tiny_base: Path, nan_for_white: Path, tmp_path: Path) -> None:
    before = contents(nan_for_white)
    for command in ("cache", "train"):
        ended = run_command(command, write_config(tmp_path / command, tiny_base, [nan_for_white], vae_batch_size=2))
        assert ended.code == 2 and "Traceback" not in ended.err, ended.err[-3000:]
        (line,) = [line for line in ended.err.splitlines() if "square3.png" in line]
        assert "no_half_vae" in ended.err and "vae" in ended.err and "square2.png" not in line
        assert not (nan_for_white / "square3.npz").exists()
    after = contents(nan_for_white)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_picture_that_becomes_nan_in_a_step_exits_1_by_name_and_saves_the_step_before(
    tiny_base: Path, nan_for_white: Path, tmp_path: Path, accumulation: int
) -> None:
    keys = {"cache_latents": False, "batch_size": 1, "gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    ended = run_command("train", write_config(tmp_path, tiny_base, [nan_for_white], **keys))
    assert ended.code == 1, ended.err[-3000:]
    line = ended.err.splitlines()[-1]
    assert "square3.png" in line and "no_half_vae" in line and not re.search(r"(square[^3]|wide\d)\.png", line), line
    (step,) = re.findall(r"failed after step (\d+):", line)
    (state,) = by_step(tmp_path / "out/train_state")
    assert state.name.endswith(f"step{step}") and state_faults(state) == []


# ---- Memory ----

NO_MEMORY = """
import torch
from sdxl_train import hookimpl

class WideFails:
    @hookimpl
    def shape_noise(self, noise):
        if noise.shape[-2:] == (4, 12): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nMore lines")
        return noise
"""


@pytest.mark.parametrize("where", ["in the network", "in a plugin"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_memory_that_suffices_for_all_buckets_but_one_exits_1_naming_it(
    tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, accumulation: int
) -> None:
    import sdxl_train.loop as loop

    (tmp_path / "fails.py").write_text(NO_MEMORY)
    keys: dict[str, Any] = {"batch_size": 2, "seed": 0, "gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    if where == "in a plugin":
        keys["plugins"] = []
        keys["noise_strategies"] = [f"{tmp_path}/fails.py:WideFails"]
    else:
        real = loop.predict

        def predict(unet: Any, noisy_latents: torch.Tensor, *arguments: Any) -> torch.Tensor:
            if noisy_latents.shape[-2:] == (4, 12):  # of the bucket 96x32
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
            return real(unet, noisy_latents, *arguments)

        monkeypatch.setattr(loop, "predict", predict)
    ended = run_command("train", write_config(tmp_path, tiny_base, [pictures], **keys))
    assert ended.code == 1, ended.err[-3000:]
    line = ended.err.splitlines()[-1]
    for said in ("out of memory in the bucket 96x32 with batch_size 2", "smaller batch_size", "gradient_checkpointing", "Tried to allocate 2.00 GiB"):
        assert said in line, line
    (step,) = re.findall(r"failed after step ([1-9]\d*):", line)
    (state,) = by_step(tmp_path / "out/train_state")
    assert state.name.endswith(f"step{step}") and state_faults(state) == []


def test_what_says_that_memory_is_out_is_known_and_nothing_else() -> None:
    raised = [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
    wrapped = SdxlTrainError("a plugin raised")
    wrapped.__cause__ = raised[0]
    assert all(map(is_out_of_memory, [*raised, wrapped]))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not any(map(is_out_of_memory, [RuntimeError("shapes differ"), ValueError("out of range"), None]))


# ---- Weeks ----

NOTES = """
import gc, json, os, threading
from pathlib import Path
from sdxl_train import hookimpl

class Notes:
    @hookimpl(trylast=True)
    def on_step_end(self, run):
        if run.step % 50: return
        gc.collect()
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
        states = [path.name for path in run.output_dir.glob("train_state/*")]
        note = {"step": run.step, "kib": int(line.split()[1]), "files": len(os.listdir("/proc/self/fd")), "states": len(states),
                "threads": sorted(thread.name for thread in threading.enumerate() if thread.name != "save"), "native": len(os.listdir("/proc/self/task"))}
        with open(Path(__file__).with_name("notes.jsonl"), "a") as file:
            file.write(json.dumps(note) + "\\n")
"""


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@pytest.mark.slow
def test_5000_steps_with_saves_and_samples_grow_by_less_than_a_kibibyte_a_step(pictures: Path, tmp_path: Path) -> None:
    from sdxl_train.model.tiny import write_tiny_sdxl

    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell how much memory a process has")
    base = tmp_path / "base.safetensors"
    write_tiny_sdxl(base, unet_channels=(8, 8, 8), te_widths=(8, 8), te_layers=(1, 2), vae_channels=(8, 8, 8, 8))
    (tmp_path / "notes.py").write_text(NOTES)
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "x", "width": 64, "height": 64, "steps": 1, "scale": 1}]))
    keys = {"plugins": [f"{tmp_path}/notes.py:Notes"], "sample_benchmark": str(tmp_path / "bench.json"), "sample_every_n_steps": 500}
    # One block of the U-Net is trained: a step is made of the same parts, and takes a fraction of the time.
    keys |= {"save_every_n_steps": 100, "keep_train_states": 2, "keep_models": 2, "batch_size": 1, "num_train_epochs": 500, "block_lr": [0.0] * 22 + [1e-4], "trackers": ["tensorboard", "jsonl"]}
    with ForkedRun(tmp_path / "log", write_config(tmp_path / "run", base, [pictures], **keys)) as run:
        assert run.code(570) == 0, run.err[-3000:]
    notes = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert len(notes) == 100 and notes[-1]["step"] == 5000
    settled = notes[20:]
    half = len(settled) // 2
    slope = median([(later["kib"] - earlier["kib"]) / (later["step"] - earlier["step"]) for earlier, later in zip(settled[:half], settled[half:], strict=True)])
    assert slope < 1, f"{slope} KiB a step"
    assert max(note["states"] for note in notes) <= 3, "the two that are kept and one more"
    assert median([note["files"] for note in settled[half:]]) <= median([note["files"] for note in settled[:half]])
    assert all(note["threads"] == settled[0]["threads"] for note in settled)
    assert max(note["native"] for note in settled[half:]) <= max(note["native"] for note in settled[:half])
    assert len(list((tmp_path / "run/out/models").glob("*.safetensors"))) == 2
    assert len(list((tmp_path / "run/out/samples").glob("step_*"))) == 11
