"""Signals at every place of a run: it ends soon, with the signal's code, with the last completed step saved and nothing half-written."""

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_runs import Disk, Operation, hidden, newest_state, train_into
from forked_runs import Fork, fork
from train_states import content_of_state

from sdxl_train import atomic
from sdxl_train.atomic import remove_leftovers
from sdxl_train.output_dir import prepare_output_dir
from sdxl_train.state_directory import staged_state, state_faults, states_in
from sdxl_train.stopping import Interrupted
from sdxl_train.train_state import SavedState, restore

STOPS = """
import os, signal
from sdxl_train import hookimpl

class Stops:
    '''Asks for a stop in the micro-batch that the environment names, and notes how many there were.'''
    seen = 0
    @hookimpl(wrapper=True)
    def compute_loss(self):
        Stops.seen += 1
        print("micro-batch", Stops.seen, flush=True, file=__import__("sys").stderr)
        if Stops.seen == int(os.environ["STOP_AT"]):
            os.kill(os.getpid(), getattr(signal, os.environ.get("STOP_BY", "SIGTERM")))
        return (yield)
"""


def log_of(child: Fork) -> str:
    return child.log.read_text()


def saved_steps(out: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("step")[2]) for path in out.glob("models/*"))


def counting(times: int, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """The function, telling of each call, with a SIGTERM in one of them."""
    calls = iter(range(1, 10_000))

    def called(*arguments: Any, **named: Any) -> Any:
        number = next(calls)
        print(what, number, file=sys.stderr, flush=True)
        if number == times:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **named)

    return called


def test_a_signal_while_the_model_is_loaded_ends_before_the_next_part(forked_cli, config, tmp_path: Path) -> None:
    import sdxl_train.build as build

    def prepare() -> None:
        build.load_networks = counting(1, "networks", build.load_networks)
        build.train_here = counting(99, "moved", build.train_here)

    child = forked_cli(config(), prepare=prepare)
    assert child.wait() == 143 and "networks 1" in log_of(child) and "moved" not in log_of(child)
    assert saved_steps(tmp_path / "out") == [] and states_in(tmp_path / "out") == [] and "Traceback" not in log_of(child)


def test_a_signal_while_pictures_are_encoded_ends_before_the_next_encode_and_finished_caches_stay(
    forked_cli, config, pictures: Path, tmp_path: Path
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    def prepare() -> None:
        AutoencoderKL.encode = counting(3, "encode", AutoencoderKL.encode)

    child = forked_cli(config(vae_batch_size=1, flip_aug=False), prepare=prepare)
    assert child.wait() == 143 and log_of(child).count("encode ") == 3 and "Traceback" not in log_of(child)
    assert 2 <= len(list(pictures.glob("*.npz"))) <= 3 and list(pictures.glob(".sdxl-train-*")) == []
    assert saved_steps(tmp_path / "out") == []


def test_a_signal_in_a_step_saves_the_step_before(forked_cli, config, tmp_path: Path) -> None:
    (tmp_path / "stops.py").write_text(STOPS)
    child = forked_cli(config(plugins=[f"{tmp_path}/stops.py:Stops"]), prepare=lambda: os.environ.update(STOP_AT="3"))
    assert child.wait() == 143 and "micro-batch 4" not in log_of(child)
    assert saved_steps(tmp_path / "out") == [2] and states_in(tmp_path / "out")[0][0] == 2


@pytest.mark.parametrize("call", ["write", "rename"])
def test_a_signal_in_a_save_lets_it_finish(forked_cli, config, tmp_path: Path, call: str) -> None:
    out = tmp_path / "out"
    number = 900 if call == "write" else 1

    def prepare() -> None:
        seen: list[Operation] = []

        def act(one: Operation) -> None:
            if one.call == call:
                seen.append(one)
                if len(seen) == number:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.05)

        Disk((out / "models", out / "train_state"), act).install()

    child = forked_cli(config(save_every_n_steps=2, num_train_epochs=50), prepare=prepare)
    assert child.wait() == 143, log_of(child)
    steps = saved_steps(out)
    assert steps[0] == 2 and len(steps) <= 2 and steps[-1] == states_in(out)[0][0] <= 4
    assert newest_state(out) == states_in(out)[0][1] and hidden(out) == []


