"""The loader: the same batches whoever fetches them, processes that end when they should, and errors that say what happened."""

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from made_index import made_index
from PIL import Image

from sdxl_train.data.epoch_plan import epoch_plan
from sdxl_train.data.index import Index
from sdxl_train.data.loader import BatchLoader
from sdxl_train.data.loader_processes import WorkerDiedError, WorkerStuckError
from sdxl_train.errors import DataError, PluginError
from sdxl_train.keys import Config
from sdxl_train.plugins import Choice, Plugins

PROCESSORS = """
import os, random as global_random, signal, time

def shuffle(img_info, **kwargs):
    tags = img_info.caption.split(", ")
    kwargs["random"].shuffle(tags)
    return ", ".join(tags)

def global_shuffle(img_info, **kwargs):
    tags = img_info.caption.split(", ")
    global_random.shuffle(tags)
    return ", ".join(tags)

def process_id(img_info, **kwargs):
    return f"{os.getpid()} {os.getpgid(0)} {signal.getsignal(signal.SIGINT)}"

def fail_at_p5(img_info, **kwargs):
    if img_info.key == "p5":
        raise ValueError("five is right out")
    return img_info.caption

def kill_at_p5(img_info, **kwargs):
    if img_info.key == "p5":
        os.kill(os.getpid(), signal.SIGKILL)
    return img_info.caption

def leave_at_p5(img_info, **kwargs):
    if img_info.key == "p5":
        os._exit(0)
    return img_info.caption

def stop_at_p5(img_info, **kwargs):
    if img_info.key == "p5":
        time.sleep(0.5)  # another thread still sends the batch before
        os.kill(os.getpid(), signal.SIGSTOP)
    return img_info.caption
"""


class StoredLatents:
    """Latents whose value is the datum, negative when flipped."""

    def read(self, data, flipped):
        signs = [-1.0 if flip else 1.0 for flip in flipped]
        values = torch.tensor([sign * (datum + 1) for datum, sign in zip(data, signs, strict=True)])
        return values[:, None, None, None].expand(-1, 4, 8, 8).clone()


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Eight pictures of 64x64, p0 ... p7, the first of them trained three times an epoch."""
    keys = [f"p{i}" for i in range(8)]
    for i, key in enumerate(keys):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"{key}.png")
    rows = {key: {"caption": f"{key}, a, b, c, d, e"} for key in keys}
    sizes = np.full((8, 2), 64)
    return made_index(rows, [str(tmp_path / f"{key}.png") for key in keys], sizes, sizes, num_repeats=[3, 1, 1, 1, 1, 1, 1, 1])


@pytest.fixture
def make_loader(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "processors.py"
    file.write_text(PROCESSORS)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    made: list[BatchLoader] = []

    def make(workers: int, processor: str = "shuffle", store: object | None = None, limit_s: float = 60.0, **changed) -> BatchLoader:
        given = {"pretrained_model_name_or_path": "base", "image_dirs": ["images"], "output_dir": "out", "max_token_length": 75}
        config = Config(**(given | {"max_dataloader_n_workers": workers} | changed))
        plugins = Plugins([Choice("caption_processor", f"{file}:{processor}")], seed=0)
        made.append(BatchLoader(index, plugins, config, store, 0, "cpu", limit_s))  # pyright: ignore[reportArgumentType]
        return made[-1]

    yield make
    for loader in made:
        loader.close()
    assert not multiprocessing.active_children()


def prefetch_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "prefetch"}


def samples(loader: BatchLoader, index: Index, epoch: int, batch_size: int = 3) -> dict[bytes, tuple]:
    """Everything drawn for each sample of an epoch, by the sample's place."""
    drawn = {}
    for batch in loader.batches(epoch_plan(index, 0, epoch, batch_size)):
        content = batch.latents if batch.latents is not None else batch.pixels
        assert content is not None
        for row, place in enumerate(batch.places):
            tensors = batch.noise[row], content[row], batch.te1_ids[row], batch.te2_ids[row]
            drawn[place] = (batch.keys[row], batch.captions[row], batch.flipped[row], *(tensor.numpy().tobytes() for tensor in tensors))
    return drawn


