"""Data and loader processes that go away during a training: it ends with code 1, says what and when, and saves what it has."""

import ctypes
import os
import re
from pathlib import Path
from typing import Any

import pytest
from command_runs import Ended, contents, run_command, write_config
from forked_runs import ForkedRun
from train_states import by_step

from sdxl_train.state_directory import state_faults

PLUGINS = """
import multiprocessing, os, signal
from sdxl_train import hookimpl

def send(signum):
    for process in multiprocessing.active_children():
        os.kill(process.pid, signum)

class KillWorkers:
    @hookimpl
    def on_step_end(self, run):
        if run.step == 2: send(signal.SIGKILL)

class StopWorkers:
    @hookimpl
    def on_train_start(self, run):
        run.parts.loader.limit_s = 60.0
    @hookimpl
    def on_step_end(self, run):
        if run.step == 2:
            run.parts.loader.limit_s = 1.0  # only now: a busy machine may start a process slowly
            send(signal.SIGSTOP)

def eight(img_key, **kwargs):
    return 8

class Gone:
    @hookimpl
    def on_step_end(self, run):
        if run.step == 10: os.unlink(os.environ["GONE"])

class Closed:
    @hookimpl
    def on_step_end(self, run):
        if run.step == 10: os.chmod(os.environ["GONE"], 0)
"""


@pytest.fixture
def failing(tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trains with a plugin of `PLUGINS` and asserts exit code 1 and a whole state of the step that is named."""
    (tmp_path / "breaks.py").write_text(PLUGINS)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)  # of which one is left to the main process

    def training(plugin: str, **keys: Any) -> Ended:
        ended = run_command("train", write_config(tmp_path, tiny_base, [pictures], plugins=[f"{tmp_path}/breaks.py:{plugin}"] if plugin else [], **keys))
        assert ended.code == 1, ended.err[-3000:]
        (step,) = re.findall(r"the run failed after step (\d+):", ended.err)
        newest = by_step(tmp_path / "out/train_state")[-1]
        assert newest.name.endswith(f"step{step}") and state_faults(newest) == []
        assert not [path for path in (tmp_path / "out").rglob(".sdxl-train-*")], "nothing half written is left"
        return ended

    return training


def last_line(ended: Ended) -> str:
    return ended.err.splitlines()[-1]


@pytest.mark.parametrize("plugin", ["Gone", "Closed"])
@pytest.mark.parametrize(("cache_latents", "kind"), [(False, "png"), (True, "npz")], ids=["pixels", "caches"])
def test_a_file_that_goes_away_after_step_10_is_named_with_the_step(
    failing, pictures: Path, monkeypatch: pytest.MonkeyPatch, plugin: str, cache_latents: bool, kind: str
) -> None:
    if plugin == "Closed" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    monkeypatch.setenv("GONE", str(pictures / f"wide2.{kind}"))
    before = contents(pictures)
    keys = {"num_train_epochs": 9, "cache_latents": cache_latents, "keep_cached_latents_in_memory": False, "cache_latents_to_disk": True}
    ended = failing(plugin, **keys)
    assert f"wide2.{kind}" in last_line(ended) and re.search(r"after step 1[0-2]:", last_line(ended)), last_line(ended)
    gone, after = os.fsencode(pictures / f"wide2.{kind}"), contents(pictures)
    assert {path: after.get(path) for path in before if path != gone} == {path: found for path, found in before.items() if path != gone}


@pytest.mark.parametrize("persistent", [False, True])
def test_a_worker_killed_between_steps_ends_the_run_with_the_last_step_saved(failing, persistent: bool) -> None:
    ended = failing("KillWorkers", batch_size=1, num_train_epochs=2, max_dataloader_n_workers=2, persistent_data_loader_workers=persistent)
    assert "worker killed (out of memory?)" in last_line(ended) and "SIGKILL" in last_line(ended)


def test_a_worker_killed_during_a_save_lets_the_save_finish(failing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import multiprocessing
    import signal
    import time

    import sdxl_train.saves as saves

    real, killed = saves.write_state, []

    def killing(*arguments: Any) -> None:
        if not killed:
            killed.extend(process.pid for process in multiprocessing.active_children())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.3)  # the main thread learns of it meanwhile
        real(*arguments)

    monkeypatch.setattr(saves, "write_state", killing)
    keys = {"num_repeats_getter": f"{tmp_path}/breaks.py:eight", "save_every_n_steps": 2, "keep_train_states": 0, "save_model": False}
    ended = failing("", batch_size=1, max_dataloader_n_workers=2, **keys)
    first = by_step(tmp_path / "out/train_state")[0]
    assert killed and "worker killed" in last_line(ended)
    assert first.name == "model_ep1_step2" and f"saved {first} " in ended.err and state_faults(first) == []


def test_a_stopped_worker_ends_the_run_within_the_limit_naming_the_batch(failing) -> None:
    ended = failing("StopWorkers", batch_size=1, num_train_epochs=2, max_dataloader_n_workers=1)
    assert re.search(r"no batch for 1 s; stuck at this one of epoch 1: (square|wide)\d$", last_line(ended)), last_line(ended)


NEW_NAMES, NEW_USERS, PRIVATE = 0x20000, 0x10000000, 0x4000 | 0x40000  # of unshare(2) and mount(2)
NOT_ALLOWED = 75


def small_shared_memory() -> None:
    """Give this process a /dev/shm of 1 MiB, or end it where the system does not allow that."""
    libc = ctypes.CDLL(None, use_errno=True)
    unshared = libc.unshare(NEW_NAMES if os.geteuid() == 0 else NEW_NAMES | NEW_USERS)
    private = libc.mount(None, b"/", None, PRIVATE, None) if unshared == 0 else -1
    if private != 0 or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=1m") != 0:
        os._exit(NOT_ALLOWED)
    status = os.statvfs("/dev/shm")
    assert status.f_blocks * status.f_frsize == 1 << 20


def test_batches_larger_than_the_shared_memory_train(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches travel through pipes, so that a container's 64 MiB of /dev/shm, or 1 MiB as here, are no limit."""
    from bad_files import noise

    if not os.path.isdir("/dev/shm"):
        pytest.skip("there is no /dev/shm")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    (tmp_path / "data").mkdir()
    for i in range(4):
        noise(i, (384, 384)).save(tmp_path / "data" / f"{i}.png")
    keys = {"resolution": 384, "cache_latents": False, "max_dataloader_n_workers": 2, "save_model": False, "num_train_epochs": 2}  # 1.7 MiB of bytes a batch
    with ForkedRun(tmp_path / "log", write_config(tmp_path, tiny_base, [tmp_path / "data"], **keys), prepare=small_shared_memory) as run:
        code = run.code()
        if code == NOT_ALLOWED:
            pytest.skip("this system allows no mount namespace of one's own")
        assert code == 0, run.err[-3000:]
