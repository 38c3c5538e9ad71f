"""Saving on a disk that fails: what was announced stays, what fails is told with its cause, and nothing half-written is left."""

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from fault_runs import Disk, Operation, failing, hidden, killing, newest_state, train_into
from forked_runs import Fork, fork

from sdxl_train.model.safetensors_header import read_header
from sdxl_train.output_dir import prepare_output_dir
from sdxl_train.run import Run
from sdxl_train.state_directory import state_faults, states_in


def watched(run, out: Path, act: Callable[[Operation], None] = lambda operation: None, num_steps: int = 2) -> tuple[Fork, Callable[[], list[Operation]]]:
    """Train into `out` in a fork whose saves go to a watched disk; the fork, and the function that tells what was done to the files."""
    disk, seen = Disk((out / "models", out / "train_state"), act), out.with_name(f"{out.name}.json")

    def body() -> None:
        line = run.parts.console.line

        def telling(text: str) -> None:
            disk.said(text)
            line(text)

        run.parts.console.line = telling
        disk.install()
        try:
            train_into(run, out, num_steps)
        finally:
            seen.write_text(json.dumps([(one.number, one.call, one.path) for one in disk.seen]))

    return fork(body, out.with_name(f"{out.name}.log")), lambda: [Operation(*one) for one in json.loads(seen.read_text())]


def log_of(child: Fork) -> str:
    return child.log.read_text()


def step(out: Path, number: int) -> Path:
    """The state after so many steps, or a path where nothing is."""
    return next(out.glob(f"train_state/model_ep*_step{number}"), out / "none")


def model(out: Path, number: int) -> Path:
    """The model after so many steps, or a path where nothing is."""
    return next(out.glob(f"models/model_ep*_step{number}.safetensors"), out / "none")


def second_save(operations: list[Operation]) -> list[Operation]:
    """What is done to files from the begin of the second save to the announcement of its state."""
    said = [i for i, one in enumerate(operations) if one.call == "say" and one.path.startswith("saved ") and "train_state" in one.path]
    begin = next(i for i in range(said[0], len(operations)) if operations[i].call == "create")
    return [one for one in operations[begin : said[1]] if one.call != "say"]


@pytest.fixture(scope="module")
def clean(built_once: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Operation], Iterator[Path]]:
    """A run, what its second save does to files, and where trials of it go."""
    folder = tmp_path_factory.mktemp("trials")
    child, seen = watched(built_once, folder / "clean")
    assert child.wait() == 0, log_of(child)
    return built_once, second_save(seen()), iter(folder / f"trial{i}" for i in range(1000))