@pytest.mark.parametrize("store", [None, StoredLatents()], ids=["pixels", "latents"])
def test_draws_are_the_same_for_any_number_of_workers_and_any_batch_size(make_loader, index, store):
    expected = samples(make_loader(0, store=store), index, 1)
    assert len(expected) == 10
    assert {place[2] for place in expected.values()} == {True, False}
    for workers in (1, 2):
        assert samples(make_loader(workers, store=store), index, 1) == expected
    assert samples(make_loader(2, store=store), index, 1, batch_size=5) == expected


def test_a_plain_function_with_global_draws_is_the_same_in_a_worker(make_loader, index):
    assert samples(make_loader(0, "global_shuffle"), index, 1) == samples(make_loader(1, "global_shuffle"), index, 1)


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (1, True)])
def test_another_epoch_draws_anew_also_in_persistent_workers(make_loader, index, workers, persistent):
    loader = make_loader(workers, persistent_data_loader_workers=persistent)
    first, second = samples(loader, index, 1), samples(loader, index, 2)
    assert not set(first) & set(second)
    assert sorted(sample[0] for sample in first.values()) == sorted(sample[0] for sample in second.values())
    assert second == samples(make_loader(0), index, 2)


def test_batches_come_in_the_order_of_the_plan(make_loader, index):
    plan = epoch_plan(index, 0, 1, 2)
    expected = [[index.key(datum) for datum, _ in entry.data] for entry in plan]
    for workers in (0, 2):
        loader = make_loader(workers)
        assert [batch.keys for batch in loader.batches(plan)] == expected
        assert [batch.keys for batch in loader.batches(plan[2:])] == expected[2:]  # as a resumed epoch does


def test_latents_are_those_of_datum_and_orientation(make_loader, index):
    for batch in make_loader(1, store=StoredLatents()).batches(epoch_plan(index, 0, 1, 3)):
        signs = torch.tensor([-1.0 if flipped else 1.0 for flipped in batch.flipped])
        expected = 0.13025 * signs * (torch.tensor(batch.data) + 1)
        assert batch.latents is not None and batch.pixels is None
        torch.testing.assert_close(batch.latents[:, 0, 0, 0], expected)


@pytest.mark.parametrize("persistent", [False, True])
def test_persistent_workers_keep_their_processes_and_others_do_not(make_loader, index, persistent):
    loader = make_loader(2, "process_id", persistent_data_loader_workers=persistent)
    epochs = [{sample[1] for sample in samples(loader, index, epoch).values()} for epoch in (1, 2)]
    assert all(len(pids) == 2 for pids in epochs)
    assert (epochs[0] == epochs[1]) is persistent


def test_workers_have_their_own_process_group_and_ignore_ctrl_c(make_loader, index):
    for sample in samples(make_loader(1, "process_id"), index, 1).values():
        pid, group, handler = sample[1].split(maxsplit=2)
        assert pid == group != str(os.getpgid(0))
        assert handler == str(signal.SIG_IGN)


