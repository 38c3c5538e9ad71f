"""Saving while the training goes on: a snapshot in the main thread, the files in another, the news back in the main thread.

One save is in flight at a time. A file or state is announced, by a line on stderr, once it has been read back; only then are older ones
removed. Plugins are told in the main thread, at the end of the next step.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdxl_train.check_files import model_bytes
from sdxl_train.errors import ConfigError
from sdxl_train.model.saving import NotSavedError, file_markers, file_metadata, save_checkpoint, written_faults
from sdxl_train.state_directory import STATES, discard, state_faults, states_in, step_of
from sdxl_train.train_state import Snapshot, Snapshotter, write_state

if TYPE_CHECKING:
    from sdxl_train.keys import Config
    from sdxl_train.model.single_file import Checkpoint
    from sdxl_train.run import Run

SUFFIX = ".safetensors"


@dataclass
class _Job:
    """One save, from the snapshot to the news of it."""

    step: int
    reason: str
    write: Callable[[], list[Path]]
    paths: list[Path] = field(default_factory=list)
    error: BaseException | None = None
    thread: threading.Thread | None = None

    def run(self) -> None:
        try:
            self.paths = self.write()
        except BaseException as error:  # for the main thread, which reports or raises it
            self.error = error


class Saves:
    """The saves of a run.

    Args:
        keys: `save_model`, `save_train_state`, `keep_models`, `keep_train_states`, `save_precision`, `output_name`.
        base: what a saved model takes from it.
    """

    def __init__(self, keys: Config, base: Checkpoint, output_dir: Path) -> None:
        self._keys = keys
        self._base = base
        self._output_dir = output_dir
        self._snapshotter = Snapshotter()
        self._job: _Job | None = None

    def is_saved(self, run: Run) -> bool:
        """Whether the present step is saved, or being saved."""
        return run.step in run.saved or (self._job is not None and self._job.step == run.step)

    def start(self, run: Run, reason: str) -> None:
        """Save the present step: wait for the save before, copy everything, and write it in another thread.

        Raises:
            NotSavedError: the disk has no room; nothing is begun.
        """
        self.finish(run)
        metadata = _metadata(run) if self._keys.save_model else {}
        snapshot = self._snapshotter.take(run)
        self._check_room(snapshot)
        markers = file_markers(self._keys.prediction_type, self._keys.zero_terminal_snr)
        console = run.parts.console

        def announce(path: Path) -> None:
            console.line(f"saved {path} ({reason})")

        job = _Job(run.step, reason, lambda: self._write(snapshot, metadata, markers, announce, console.warn))
        job.thread = threading.Thread(target=job.run, name="save", daemon=True)
        self._job = job
        job.thread.start()

    def poll(self, run: Run) -> None:
        """Tell of a save that has ended, without waiting. A failed one is logged and may be tried again at the next trigger."""
        if self._job is not None and self._job.thread is not None and not self._job.thread.is_alive():
            self.finish(run)

    def finish(self, run: Run, must_succeed: bool = False) -> None:
        """Wait for the save in flight, if there is one, and tell of it.

        Args:
            must_succeed: a failure is raised, in place of a warning.
        Raises:
            NotSavedError: the disk refused, with `must_succeed`.
            CheckpointError: the weights are not finite.
        """
        job, self._job = self._job, None
        if job is None:
            return
        assert job.thread is not None
        job.thread.join()
        if job.error is not None:
            if must_succeed or not isinstance(job.error, NotSavedError):
                raise job.error
            run.parts.console.warn(f"saving at step {job.step} failed, and will be tried again at the next trigger: {job.error}")
            return
        for path in job.paths:
            run.saved.setdefault(job.step, path)
            if path.suffix == SUFFIX:
                run.parts.hooks.on_save(run=run, path=path, reason=job.reason)

    def _write(
        self,
        snapshot: Snapshot,
        metadata: dict[str, str],
        markers: tuple[str, ...],
        announce: Callable[[Path], None],
        warn: Callable[[str], None],
    ) -> list[Path]:
        """In the other thread: write, read back, announce, prune. The paths, the model first."""
        paths = []
        try:
            if self._keys.save_model:
                paths.append(self._write_model(snapshot, metadata, markers))
                announce(paths[-1])
            if self._keys.save_train_state:
                paths.append(self._write_state(snapshot))
                announce(paths[-1])
        except OSError as error:
            raise NotSavedError(f"{error.filename or self._output_dir}: {os.strerror(error.errno) if error.errno else error}") from error
        try:
            self._prune(snapshot.step)
        except OSError as error:
            warn(f"an older save cannot be removed: {error.filename}: {error.strerror}")
        return paths

    def _write_model(self, snapshot: Snapshot, metadata: dict[str, str], markers: tuple[str, ...]) -> Path:
        path = self._output_dir / "models" / f"{snapshot.name}{SUFFIX}"
        tensors = save_checkpoint(path, self._base, snapshot.weights, self._keys.save_precision, metadata, markers)
        faults = written_faults(path, tensors)
        if faults:
            raise NotSavedError(f"{path} does not hold what was written: {'; '.join(faults)}")
        return path

    def _write_state(self, snapshot: Snapshot) -> Path:
        path = self._output_dir / STATES / snapshot.name
        try:
            write_state(snapshot, path)
        except OSError as error:
            raise NotSavedError(f"{path}: cannot be saved: {_cause(error, snapshot.num_bytes, self._output_dir)}") from error
        faults = state_faults(path)
        if faults:
            raise NotSavedError(f"{path} does not hold what was written: {'; '.join(faults)}")
        return path

    def _prune(self, step: int) -> None:
        """Remove what is older than the newest `keep_*` saves of this line, now that the one of `step` is verified."""
        keys = self._keys
        if keys.save_train_state and keys.keep_train_states:
            kept = 1  # the one of this step, which has just been verified
            for found, path in states_in(self._output_dir):  # the newest first
                if found >= step or step_of(path.name) != (keys.output_name, found):
                    continue
                if kept >= keys.keep_train_states:
                    discard(path)
                elif not state_faults(path):
                    kept += 1
        if keys.save_model and keys.keep_models:
            models = [(step_of(path.stem), path) for path in (self._output_dir / "models").glob(f"*{SUFFIX}")]
            own = sorted(((found[1], path) for found, path in models if found and found[0] == keys.output_name), reverse=True)
            for _, path in own[keys.keep_models :]:
                discard(path)

    def _check_room(self, snapshot: Snapshot) -> None:
        needed = model_bytes(self._base, self._keys.save_precision) if self._keys.save_model else 0
        needed += snapshot.num_bytes if self._keys.save_train_state else 0
        free = shutil.disk_usage(self._output_dir).free
        if free < needed:
            raise NotSavedError(f"{self._output_dir}: {os.strerror(errno.ENOSPC)}: {needed} bytes needed, {free} free")


def _cause(error: OSError, needed: int, folder: Path) -> str:
    what = os.strerror(error.errno) if error.errno else str(error)
    return f"{what}; {needed} bytes needed, {shutil.disk_usage(folder).free} free"


def _metadata(run: Run) -> dict[str, str]:
    """The metadata of the model file, also what plugins add.

    Raises:
        ConfigError: an entry is given twice.
    """
    keys = run.parts.keys
    metadata = file_metadata(
        step=run.step,
        epoch=run.epoch_of_step,
        prediction_type=keys.prediction_type,
        zero_terminal_snr=keys.zero_terminal_snr,
        title=keys.output_name,
        resolution=keys.resolution,
    )
    answers = cast(list[dict[str, Any]], run.parts.hooks.checkpoint_metadata(run=run))  # a collect: one answer a plugin
    for entries in answers:
        twice = metadata.keys() & entries.keys()
        if twice:
            raise ConfigError(f"checkpoint_metadata: two plugins, or a plugin and the trainer, give {', '.join(sorted(twice))}")
        metadata |= entries
    return metadata

