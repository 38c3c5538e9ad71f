"""Which saved state is believed, found, kept and set aside when folders, files and clocks are not as they should be."""

import errno
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fault_runs import newest_state, train_into
from forked_runs import fork

from sdxl_train import saves, state_directory
from sdxl_train.atomic import sync_directory
from sdxl_train.control import take_requests
from sdxl_train.errors import ConfigError
from sdxl_train.resuming import find_state, set_later_saves_aside
from sdxl_train.run import Run
from sdxl_train.state_directory import MANIFEST, staged_state, state_faults, states_in


def write(state: Path, when: float | None = None) -> Path:
    with staged_state(state) as staging, staging.file("a.bin") as file:
        file.write(state.name.encode())
    if when is not None:
        os.utime(state / MANIFEST, (when, when))
    return state


def damage(state: Path) -> Path:
    (state / "a.bin").write_bytes(b"x" * len(state.name))
    return state


def test_latest_is_in_the_folder_with_the_newest_complete_state_whatever_broken_ones_are_newer(tmp_path: Path) -> None:
    old = write(tmp_path / "run0" / "train_state" / "m_ep1_step9", when=1000)
    damage(write(tmp_path / "run0" / "train_state" / "m_ep1_step10", when=3000))
    newest = write(tmp_path / "run1" / "train_state" / "m_ep1_step4", when=2000)
    broken = damage(write(tmp_path / "run1" / "train_state" / "m_ep1_step5", when=500))  # the clock was set back
    told: list[str] = []
    assert find_state("latest", str(tmp_path / "run%index%"), told.append) == (newest, tmp_path / "run1")
    assert len(told) == 2 and any(str(broken) in line for line in told)
    shutil.rmtree(newest)
    assert find_state("latest", str(tmp_path / "run%index%"), told.append) == (old, tmp_path / "run0")
    shutil.rmtree(old)
    with pytest.raises(ConfigError, match="no train state in .* is complete"):
        find_state("latest", str(tmp_path / "run%index%"), told.append)


def test_latest_reads_each_state_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (3, 4, 5):
        write(tmp_path / "out" / "train_state" / f"m_ep1_step{step}", when=1000 + step)
    damage(tmp_path / "out" / "train_state" / "m_ep1_step5")
    read: list[Any] = []
    real = state_directory._file_fault
    monkeypatch.setattr(state_directory, "_file_fault", lambda path, *rest: (read.append(path), real(path, *rest))[1])
    found = find_state("latest", str(tmp_path / "out"), lambda text: None)
    assert found is not None and found[0].name == "m_ep1_step4" and [path.parent.name for path in read] == ["m_ep1_step5", "m_ep1_step4"]


def test_a_file_that_cannot_be_read_is_a_fault_of_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad_sector(file: Any, digest: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    state = write(tmp_path / "m_ep1_step1")
    monkeypatch.setattr(state_directory.hashlib, "file_digest", bad_sector)
    (fault,) = state_faults(state)
    assert str(state / "a.bin") in fault and os.strerror(errno.EIO) in fault


def test_setting_later_saves_aside_twice_in_a_second_keeps_both(tmp_path: Path) -> None:
    now = datetime(2026, 1, 1)
    for content in (b"first", b"second"):
        write(tmp_path / "train_state" / "m_ep1_step9")
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / "m_ep1_step9.safetensors").write_bytes(content)
        set_later_saves_aside(tmp_path, "m", 8, now, lambda text: None)
    assert states_in(tmp_path) == [] and len(list((tmp_path / "train_state").iterdir())) == 2
    assert {path.read_bytes() for path in (tmp_path / "models").iterdir()} == {b"first", b"second"}


