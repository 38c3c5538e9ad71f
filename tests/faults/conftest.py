"""A training that is built once and forked many times; the command line in forks of this process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cache_runs import write_pictures
from command_runs import write_config
from forked_runs import Fork, command, fork

from sdxl_train.build import build_run
from sdxl_train.config import load_settings
from sdxl_train.console import Console
from sdxl_train.run import Run
from sdxl_train.stopping import StopRequest

KEYS: dict[str, Any] = {
    "save_every_n_steps": 1, "keep_models": 1, "num_train_epochs": 5000, "save_on_train_end": True, "save_precision": "float", "trackers": [],
    "optimizer_type": "AdamW",
}  # fmt: skip

if not hasattr(os, "fork"):
    pytest.skip("no fork on this system", allow_module_level=True)


@pytest.fixture
def built_run(config: Callable[..., Path], tmp_path: Path) -> Callable[..., Run]:
    """Makes a training that saves after every step and keeps one model and one state; keys given as arguments replace or add to it."""

    def building(**keys: Any) -> Run:
        return _built(config("built.toml", **(KEYS | keys)), tmp_path)

    return building


def _built(file: Path, folder: Path) -> Run:
    return build_run(load_settings(file), folder / "unused", folder / "unused", Console(), StopRequest())


@pytest.fixture(scope="module")
def built_once(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As `built_run()`, for all tests of a module: it is trained in forks only."""
    folder = tmp_path_factory.mktemp("built")
    return _built(write_config(folder, tiny_base, [write_pictures(folder / "data")], **KEYS), folder)


@pytest.fixture
def forked_cli(tmp_path: Path) -> Callable[..., Fork]:
    """Runs `sdxl-train` with these arguments in a fork, after `prepare` was called there; stderr goes into a file."""
    import sdxl_train.loop
    import sdxl_train.run_record  # noqa: F401  (imported once, here, not in each fork)

    number = iter(range(10_000))

    def running(*arguments: object, prepare: Callable[[], object] = lambda: None) -> Fork:
        return fork(command(*arguments, prepare=prepare), tmp_path / f"fork{next(number)}.log")

    return running