@pytest.mark.parametrize(("asked", "cpus", "expected"), [(4, 3, 2), (1, 3, 1), (4, 1, 0), (0, 8, 0)])
def test_workers_are_at_most_the_cpu_count_minus_one(make_loader, monkeypatch, asked, cpus, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    assert make_loader(asked).num_workers == expected


def test_persistent_workers_without_workers_are_noted_and_ignored(make_loader, index, caplog):
    caplog.set_level("INFO")
    loader = make_loader(0, persistent_data_loader_workers=True)
    assert "persistent_data_loader_workers has no effect" in caplog.text
    assert len(samples(loader, index, 1)) == 10


@pytest.mark.parametrize("persistent", [False, True])
def test_an_iterator_closed_early_leaves_no_thread_and_no_process(make_loader, index, persistent):
    loader = make_loader(2, persistent_data_loader_workers=persistent)
    before = prefetch_threads()
    batches = loader.batches(epoch_plan(index, 0, 1, 1))
    next(batches)
    assert len(prefetch_threads() - before) == 1
    batches.close()
    assert not prefetch_threads() - before
    assert len(multiprocessing.active_children()) == (2 if persistent else 0)
    assert samples(loader, index, 2) == samples(make_loader(0), index, 2)  # nothing of epoch 1 is left over


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_leaves_the_global_generators_and_signal_handlers_alone(make_loader, index, workers):
    def state() -> tuple:
        states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
        return *map(hash, states), signal.getsignal(signal.SIGCHLD)

    before = state()
    samples(make_loader(workers, "global_shuffle"), index, 1)
    assert state() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_plugin_keeps_its_class_and_names_plugin_and_datum(make_loader, index, workers):
    with pytest.raises(PluginError) as caught:
        samples(make_loader(workers, "fail_at_p5"), index, 1)
    assert "fail_at_p5" in str(caught.value) and "'p5'" in str(caught.value)
    assert str(caught.value).endswith("ValueError: five is right out")
    if workers:
        assert "processors.py" in str(caught.value.__cause__)  # the traceback of the process


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_became_bad_is_named(make_loader, index, workers):
    Path(index.image_path(4)).unlink()
    with pytest.raises(DataError, match=r"p4\.png"):
        samples(make_loader(workers), index, 1)


def test_an_error_of_the_store_reaches_the_consumer(make_loader, index):
    class BrokenStore:
        def read(self, data, flipped):
            raise DataError("p1.npz: cut short")

    with pytest.raises(DataError, match=r"p1\.npz: cut short"):
        samples(make_loader(1, store=BrokenStore()), index, 1)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_killed_worker_is_an_error_that_says_what_helps(make_loader, index, persistent):
    with pytest.raises(WorkerDiedError, match=r"worker killed \(out of memory\?\).*SIGKILL.*max_dataloader_n_workers"):
        samples(make_loader(2, "kill_at_p5", persistent_data_loader_workers=persistent), index, 1)


def test_the_main_thread_is_not_interrupted_when_a_worker_dies(make_loader, index):
    batches = make_loader(1).batches(epoch_plan(index, 0, 1, 1))
    next(batches)
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGKILL)
    time.sleep(0.3)  # as in the middle of a save: torch's own handler would raise here
    with pytest.raises(WorkerDiedError):
        list(batches)


def test_a_worker_that_ends_with_code_0_is_an_error_too(make_loader, index):
    with pytest.raises(WorkerDiedError, match=r"worker ended.*exit code 0"):
        samples(make_loader(1, "leave_at_p5", limit_s=20.0), index, 1)  # found by DataLoader, which looks every 5 s, or at the limit


def test_a_stuck_worker_is_an_error_that_names_the_batch_and_ends_the_worker(make_loader, index):
    with pytest.raises(WorkerStuckError, match=r"no batch for 4 s.*epoch 1.*p5"):
        list(batches_of_a_started_worker(make_loader, index, "stop_at_p5", limit_s=4.0))


def test_a_worker_that_left_before_dataloader_looks_is_named_at_the_limit(make_loader, index):
    with pytest.raises(WorkerDiedError, match=r"worker ended.*exit code 0"):
        list(batches_of_a_started_worker(make_loader, index, "leave_at_p5", limit_s=2.0))  # DataLoader looks after 5 s


def batches_of_a_started_worker(make_loader, index, processor, limit_s):
    """What follows the first batch; only from there on the limit counts, since a busy machine may start a process slowly."""
    loader = make_loader(1, processor, limit_s=60.0)
    batches = loader.batches(epoch_plan(index, 0, 1, 1))
    next(batches)
    loader.limit_s = limit_s
    return batches
