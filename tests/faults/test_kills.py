"""SIGKILL at random moments of a training that saves all the time: nothing announced is lost, nothing torn is believed."""

import os
import random
import re
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from sdxl_train.build import build_run
from sdxl_train.config import load_settings
from sdxl_train.console import Console
from sdxl_train.loop import train
from sdxl_train.model.safetensors_header import read_header
from sdxl_train.output_dir import prepare_output_dir
from sdxl_train.saves import Saves
from sdxl_train.state_directory import state_faults, states_in
from sdxl_train.stopping import StopRequest

SAVED = re.compile(r"^saved (.+) \(", re.MULTILINE)


def train_and_kill(run, out: Path, log: Path, wait: float) -> list[Path]:
    """Train into `out` in a forked process and kill it so many seconds after its first announcement; what it announced."""
    (out / "models").mkdir(parents=True)
    child = os.fork()
    if child == 0:
        try:
            sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
            run.output_dir = out
            run.parts.saves = Saves(run.parts.keys, run.parts.base, out)
            train(run)
        finally:
            os._exit(9)  # it was to be killed long before
    end = time.monotonic() + 120
    while not (log.exists() and SAVED.search(log.read_text())):
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return [Path(path) for path in SAVED.findall(log.read_text())]


@pytest.fixture
def run(config, tmp_path: Path):
    """A training that saves after every step and keeps one state, made but not begun."""
    settings = load_settings(config(save_every_n_steps=1, num_train_epochs=5000, keep_models=3, trackers=[], optimizer_type="AdamW"))
    return build_run(settings, tmp_path / "unused", tmp_path / "unused", Console(), StopRequest())


def check_kills(run, tmp_path: Path, num_kills: int) -> None:
    draw = random.Random(1)
    for i in range(num_kills):
        out = tmp_path / f"killed{i}"
        announced = train_and_kill(run, out, tmp_path / f"{i}.log", draw.uniform(0, 0.7))
        states = [path for path in announced if path.parent.name == "train_state"]
        if states:  # the newest announced, or one that was finished after it
            _, newest = next((step, path) for step, path in states_in(out) if not state_faults(path))
            assert int(newest.name.rpartition("step")[2]) >= int(states[-1].name.rpartition("step")[2])
        assert [path for _, path in states_in(out) if state_faults(path)] == [], "a torn state under a final name"
        for model in (out / "models").glob("*.safetensors"):
            header = read_header(str(model))
            assert model.stat().st_size == max(info.end for info in header.tensors.values())
        newest_model = [path for path in announced if path.suffix == ".safetensors"][-1]
        assert newest_model.exists()
        left = [path for folder in ("models", "train_state") for path in out.glob(f"{folder}/.sdxl-train-*")]
        assert len(left) <= 3, "a file, a staging and a trash directory at most"
        prepare_output_dir(out, fresh=False, now=datetime.now(), warn=print)
        assert [path for folder in ("models", "train_state") for path in out.glob(f"{folder}/.sdxl-train-*")] == []


def test_a_kill_at_any_moment_loses_and_tears_nothing(run, tmp_path: Path) -> None:
    check_kills(run, tmp_path, 8)


@pytest.mark.slow
def test_a_hundred_kills_lose_and_tear_nothing(run, tmp_path: Path) -> None:
    check_kills(run, tmp_path, 100)
