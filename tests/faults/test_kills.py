"""SIGKILL during trainings that save all the time: nothing announced is lost, nothing torn is believed, and what is left resumes."""

import os
import random
import re
import shutil
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest
from fault_runs import Disk, hidden, killing, newest_state, train_into
from forked_runs import Fork, fork
from train_states import content_of_state

from sdxl_train.model.safetensors_header import read_header
from sdxl_train.output_dir import prepare_output_dir
from sdxl_train.run import Run
from sdxl_train.state_directory import state_faults, states_in
from sdxl_train.train_state import SavedState, restore

SAVED = re.compile(r"^saved (.+) \(", re.MULTILINE)
OPERATIONS_OF_A_SAVE = 2870  # about; most are writes


def step_of_path(path: Path) -> int:
    return int(path.stem.rpartition("step")[2])


def killed_at_an_operation(run: Run, out: Path, draw: random.Random) -> Fork:
    """Train until an operation of the second save."""
    at = draw.randrange(OPERATIONS_OF_A_SAVE, 2 * OPERATIONS_OF_A_SAVE + 30)

    def body() -> None:
        Disk((out / "models", out / "train_state"), killing(lambda one: one.number == at)).install()
        train_into(run, out)

    return fork(body, out.with_name(f"{out.name}.log"))


def killed_at_a_time(run: Run, out: Path, draw: random.Random) -> Fork:
    """Train until up to 0.6 s after the first announcement."""
    child = fork(lambda: train_into(run, out), out.with_name(f"{out.name}.log"))
    end = time.monotonic() + 120
    while not (child.log.exists() and SAVED.search(child.log.read_text())):
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.6))
    os.kill(child.pid, signal.SIGKILL)
    return child


def check_what_is_left(out: Path, announced: list[Path]) -> None:
    assert [path for _, path in states_in(out) if state_faults(path)] == [], "a torn state under a final name"
    states = [path for path in announced if path.parent.name == "train_state"]
    if states:  # the newest announced, or one that was finished after it
        newest = newest_state(out)
        assert newest is not None and step_of_path(newest) >= step_of_path(states[-1])
    for model in (out / "models").glob("*.safetensors"):
        header = read_header(str(model))
        assert model.stat().st_size == max(info.end for info in header.tensors.values())
    assert [path for path in announced if path.suffix == ".safetensors"][-1].exists()
    assert len(hidden(out)) <= 3, "a file, a staging and a trash directory at most"
    prepare_output_dir(out, fresh=False, now=datetime.now(), warn=print)
    assert hidden(out) == []


def check_kills(run: Run, folder: Path, num_kills: int, resume_every: int) -> None:
    draw, whole = random.Random(1), folder / "whole"
    assert fork(lambda: train_into(run, whole, 4), folder / "whole.log").wait() == 0
    for i in range(num_kills):
        out = folder / f"killed{i}"
        child = (killed_at_a_time if i % 2 else killed_at_an_operation)(run, out, draw)
        assert child.wait() == -signal.SIGKILL
        check_what_is_left(out, [Path(path) for path in SAVED.findall(child.log.read_text())])
        state = newest_state(out)
        if i % resume_every == 0 and state is not None and step_of_path(state) < 4:

            def again(out: Path = out, state: Path = state) -> None:
                restore(run, SavedState(state))
                train_into(run, out, 4)

            assert fork(again, folder / "again.log").wait() == 0
            last, uninterrupted = (next(end.glob("train_state/*_step4")) for end in (out, whole))
            assert content_of_state(last) == content_of_state(uninterrupted)
            assert (out / "models" / f"{last.name}.safetensors").read_bytes() == (whole / "models" / f"{last.name}.safetensors").read_bytes()
        shutil.rmtree(out)


def test_a_kill_at_any_moment_loses_and_tears_nothing(built_once: Run, tmp_path: Path) -> None:
    check_kills(built_once, tmp_path, 4, resume_every=4)


@pytest.mark.slow
def test_many_kills_lose_and_tear_nothing(built_once: Run, tmp_path: Path) -> None:
    check_kills(built_once, tmp_path, 100, resume_every=20)
