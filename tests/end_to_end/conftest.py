"""Runs on a few pictures of two buckets, for what concerns their caches; and what a training changes in the saved file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_runs import write_pictures
from command_runs import Ended, read_seen, run_command, watched_run, write_config
from safetensors.torch import load_file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "data")


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pictures of each encode of a VAE from now on."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    seen: list[int] = []
    real = AutoencoderKL.encode

    def counting(self: Any, x: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(len(x))
        return real(self, x, *arguments, **named)

    monkeypatch.setattr(AutoencoderKL, "encode", counting)
    return seen


@pytest.fixture
def cached(tiny_base: Path, data: Path, tmp_path: Path) -> Callable[..., Ended]:
    """Runs `sdxl-train cache` on the pictures; asserts success."""

    def caching(**keys: Any) -> Ended:
        ended = run_command("cache", write_config(tmp_path / "cache", tiny_base, [data], **keys))
        assert ended.code == 0, ended.err[-3000:]
        return ended

    return caching


@pytest.fixture
def trained(tiny_base: Path, data: Path, tmp_path: Path) -> Callable[..., tuple[Ended, list[dict[str, Any]]]]:
    """Trains on the pictures in the project folder `name`, and gives back the samples of this run; asserts success."""

    def training(name: str = "train", image_dirs: list[Path] | None = None, **keys: Any) -> tuple[Ended, list[dict[str, Any]]]:
        before = len(read_seen(tmp_path / name))
        ended, seen = watched_run(tmp_path / name, tiny_base, image_dirs or [data], **keys)
        assert ended.code == 0, ended.err[-3000:]
        return ended, seen[before:]

    return training


@pytest.fixture
def train_and_compare(cli, config, tmp_path: Path, tiny_base: Path):
    """Trains with these keys; the names of the tensors that changed, and the saved file's tensors."""

    def training(out: str = "out", tables: str = "", **keys):
        ended = cli(config(f"{out}.toml", tables, output_dir=str(tmp_path / out), **{"num_train_epochs": 1, **keys}))
        assert ended.code == 0, ended.err
        after = load_file(next((tmp_path / out / "models").iterdir()))
        before = load_file(tiny_base)
        return {name for name in after if not torch.equal(after[name], before[name].to(after[name].dtype))}, after, ended

    return training
