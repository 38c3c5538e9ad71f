"""C11: how long a save stops the training, and how long it takes until it is on the disk, beside plain copies of the same bytes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from made_data import captioned_pictures
from made_run import TrainerSteps, batches_of, made_run
from measuring import Goal, Line, in_own_process, in_turn
from torch import Tensor

from sdxl_train.model.tiny import tiny_architecture
from sdxl_train.saves import Saves
from sdxl_train.train_state import Snapshot, Snapshotter, write_state

_SIDE = 64  # px
_MB = 1e6


def saving_lines(folder: Path, repeats: int, is_tiny: bool) -> Iterator[Line]:
    """Wall time: most of it is spent in waiting for memory and disk."""
    size, stopped, copied, written, raw = in_own_process(time_saving, folder, repeats, is_tiny)
    what = f"of {size:.0f} MB: weights, AdamW's means"
    yield Line("C11", f"training stopped by a save {what}", repeats, stopped, "wall ms", copied, "memcpy", Goal(1.3, of_ratio=True))
    what = f"train state {what}, hashed and synced"
    yield Line("C11", what, repeats, written, "wall ms", raw, "raw write, fsync", Goal(1.35, of_ratio=True))


# ---- this runs in a process of its own ----


def time_saving(folder: Path, repeats: int, is_tiny: bool) -> tuple[float, float, float, float, float]:
    """MB of a state; median wall ms in which a save stops the training, of copying its bytes, of writing the state and its bytes alone."""
    torch.set_num_threads(1)
    channels = (16, 32, 32) if is_tiny else (128, 256, 512)
    images = captioned_pictures(folder, (_SIDE, _SIDE), 4)
    keys = {"cpu": True, "resolution": _SIDE, "batch_size": 4, "max_dataloader_n_workers": 0, "optimizer_type": "AdamW"}
    run = made_run(folder / "saved", tiny_architecture(unet_channels=channels), images, **keys)
    run.parts.hooks.on_train_start(run=run)
    TrainerSteps(run, batches_of(run, 1))()  # now the optimizer has a state

    snapshot = Snapshotter().take(run, with_state=True)
    tensors = [tensor for values in (*snapshot.weights.values(), *snapshot.tensors.values()) for tensor in values.values()]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    saves = Saves(run.parts.keys.model_copy(update={"save_train_state": True}), run.parts.base, folder / "kept")
    (folder / "kept").mkdir()

    def stop() -> Callable[[], object]:
        run.step += 1
        saves.start(run, "measured")
        return lambda: saves.finish(run, must_succeed=True)

    def copy() -> Callable[[], object]:
        for tensor, space in zip(tensors, copies, strict=True):
            space.copy_(tensor)
        return lambda: None

    stopped, copied = _both_wall_ms(repeats, stop, copy)
    written, raw = _both_wall_ms(repeats, lambda: _written(snapshot, folder / "state"), lambda: _raw(tensors, folder / "raw"))
    return snapshot.num_bytes / _MB, stopped, copied, written, raw


def _written(snapshot: Snapshot, path: Path) -> Callable[[], object]:
    write_state(snapshot, path)
    return lambda: shutil.rmtree(path)


def _raw(tensors: list[Tensor], path: Path) -> Callable[[], object]:
    with open(path, "wb", buffering=0) as file:
        for tensor in tensors:
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
    return path.unlink


def _both_wall_ms(repeats: int, ours: Callable[[], Callable[[], object]], plain: Callable[[], Callable[[], object]]) -> tuple[float, float]:
    """Medians; what a work returns is done afterwards, unmeasured. Each is done once before, which does not count."""
    for work in (ours, plain):
        _wall_ms(work)
    return in_turn(repeats, lambda: _wall_ms(ours), lambda: _wall_ms(plain))


def _wall_ms(work: Callable[[], Callable[[], object]]) -> float:
    start = time.perf_counter()
    clear = work()
    taken = 1000 * (time.perf_counter() - start)
    clear()
    return taken