def test_a_signal_while_samples_are_rendered_ends_before_the_next_denoising_step(forked_cli, config, tmp_path: Path) -> None:
    from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler

    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "x", "width": 64, "height": 64, "steps": 8}] * 2))

    def prepare() -> None:
        EulerAncestralDiscreteScheduler.step = counting(11, "denoising", EulerAncestralDiscreteScheduler.step)

    keys = {"sample_benchmark": str(tmp_path / "bench.json"), "sample_every_n_steps": 2, "sample_sampler": "euler_a"}
    child = forked_cli(config(**keys), prepare=prepare)
    assert child.wait() == 143 and "denoising 11" in log_of(child) and "denoising 12" not in log_of(child), log_of(child)
    # Twice 8 steps are those of the untrained model: the stop came before step 1, where there is nothing to save.
    assert saved_steps(tmp_path / "out") == []


def check_two_signals_in_a_save(forked_cli, config, tmp_path: Path, number: int) -> None:
    draw = random.Random(4)
    for i in range(number):
        out, mark, at = tmp_path / f"twice{i}", tmp_path / f"mark{i}", draw.randrange(10, 5700)  # in one of the first two saves

        def prepare(out: Path = out, mark: Path = mark, at: int = at) -> None:
            def act(one: Operation) -> None:
                if one.number == at:
                    os.kill(os.getpid(), signal.SIGINT)
                    mark.touch()
                if one.number >= at:
                    time.sleep(0.1)  # what is left of the save would take minutes

            Disk((out / "models", out / "train_state"), act).install()

        keys = {"output_dir": str(out), "save_every_n_steps": 1, "num_train_epochs": 50, "keep_models": 2, "optimizer_type": "AdamW"}
        child = forked_cli(config(**keys), prepare=prepare)
        end = time.monotonic() + 60
        while not mark.exists():
            assert time.monotonic() < end, log_of(child)
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.5))
        os.kill(child.pid, signal.SIGINT)
        assert child.wait(at_most_s=60) == 130, log_of(child)  # the save alone would take longer
        assert [path for _, path in states_in(out) if state_faults(path)] == [], "torn"
        announced = re.findall(r"^saved (\S+train_state\S+) ", log_of(child), re.MULTILINE)
        if announced:
            assert states_in(out)[0][0] >= int(announced[-1].rpartition("step")[2])
        assert len(hidden(out)) <= 2
        prepare_output_dir(out, fresh=False, now=datetime.now(), warn=print)
        assert hidden(out) == []


def test_a_second_signal_in_a_save_ends_at_once_and_loses_nothing(forked_cli, config, tmp_path: Path) -> None:
    check_two_signals_in_a_save(forked_cli, config, tmp_path, 2)


@pytest.mark.slow
def test_many_second_signals_in_saves(forked_cli, config, tmp_path: Path) -> None:
    check_two_signals_in_a_save(forked_cli, config, tmp_path, 25)


