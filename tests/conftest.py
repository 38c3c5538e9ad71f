"""What many tests need: a tiny SDXL, a few pictures, a configuration, and the command line in this process or in one of its own."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # two threads on a shared machine are slower, and not repeatable

ORACLES = json.loads((Path(__file__).parent / "oracles.json").read_text())


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """The (inputs, expected) pairs of a group of oracles.json."""
    return lambda group: list(zip(ORACLES[group]["inputs"], ORACLES[group]["expected"], strict=True))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SDXL in the real single-file layout. Not to be changed."""
    from sdxl_train.model.tiny import write_tiny_sdxl

    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_tiny_sdxl(path)
    return path


def write_pictures(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Pictures of one colour gradient each, with a caption beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (key, size) in enumerate(sizes.items()):
        gradient = Image.linear_gradient("L").resize(size)
        Image.merge("RGB", [gradient.rotate(90 * (number + i)).resize(size) for i in range(3)]).save(folder / f"{key}.png")
        (folder / f"{key}.txt").write_text(f"picture {key}, gradient, number {number}")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten small pictures with captions: six in the bucket 64x64, four in 96x32 (at resolution 64)."""
    sizes = {f"square{i}": (64, 64) for i in range(6)} | {f"wide{i}": (128, 48) for i in range(4)}
    write_pictures(tmp_path / "pictures", sizes)
    return tmp_path / "pictures"


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, pictures: Path) -> Callable[..., Path]:
    """Writes a configuration for a short run on the CPU; keys given as arguments replace or add to it, None leaves a key out."""

    def writing(name: str = "sdxl.toml", tables: str = "", **keys: Any) -> Path:
        values: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base),
            "image_dirs": [str(pictures)],
            "output_dir": str(tmp_path / "out"),
            "tokenizer_cache_dir": str(tmp_path / "tokenizers"),
            "resolution": 64,
            "cpu": True,
            "num_train_epochs": 2,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "lr_warmup_steps": 0,
            "max_dataloader_n_workers": 0,
            "max_token_length": 75,
            "save_precision": "float",
            "trackers": ["jsonl"],
            **keys,
        }
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n" + tables, encoding="utf-8")
        return path

    return writing


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs `sdxl-train` with these arguments in this process (importing torch once for many runs)."""

    def running(*arguments: object) -> Ended:
        from sdxl_train.cli import main

        monkeypatch.setattr(sys, "argv", ["sdxl-train", *map(str, arguments)])
        out, err, code = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0
        return Ended(code, out.getvalue(), err.getvalue())

    return running


@pytest.fixture
def process() -> Callable[..., subprocess.Popen]:
    """Starts `sdxl-train` with these arguments in a process of its own, in a new process group."""
    started: list[subprocess.Popen] = []

    def default_signals() -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a test run in the background inherits ignored ones
            signal.signal(signum, signal.SIG_IGN if signum in ignored else signal.SIG_DFL)

    ignored: set[int] = set()

    def starting(*arguments: object, ignore: int | None = None, **environment: str) -> subprocess.Popen:
        ignored.clear()
        ignored.update({ignore} if ignore is not None else ())
        command = [sys.executable, "-m", "sdxl_train.cli", *map(str, arguments)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True, preexec_fn=default_signals)
        started.append(child)
        return child

    yield starting
    for child in started:
        if child.poll() is None:
            child.kill()
        child.wait()


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl of a project folder, in order."""
    return [json.loads(line) for file in sorted(output_dir.glob("logs/*/metrics.jsonl")) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    return read_metrics
