"""The tool that trains the demo's base: its VAE's scale, its text projection, its configuration, and a whole small run."""

import importlib
import json
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_train import ConfigError
from sdxl_train.demo_pictures import benchmark_of, packaged_captions, prepare_pictures

TOOLS = Path(__file__).parents[1] / "tools"
SHIPPED = Path(str(resources.files("sdxl_train") / "demo_data"))


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the tool."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return lambda name: importlib.import_module(f"demo_base.{name}")


def test_the_vae_is_brought_to_unit_variance_at_the_scale_of_sdxl_and_decodes_as_before(part) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**part("untrained").base_architecture().to_diffusers_configs()["vae"]).eval()
    pictures = [torch.rand(3, 64, 64) * 2 - 1 for _ in range(3)]
    with torch.no_grad():
        before = vae.encode(pictures[0][None]).latent_dist
        decoded = vae.decode(before.mean).sample
        part("vae").to_sdxl_scale(vae, pictures)
        after = vae.encode(pictures[0][None]).latent_dist
        latents = torch.cat([vae.encode(picture[None]).latent_dist.mean.flatten(2) for picture in pictures], 2)[0] * 0.13025
        torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents.std(1), torch.ones(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-4)
    ratio = (after.std / before.std).flatten(2)[0]  # the posterior is as much wider as its mean
    torch.testing.assert_close(ratio.mean(1), ratio[:, 0], atol=0, rtol=1e-3)


def test_mean_colours_have_mean_0_and_variance_1_on_each_axis(part) -> None:
    pictures = [torch.rand(3, 64, 32) * 2 - 1 for _ in range(5)]
    colours = part("vae").MeanColours(pictures)
    values = torch.cat([colours(picture[None])[0].flatten(1) for picture in pictures], 1)
    torch.testing.assert_close(values.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std(1), torch.ones(3), atol=1e-4, rtol=0)
    greener = pictures[0] + torch.tensor([0.0, 0.1, 0.0])[:, None, None]
    change = (colours(greener[None]) - colours(pictures[0][None])).mean((0, 2, 3))
    assert change[0] > 0 and abs(change[1]) < 1e-5 and change[2] > 0


def test_the_projection_gives_pooled_vectors_the_same_second_moment_in_every_direction(part) -> None:
    untrained = part("untrained")
    shared = torch.randn(16, generator=torch.Generator().manual_seed(1))
    vectors = 5 * shared + torch.randn(100, 16, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 2, 16)
    projected = vectors @ untrained.whitening(vectors)
    torch.testing.assert_close(projected.T @ projected / 100, untrained.POOLED_SCALE**2 * torch.eye(16), atol=1, rtol=0)


def test_the_projection_of_fewer_vectors_than_directions_is_finite(part) -> None:
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    projected = vectors @ part("untrained").whitening(vectors)
    assert torch.isfinite(projected).all()
    torch.testing.assert_close(projected @ projected.T / 3, part("untrained").POOLED_SCALE ** 2 * torch.eye(3), atol=1, rtol=0)


def test_a_vae_whose_training_was_interrupted_ends_as_one_that_was_not(part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, architecture = part("vae"), part("untrained").base_architecture()
    monkeypatch.setattr(vae, "SAVE_EVERY", 2)
    pictures, settings, said = [torch.rand(3, 96, 128) * 2 - 1], vae.VaeSettings(num_steps=3, batch_size=1), []

    def interrupted_loss(*arguments: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return loss(*arguments)

    whole = vae.train_vae(architecture, pictures, settings, tmp_path / "whole.pt", said.append).state_dict()
    loss, calls = vae._loss, iter(range(10))
    monkeypatch.setattr(vae, "_loss", interrupted_loss)
    with pytest.raises(KeyboardInterrupt):
        vae.train_vae(architecture, pictures, settings, tmp_path / "parts.pt", said.append)
    monkeypatch.setattr(vae, "_loss", loss)
    parts = vae.train_vae(architecture, pictures, settings, tmp_path / "parts.pt", said.append).state_dict()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    with pytest.raises(ConfigError, match="remove it to begin anew"):
        vae.train_vae(architecture, pictures, vae.VaeSettings(num_steps=4, batch_size=1), tmp_path / "parts.pt", said.append)


def test_the_configuration_passes_check(part, cli, tmp_path: Path, tiny_base: Path) -> None:
    runs, captions = part("runs"), packaged_captions()
    prepare_pictures(SHIPPED, tmp_path / "pictures", list(captions)[:20], captions)
    runs.write_text(tmp_path / "benchmark.json", benchmark_of((captions[key], (160, 96)) for key in list(captions)[:2]))
    text = runs.configuration(tiny_base, tmp_path / "pictures", tmp_path / "out", tmp_path / "benchmark.json", 123)
    (tmp_path / "base.toml").write_text(text, "utf-8")
    done = cli("check", tmp_path / "base.toml", "--json")
    assert done.code == 0, done.err + done.out
    assert json.loads(done.out)["num_train_steps"] == 123


@pytest.mark.slow
def test_a_small_run_goes_on_after_an_interrupt_and_is_measured(tmp_path: Path) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    metadata = json.loads((SHIPPED / "metadata.json").read_text("utf-8"))
    (source / "images").mkdir(parents=True)
    for key in list(metadata)[:16]:
        (source / "images" / f"{key}.webp").write_bytes((SHIPPED / "images" / f"{key}.webp").read_bytes())
    (source / "metadata.json").write_text(json.dumps({key: metadata[key] for key in list(metadata)[:16]}), "utf-8")
    small = ["--vae-steps", "2", "--steps", "12", "--new", "3", "--unseen", "3", "--measure"]
    command = [sys.executable, str(TOOLS / "make_demo_base.py"), str(source), str(work), *small]
    begun = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = work / "base_training" / "logs"
    deadline = time.monotonic() + 240
    while not any(len(file.read_text().splitlines()) >= 2 for file in metrics.glob("*/metrics.jsonl")):
        assert begun.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    begun.send_signal(signal.SIGTERM)
    assert begun.wait(120) == 143, begun.stderr and begun.stderr.read()
    assert not (work / "base.safetensors").exists()
    stopped = list((work / "base_training" / "train_state").iterdir())
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for file in sorted(metrics.glob("*/metrics.jsonl")) for line in file.read_text().splitlines()]
    assert stopped and sorted(set(steps)) == list(range(1, 13)) and len(steps) == 12
    assert (work / "base.safetensors").stat().st_size < 32e6
    assert json.loads((work / "retrieval.json").read_text())["chance"] == 1 / 10