def chosen(operations: list[Operation], number: int) -> list[int]:
    """Numbers of operations: those that are no write, and some of the writes."""
    writes = [one.number for one in operations if one.call == "write"]
    others = [one.number for one in operations if one.call != "write"]
    draw = random.Random(3)
    return sorted(draw.sample(others, min(len(others), number // 2)) + draw.sample(writes, number - min(len(others), number // 2)))


def check_one_failed_save(clean, code: int, at: int) -> None:
    run, _, outs = clean
    out = next(outs)
    child, _ = watched(run, out, failing(code, lambda one: one.number == at), num_steps=3)
    assert child.wait() == 0, log_of(child)
    (warning,) = [line for line in log_of(child).splitlines() if "failed" in line]
    assert "saving at step 2 failed, and will be tried again at the next trigger" in warning
    assert os.strerror(code) in warning and str(out) in warning and "bytes needed" in warning and "free" in warning
    assert newest_state(out) == step(out, 3) and model(out, 3).exists() and hidden(out) == []


def check_no_save_any_more(clean, code: int, at: int) -> None:
    run, _, outs = clean
    out = next(outs)
    child, _ = watched(run, out, failing(code, lambda one: one.number >= at and one.call in ("create", "write", "fsync", "mkdir")), num_steps=3)
    assert child.wait() == 1 and os.strerror(code) in log_of(child)
    newest = newest_state(out)
    assert newest in (step(out, 1), step(out, 2)) and [path for _, path in states_in(out) if state_faults(path)] == []
    assert hidden(out) == [] and len(list((out / "models").iterdir())) >= 1


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_moment_costs_one_save(clean) -> None:
    for at in chosen(clean[1], 3):
        check_one_failed_save(clean, errno.ENOSPC, at)


def test_a_disk_that_stays_full_ends_the_run_with_the_older_save_whole(clean) -> None:
    for at in chosen(clean[1], 2):
        check_no_save_any_more(clean, errno.ENOSPC, at)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_of_many_moments(clean) -> None:
    for at in chosen(clean[1], 16):
        check_one_failed_save(clean, errno.ENOSPC, at)
    for at in chosen(clean[1], 8):
        check_no_save_any_more(clean, errno.ENOSPC, at)


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_each_refusal_is_named_and_tried_again(clean, code: int) -> None:
    call = "create" if code in (errno.EACCES, errno.EROFS) else "write"
    numbers = [one.number for one in clean[1] if one.call == call]
    check_one_failed_save(clean, code, random.Random(code).choice(numbers))


def test_a_limit_on_file_sizes_is_named_with_exit_code_1_and_the_state_is_saved(forked_cli, config, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limit = 9_000_000  # between the largest file of a state and the model
    keys = {"max_train_steps": 2, "save_every_n_steps": 1, "optimizer_type": "AdamW"}
    child = forked_cli(config(**keys), prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert child.wait() == 1, log_of(child)
    for said in ("saving at step 1 failed", os.strerror(errno.EFBIG), "bytes needed", "the run failed after step 2"):
        assert said in log_of(child), said
    assert newest_state(tmp_path / "out") == step(tmp_path / "out", 2)
    assert list((tmp_path / "out" / "models").iterdir()) == [] and hidden(tmp_path / "out") == []


def test_a_folder_that_becomes_closed_is_named(built_once: Run, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("root may write anywhere")
    out = tmp_path / "out"

    def closing(one: Operation) -> None:
        if one.call == "rename" and one.path.endswith("step1.safetensors"):
            (out / "models").chmod(0o555)

    child, _ = watched(built_once, out, closing)
    try:
        assert child.wait() == 1 and os.strerror(errno.EACCES) in log_of(child)
    finally:
        (out / "models").chmod(0o755)
    assert newest_state(out) == step(out, 2)


@pytest.mark.slow
def test_a_failed_fsync_is_final_for_what_was_written(clean) -> None:
    run, operations, outs = clean
    syncs = [one for one in operations if one.call == "fsync"]
    assert len(syncs) == 9  # of the model, its folder, five files, the staging directory and its folder
    for one in [syncs[i] for i in (2, 7, 8)]:
        out = next(outs)
        child, seen = watched(run, out, failing(errno.EIO, lambda done, at=one.number: done.number == at), num_steps=3)
        assert child.wait() == 0, log_of(child)
        assert os.strerror(errno.EIO) in log_of(child) and newest_state(out) == step(out, 3) and hidden(out) == []
        failed = next(done for done in seen() if done.number == one.number and done.call != "say")
        staging = next((part for part in Path(failed.path).parts if part.startswith(".sdxl-train-")), None)
        if staging is not None:  # else it was the folder, after the rename
            later = [done.call for done in seen() if done.number > one.number and staging in done.path]
            assert set(later) <= {"unlink", "rmdir"}, "it is not synced again, nor given its final name"


def test_files_are_synced_before_the_rename_and_folders_after_it_and_older_saves_go_last(built_once: Run, tmp_path: Path) -> None:
    child, seen = watched(built_once, tmp_path / "out")
    assert child.wait() == 0, log_of(child)
    operations = seen()
    states, models = str(tmp_path / "out" / "train_state"), str(tmp_path / "out" / "models")
    position = {(one.call, one.path): i for i, one in enumerate(operations)}  # the last of its kind
    for number in (1, 2):
        final = f"{states}/model_ep1_step{number}"
        renamed = position["rename", final]
        staging = next(one.path for one in reversed(operations[:renamed]) if one.call == "fsync")
        assert Path(staging).parent == Path(states) and Path(staging).name.startswith(".sdxl-train-"), "the staging directory is synced last"
        files = [one.path for one in operations if one.call == "create" and one.path.startswith(f"{staging}/")]
        assert [Path(path).name for path in files][-1] == "manifest.json" and len(files) == 5
        for path in files:
            assert position["write", path] < position["fsync", path] < position["fsync", staging] < renamed
        assert max(position["fsync", path] for path in files) == position["fsync", f"{staging}/manifest.json"]
        announced = next(i for i, one in enumerate(operations) if one.call == "say" and one.path.startswith(f"saved {final} "))
        assert any(one == ("fsync", states) for one in ((one.call, one.path) for one in operations[renamed:announced]))
        model = f"{models}/model_ep1_step{number}.safetensors"
        before = operations[: position["rename", model]]
        assert before[-1].call == "fsync" and Path(before[-1].path).parent == Path(models)
        assert (operations[position["rename", model] + 1].call, operations[position["rename", model] + 1].path) == ("fsync", models)
        if number == 2:
            removals = [i for i, one in enumerate(operations) if one.call in ("unlink", "rmdir") and one.path.startswith(states)]
            assert len(removals) == 6 and min(removals) > announced
            assert position["unlink", f"{models}/model_ep1_step1.safetensors"] > next(
                i for i, one in enumerate(operations) if one.call == "say" and one.path.startswith(f"saved {model} ")
            )


def test_a_kill_while_an_older_state_is_removed_leaves_the_new_one_and_no_half_one(clean) -> None:
    run, _, outs = clean
    child, seen = watched(run, next(outs))
    assert child.wait() == 0
    announced = next(one.number for one in seen() if one.call == "say" and "train_state/model_ep1_step2" in one.path)
    removing = [one.number for one in seen() if one.number > announced and one.call in ("rename", "unlink", "rmdir")]
    assert len(removing) == 7  # a new name, five files, the directory
    for at in (removing[0], removing[2], removing[6]):
        out = next(outs)
        child, _ = watched(run, out, killing(lambda one, at=at: one.number == at))
        assert child.wait() == -9
        assert newest_state(out) == step(out, 2)
        assert [path for _, path in states_in(out) if state_faults(path)] == [] and len(hidden(out)) <= 1
        prepare_output_dir(out, fresh=False, now=datetime.now(), warn=print)
        assert hidden(out) == []


def check_kills_of_models(clean, number: int) -> None:
    run, operations, outs = clean
    renamed = next(one.number for one in operations if one.call == "rename")
    before = [one.number for one in operations if one.number < renamed]
    for at in [*random.Random(8).sample(before, number - 2), renamed, renamed + 1]:
        out = next(outs)
        child, _ = watched(run, out, killing(lambda one, at=at: one.number == at))
        assert child.wait() == -9
        assert model(out, 1).exists() and model(out, 2).exists() == (at > renamed)
        for path in (out / "models").glob("*.safetensors"):
            assert path.stat().st_size == max(info.end for info in read_header(str(path)).tensors.values())
        assert newest_state(out) == step(out, 1) and len(hidden(out)) <= 1


def test_a_model_is_whole_or_absent_wherever_its_writing_is_killed(clean) -> None:
    check_kills_of_models(clean, 3)


@pytest.mark.slow
def test_a_model_is_whole_or_absent_in_many_kills(clean) -> None:
    check_kills_of_models(clean, 40)


def check_kills_of_caches(forked_cli, config, pictures: Path, number: int) -> None:
    draw, file = random.Random(9), config()
    for _ in range(number):
        if len(list(pictures.glob("*.npz"))) > 4:  # else there is not enough left to be done
            for path in pictures.glob("*.npz"):
                path.unlink()
        before = {path.name: path.stat().st_mtime_ns for path in pictures.glob("*.npz")}
        at = draw.randrange(1, 25)
        child = forked_cli("cache", file, prepare=lambda at=at: Disk((pictures,), killing(lambda one: one.number == at)).install())
        assert child.wait() == -9, log_of(child)
        for path in pictures.glob("*.npz"):
            with np.load(path, allow_pickle=False) as arrays:
                assert all(np.isfinite(arrays[name]).all() for name in ("latents", "latents_flipped"))
        after = {path.name: path.stat().st_mtime_ns for path in pictures.glob("*.npz")}
        assert {name: after[name] for name in before} == before, "finished ones are kept"
    there = len(list(pictures.glob("*.npz")))
    child = forked_cli("cache", file)
    assert child.wait() == 0 and f"caches: {10 - there} written (0 of them" in log_of(child)


def test_a_cache_is_whole_or_absent_wherever_its_writing_is_killed(forked_cli, config, pictures: Path) -> None:
    check_kills_of_caches(forked_cli, config, pictures, 3)


@pytest.mark.slow
def test_a_cache_is_whole_or_absent_in_many_kills(forked_cli, config, pictures: Path) -> None:
    check_kills_of_caches(forked_cli, config, pictures, 50)


@pytest.mark.slow
def test_a_volume_that_is_too_small_is_refused_before_the_first_step(config, tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=24m tmpfs "$1"'
    alone = ["unshare", "--mount", "--map-root-user", "sh", "-c"] if os.geteuid() else ["unshare", "--mount", "sh", "-c"]
    out = tmp_path / "small"
    out.mkdir()
    if shutil.which("unshare") is None or subprocess.run([*alone, mount, "sh", out], capture_output=True).returncode:
        pytest.skip("no mount name spaces here")
    file = config(output_dir=str(out / "run"), optimizer_type="AdamW")
    command = [*alone, f'{mount} && shift && exec "$@"', "sh", out, sys.executable, "-m", "sdxl_train.cli", file]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    free, needed = (int(word) for word in ended.stderr.replace(";", " ").split() if word.isdigit() and len(word) > 6)
    # One model, and keep_train_states + 1 = 2 states of weights and two moments of the U-Net.
    assert free <= 24 << 20 < needed == pytest.approx(11.5e6 + 2 * 9.3e6, rel=0.05) and " 1/" not in ended.stderr


def test_a_second_training_in_the_folder_is_refused_and_a_lock_left_by_a_kill_taken_over(forked_cli, config, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nfrom sdxl_train import hookimpl\nclass Slow:\n    @hookimpl\n    def on_step_end(self, run):\n        time.sleep(60)\n"
    )
    first = forked_cli(config("first.toml", plugins=[f"{tmp_path}/slow.py:Slow"]))
    end = time.monotonic() + 60
    lock = tmp_path / "out" / ".lock"
    while not (lock.exists() and str(first.pid) in lock.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    second = forked_cli(config("second.toml", max_train_steps=1))
    assert second.wait() == 2 and f"process {first.pid} " in log_of(second)
    os.kill(first.pid, 9)
    assert first.wait() == -9
    third = forked_cli(config("third.toml", max_train_steps=1))
    assert third.wait() == 0, log_of(third)


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_every_file_of_a_run_has_the_mode_that_the_umask_leaves(forked_cli, config, tmp_path: Path, umask: int) -> None:
    child = forked_cli(config(max_train_steps=1), prepare=lambda: os.umask(umask))
    assert child.wait() == 0, log_of(child)
    for path in (tmp_path / "out").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert newest_state(tmp_path / "out") is not None


def test_a_linked_folder_is_trained_into_and_resumed_from_by_steps_whatever_the_clock_says(forked_cli, config, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    keys = {"save_every_n_steps": 1, "keep_train_states": 0}
    assert forked_cli(config("a.toml", max_train_steps=2, **keys)).wait() == 0
    states = states_in(tmp_path / "elsewhere")
    assert [number for number, _ in states] == [2, 1]
    for number, state in states:  # as if the clock had been set back between them
        os.utime(state / "manifest.json", (1e9 - number * 1000,) * 2)
    child = forked_cli(config("b.toml", max_train_steps=3, resume_from="latest", **(keys | {"keep_train_states": 2})))
    assert child.wait() == 0 and f"resuming: {tmp_path}/out/train_state/model_ep1_step2, after step 2" in log_of(child)
    assert sorted(path.name for path in (tmp_path / "elsewhere" / "train_state").iterdir()) == ["model_ep1_step2", "model_ep1_step3"]


BREAKS = """
import torch
from sdxl_train import hookimpl

class Breaks:
    '''Sets one weight to a value after step 2, before it is saved.'''
    value = float("nan")
    @hookimpl
    def on_step_end(self, run):
        if run.step == 2:
            with torch.no_grad():
                next(run.unet.parameters()).view(-1)[0] = self.value

class TooLarge(Breaks):
    value = 1e6
"""


@pytest.mark.parametrize("saved", ["save_model", "save_train_state"])
def test_weights_that_are_not_finite_are_not_saved_and_end_the_run(forked_cli, config, tmp_path: Path, saved: str) -> None:
    (tmp_path / "breaks.py").write_text(BREAKS)
    keys = {"save_model": False, "save_train_state": False, saved: True}
    child = forked_cli(config(plugins=[f"{tmp_path}/breaks.py:Breaks"], save_every_n_steps=1, **keys))
    assert child.wait() == 1 and "not finite" in log_of(child), log_of(child)
    kept = [path.name for folder in ("models", "train_state") for path in (tmp_path / "out").glob(f"{folder}/*")]
    assert kept == ["model_ep1_step1.safetensors" if saved == "save_model" else "model_ep1_step1"] and hidden(tmp_path / "out") == []
    if saved == "save_train_state":
        assert newest_state(tmp_path / "out") == step(tmp_path / "out", 1)


def test_a_model_that_does_not_fit_its_precision_ends_the_run_but_its_state_is_saved(forked_cli, config, tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(BREAKS)
    child = forked_cli(config(plugins=[f"{tmp_path}/breaks.py:TooLarge"], save_every_n_steps=1, save_precision="fp16"))
    assert child.wait() == 1 and "not finite in float16" in log_of(child)
    out = tmp_path / "out"
    assert newest_state(out) in (step(out, 2), step(out, 3))  # also the step that was being trained meanwhile
    assert list((out / "models").iterdir()) == [model(out, 1)]


def test_a_stop_right_after_a_resume_writes_the_state_of_that_step_not_again(forked_cli, config, tmp_path: Path) -> None:
    (tmp_path / "stop.py").write_text(
        "import os, signal\nfrom sdxl_train import hookimpl\nclass Stop:\n    @hookimpl\n    def on_train_start(self, run):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert forked_cli(config("a.toml", max_train_steps=1)).wait() == 0
    before = {path: path.stat().st_mtime_ns for path in sorted(step(tmp_path / "out", 1).iterdir())}
    child = forked_cli(config("b.toml", resume_from="latest", plugins=[f"{tmp_path}/stop.py:Stop"]))
    assert child.wait() == 143, log_of(child)
    assert {path: path.stat().st_mtime_ns for path in sorted(step(tmp_path / "out", 1).iterdir())} == before
    assert "saved " not in log_of(child) and newest_state(tmp_path / "out") == step(tmp_path / "out", 1)


def test_a_failed_last_periodic_save_is_exit_code_1(built_run, clean, tmp_path: Path) -> None:
    at = next(one.number for one in clean[1] if one.path.endswith("weights.safetensors"))
    run, out = built_run(save_on_train_end=False, save_on_exception=False), tmp_path / "out"
    child, _ = watched(run, out, failing(errno.ENOSPC, lambda one: one.number >= at))
    assert child.wait() == 1 and os.strerror(errno.ENOSPC) in log_of(child)
    assert newest_state(out) == step(out, 1)


def test_an_exported_file_has_the_names_shapes_and_dtypes_of_the_layout(forked_cli, config, tmp_path: Path, tiny_base: Path) -> None:
    child = forked_cli(config(max_train_steps=1, train_text_encoder=True, save_precision="float", gradient_checkpointing=True))
    assert child.wait() == 0, log_of(child)
    (model,) = (tmp_path / "out" / "models").iterdir()
    written, base = (read_header(str(path)).tensors for path in (model, tiny_base))
    assert {name: tuple(info.shape) for name, info in written.items()} == {name: tuple(info.shape) for name, info in base.items()}
    assert {info.dtype for name, info in written.items() if "position_ids" not in name} == {"F32"}
    assert not [name for name in written if "module." in name or "_orig_mod" in name]