def test_a_staging_directory_that_is_being_removed_cannot_become_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second signal removes it while the saving thread still writes: at worst that thread is about to rename it."""
    final, real = tmp_path / "m_ep1_step1", atomic.shutil.rmtree

    def renamed_first(path: Path, *rest: Any, **named: Any) -> None:
        if not final.exists():
            with pytest.raises(FileNotFoundError):
                os.rename(staging, final)
        real(path, *rest, **named)

    with pytest.raises(FileNotFoundError), staged_state(final) as writing:  # its thread finds its directory gone
        with writing.file("a.bin") as file:
            file.write(b"weights")
        (staging,) = tmp_path.iterdir()
        monkeypatch.setattr(atomic, "shutil", SimpleNamespace(rmtree=renamed_first))
        assert remove_leftovers(tmp_path) == [staging]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stop_within_a_group_of_four_is_resumed_bit_by_bit(built_run, tmp_path: Path) -> None:
    keys = {"batch_size": 1, "gradient_accumulation_steps": 4, "noise_offset": 0.05, "save_every_n_steps": 0}
    run, whole = built_run(**keys), tmp_path / "whole"
    assert fork(lambda: train_into(run, whole, 3), tmp_path / "whole.log").wait() == 0
    (last,) = (path for _, path in states_in(whole))
    for micro_batch in (1, 2, 3):
        out = tmp_path / f"stopped{micro_batch}"

        def until_stopped(out: Path = out, micro_batch: int = micro_batch) -> None:
            signal.signal(signal.SIGTERM, run.parts.stop.handle)
            run.parts.update.backward = counting(4 + micro_batch, "micro-batch", run.parts.update.backward)
            with pytest.raises(Interrupted):
                train_into(run, out, 3)

        child = fork(until_stopped, tmp_path / f"stopped{micro_batch}.log")
        assert child.wait() == 0 and f"micro-batch {5 + micro_batch}" not in log_of(child), log_of(child)
        ((step, state),) = states_in(out)
        assert step == 1 and saved_steps(out) == [1]

        def again(out: Path = out, state: Path = state) -> None:
            restore(run, SavedState(state))
            train_into(run, out, 3)

        child = fork(again, tmp_path / "again.log")
        assert child.wait() == 0, log_of(child)
        assert content_of_state(states_in(out)[0][1]) == content_of_state(last)
        name = f"models/{last.name}.safetensors"
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_ctrl_c_also_ends_the_reader_of_the_messages_and_the_step_is_saved(forked_cli, config, tmp_path: Path) -> None:
    """`sdxl-train FILE 2>&1 | tee log`: Ctrl-C reaches tee too, and nobody reads the messages any more."""
    (tmp_path / "stops.py").write_text(STOPS.replace('os.kill(', 'os.close(int(os.environ["READER"])); os.kill('))
    reader, writer = os.pipe()

    def prepare() -> None:
        os.environ.update(STOP_AT="3", STOP_BY="SIGINT", READER=str(reader))
        os.dup2(writer, 2)
        os.close(writer)

    child = forked_cli(config(plugins=[f"{tmp_path}/stops.py:Stops"]), prepare=prepare)
    os.close(writer)
    os.close(reader)
    assert child.wait() == 130
    assert saved_steps(tmp_path / "out") == [2] and newest_state(tmp_path / "out") is not None


def test_a_terminal_that_is_closed_stops_the_run_with_its_step_saved(forked_cli, config, tmp_path: Path) -> None:
    termios, fcntl = pytest.importorskip("termios"), pytest.importorskip("fcntl")
    terminal, inside = os.openpty()

    def prepare() -> None:
        os.close(terminal)
        os.setsid()
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)
        for descriptor in (0, 1, 2):
            os.dup2(inside, descriptor)
        os.close(inside)

    child = forked_cli(config(num_train_epochs=5000, save_every_n_steps=1, keep_models=1), prepare=prepare)
    os.close(inside)
    end, shown = time.monotonic() + 60, b""
    while b"saved " not in shown:
        assert time.monotonic() < end, shown
        shown += os.read(terminal, 4096)
    os.close(terminal)  # the kernel sends SIGHUP to the session's leader, and writing fails from now on
    assert child.wait() == 129
    assert newest_state(tmp_path / "out") == states_in(tmp_path / "out")[0][1] and hidden(tmp_path / "out") == []


def test_a_run_under_nohup_goes_on_after_a_hangup_in_any_place(forked_cli, config, tmp_path: Path) -> None:
    (tmp_path / "stops.py").write_text(STOPS)

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.environ.update(STOP_AT="2", STOP_BY="SIGHUP")

    child = forked_cli(config(plugins=[f"{tmp_path}/stops.py:Stops"]), prepare=prepare)
    assert child.wait() == 0 and saved_steps(tmp_path / "out") == [6]