def test_a_file_system_that_cannot_sync_directories_may_be_used_and_a_failing_one_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(code: int) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    refuses(errno.EINVAL)
    sync_directory(tmp_path)
    refuses(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_directory(tmp_path)


def test_a_complete_state_is_not_replaced_and_a_broken_one_is(built_once: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fork(lambda: train_into(built_once, out, 1), tmp_path / "a.log").wait() == 0
    state = newest_state(out)
    assert state is not None
    inode = state.stat().st_ino
    assert fork(lambda: train_into(built_once, out, 1), tmp_path / "b.log").wait() == 0
    assert state.stat().st_ino == inode
    (state / "weights.safetensors").write_bytes(b"torn")
    assert fork(lambda: train_into(built_once, out, 1), tmp_path / "c.log").wait() == 0
    assert state.stat().st_ino != inode and state_faults(state) == [] and [path.name for path in state.parent.iterdir()] == [state.name]


@pytest.mark.slow
def test_kept_states_are_read_once_a_process_and_a_broken_one_is_not_counted(built_run, tmp_path: Path) -> None:
    run, out = built_run(keep_train_states=3), tmp_path / "out"
    assert fork(lambda: train_into(run, out, 2), tmp_path / "a.log").wait() == 0
    broken = states_in(out)[0][1]  # of step 2
    (broken / "weights.safetensors").write_bytes(b"torn")

    def again() -> None:
        from sdxl_train.train_state import SavedState, restore

        restore(run, SavedState(states_in(out)[1][1]))
        run.step, run.epoch = 2, 1  # goes on behind the broken one
        real, read = saves.state_faults, list[Path]()
        saves.state_faults = lambda path: (read.append(path), real(path))[1]
        train_into(run, out, 7)
        print("read", [int(path.name.rpartition("step")[2]) for path in read], file=os.sys.stderr)

    child = fork(again, tmp_path / "b.log")
    assert child.wait() == 0, child.log.read_text()
    # Each new state once, step 1 once, and the broken one at each save until it is older than three complete ones.
    assert "read [3, 2, 1, 4, 2, 5, 6, 7]" in child.log.read_text()
    assert [step for step, _ in states_in(out)] == [7, 6, 5]


def test_a_project_folder_that_vanishes_for_a_while_costs_only_the_saves_meanwhile(built_run, tmp_path: Path) -> None:
    run, out = built_run(save_on_exception=False), tmp_path / "out"

    def body() -> None:
        calls: list[int] = []

        def gone_in_step_2() -> None:
            calls.append(1)
            if len(calls) == 2:
                out.rename(tmp_path / "elsewhere")
            if len(calls) == 3:
                (tmp_path / "elsewhere").rename(out)

        real = run.parts.update.apply
        run.parts.update.apply = lambda: (run.parts.saves.finish(run), gone_in_step_2(), real())[2]
        train_into(run, out, 3)

    child = fork(body, tmp_path / "a.log")
    assert child.wait() == 0, child.log.read_text()
    assert "saving at step 2 failed" in child.log.read_text() and os.strerror(errno.ENOENT) in child.log.read_text()
    newest = newest_state(out)
    assert newest is not None and newest.name.endswith("step3")


def test_plugins_are_told_of_a_model_whose_state_could_not_be_saved_and_only_once(built_run, tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(
        "import sys\nfrom sdxl_train import hookimpl\nclass Told:\n    @hookimpl\n    def on_save(self, run, path, reason):\n        print('told', path.name, file=sys.stderr)\n"
    )
    run, out = built_run(plugins=[f"{tmp_path}/told.py:Told"]), tmp_path / "out"

    def body() -> None:
        out.mkdir()
        (out / "train_state").write_text("in the way of the states")
        train_into(run, out, 1)

    child = fork(body, tmp_path / "a.log")
    assert child.wait() == 1
    assert child.log.read_text().count("told model_ep1_step1.safetensors") == 1


def test_a_folder_that_cannot_be_looked_at_holds_no_requests(tmp_path: Path) -> None:
    assert take_requests(tmp_path / "gone") == []
    assert take_requests(tmp_path / ("x" * 300)) == []  # stat itself fails
