"""Runs of the command that many tests of a module share, and what they leave behind."""

import gc
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Notes each micro-batch as it is trained: one JSON line beside this file.
WATCH = """
import json
from pathlib import Path
from sdxl_train import hookimpl

class Watch:
    @hookimpl(wrapper=True)
    def compute_loss(self, timesteps, batch):
        losses = yield
        rows = zip(batch.keys, batch.captions, batch.flipped, batch.original_sizes, batch.crops, batch.target_sizes, timesteps.tolist(), losses.tolist())
        names = ("key", "caption", "flipped", "original_size", "crop", "target_size", "timestep", "loss")
        with open(Path(__file__).with_name("seen.jsonl"), "a") as file:
            for row in rows:
                file.write(json.dumps(dict(zip(names, row))) + "\\n")
        return losses
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def run_command(*arguments: object) -> Ended:
    """Run `sdxl-train` with these arguments in this process."""
    from sdxl_train.cli import main

    before, out, err, code = sys.argv, io.StringIO(), io.StringIO(), 0
    sys.argv = ["sdxl-train", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0
    finally:
        sys.argv = before
    return Ended(code, out.getvalue(), err.getvalue())


def write_config(folder: Path, base: Path, image_dirs: list[Path], tables: str = "", **keys: Any) -> Path:
    """Write `sdxl.toml` for a short run on the CPU into a folder that also takes the output; a key that is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "image_dirs": [str(path) for path in image_dirs],
        "output_dir": str(folder / "out"),
        "tokenizer_cache_dir": str(base.parent / "tokenizers"),
        "resolution": 64,
        "cpu": True,
        "num_train_epochs": 1,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "max_dataloader_n_workers": 0,
        "max_token_length": 75,
        "save_on_train_end": False,
        "trackers": ["jsonl"],
        **keys,
    }
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]
    path = folder / "sdxl.toml"
    path.write_text("\n".join(lines) + "\n" + tables, encoding="utf-8")
    return path


def watched_run(folder: Path, base: Path, image_dirs: list[Path], tables: str = "", **keys: Any) -> tuple[Ended, list[dict[str, Any]]]:
    """Train, and give back each sample as it was trained, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "watch.py").write_text(WATCH)
    plugins = [*keys.pop("plugins", []), f"{folder}/watch.py:Watch"]
    ended = run_command(write_config(folder, base, image_dirs, tables, plugins=plugins, **keys))
    return ended, read_seen(folder)


def read_seen(folder: Path) -> list[dict[str, Any]]:
    """What `WATCH` noted in a folder, over all its runs."""
    path = folder / "seen.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def contents(folder: Path) -> dict[bytes, tuple[str, int]]:
    """SHA-256 and mtime_ns of every regular file below a folder, '' in place of the sum of what cannot be read, by its path."""
    found: dict[bytes, tuple[str, int]] = {}
    for directory, folders, files in os.walk(os.fsencode(folder)):
        for name in files + folders:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            digest = ""
            if os.path.isfile(path) and os.access(path, os.R_OK):
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path] = (digest, status.st_mtime_ns if name in files else 0)
    return found


@dataclass
class Growth:
    """By how many bytes this process grew at most, known at the end; None where the system does not tell."""

    num_bytes: int | None = None


@contextmanager
def memory_growth() -> Iterator[Growth]:
    """Watch the resident memory of this process (Linux: the peak can be set back by /proc/self/clear_refs, see proc(5))."""
    growth = Growth()
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        yield growth
        return
    before = _status_kib("VmRSS")
    yield growth
    growth.num_bytes = (_status_kib("VmHWM") - before) * 1024


def _status_kib(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])
