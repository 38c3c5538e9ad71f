"""Saving while the training goes on: a snapshot in the main thread, the files in another, the news back in the main thread.

One save is in flight at a time. A file or state is announced, by a line on stderr, once it has been read back; only then are older ones
of its kind removed. Plugins are told in the main thread, at the end of the next step. Where the model cannot be saved the state still is.
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
from sdxl_train.errors import CheckpointError, ConfigError
from sdxl_train.model.saving import NotSavedError, file_markers, file_metadata, save_checkpoint, written_faults
from sdxl_train.state_directory import STATES, discard, state_faults, states_in, step_of
from sdxl_train.train_state import Snapshot, Snapshotter, save_name, write_state

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
    write: Callable[[list[Path]], None]
    paths: list[Path] = field(default_factory=list)  # what is announced
    error: BaseException | None = None
    thread: threading.Thread | None = None

    def run(self) -> None:
        try:
            self.write(self.paths)
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
        self._failure: NotSavedError | None = None  # of the newest save
        self._resumed_step: int | None = None
        self._verified: set[Path] = set()  # states that this process has read back
        self._told: set[Path] = set()

    def is_saved(self, run: Run) -> bool:
        """Whether the present step is saved, or being saved, or the one that was resumed from in this folder."""
        return run.step in run.saved or run.step == self._resumed_step or (self._job is not None and self._job.step == run.step)

    def resumed_from(self, run: Run, state: Path) -> None:
        """The run goes on from this state: where it is one of this folder, it is not written again."""
        if state.resolve() == (self._output_dir / STATES / save_name(run)).resolve():
            self._resumed_step = run.step

    def start(self, run: Run, reason: str) -> None:
        """Save the present step: wait for the save before, copy everything, and write it in another thread.

        Raises:
            NotSavedError: the disk has no room; nothing is begun.
        """
        self.finish(run)
        metadata = _metadata(run) if self._keys.save_model else {}
        snapshot = self._snapshotter.take(run, with_state=self._keys.save_train_state)
        try:
            self._check_room(snapshot)
        except NotSavedError as error:
            self._failure = error
            raise
        markers = file_markers(self._keys.prediction_type, self._keys.zero_terminal_snr)
        console = run.parts.console

        def announce(path: Path) -> None:
            console.line(f"saved {path} ({reason})")

        def write_model() -> Path:
            return self._write_model(snapshot, metadata, markers)

        job = _Job(run.step, reason, lambda written: self._write(snapshot, write_model, announce, console.warn, written))
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
        self._failure = job.error if isinstance(job.error, NotSavedError) else None
        if job.error is None:
            run.saved.setdefault(job.step, job.paths[0])
        for path in job.paths:
            if path.suffix == SUFFIX and path not in self._told:
                self._told.add(path)
                run.parts.hooks.on_save(run=run, path=path, reason=job.reason)
        if job.error is not None:
            if must_succeed or not isinstance(job.error, NotSavedError):
                raise job.error
            run.parts.console.warn(f"saving at step {job.step} failed, and will be tried again at the next trigger: {job.error}")

    def refuse_failure(self) -> None:
        """At the end of the training: the newest save was not one that failed.

        Raises:
            NotSavedError: it was.
        """
        if self._failure is not None:
            raise self._failure

    def _write(
        self,
        snapshot: Snapshot,
        write_model: Callable[[], Path],
        announce: Callable[[Path], None],
        warn: Callable[[str], None],
        written: list[Path],
    ) -> None:
        """In the other thread, the model first, then the state: write, read back, announce, prune.

        Args:
            written: gets each path.
        Raises:
            CheckpointError: what kept a file from being written, after all others were.
        """
        keys = self._keys
        failures: list[CheckpointError] = []
        for is_wanted, write, prune in (
            (keys.save_model, write_model, self._prune_models),
            (keys.save_train_state, lambda: self._write_state(snapshot), lambda: self._prune_states(snapshot.step)),
        ):
            if not is_wanted:
                continue
            try:
                path = write()
            except OSError as error:
                failures.append(NotSavedError(f"{error.filename or self._output_dir}: {_reason(error)}"))
                continue
            except CheckpointError as error:
                failures.append(error)
                continue
            announce(path)
            written.append(path)
            try:
                prune()
            except OSError as error:
                warn(f"an older save cannot be removed: {error.filename}: {error.strerror}")
        # What a later try would meet again comes first.
        failures.sort(key=lambda failure: isinstance(failure, NotSavedError))
        if failures:
            raise type(failures[0])("; ".join(map(str, failures))) from failures[0]

    def _write_model(self, snapshot: Snapshot, metadata: dict[str, str], markers: tuple[str, ...]) -> Path:
        path = self._output_dir / "models" / f"{snapshot.name}{SUFFIX}"
        tensors = save_checkpoint(path, self._base, snapshot.weights, self._keys.save_precision, metadata, markers)
        faults = written_faults(path, tensors)
        if faults:
            raise NotSavedError(f"{path} does not hold what was written: {'; '.join(faults)}")
        return path

    def _write_state(self, snapshot: Snapshot) -> Path:
        path = self._output_dir / STATES / snapshot.name
        if path.exists() and not state_faults(path):  # of this step, in this line: to replace it could only lose it
            return path
        try:
            write_state(snapshot, path)
        except OSError as error:
            raise NotSavedError(f"{path}: cannot be saved: {self._cause(error, snapshot.num_bytes)}") from error
        faults = state_faults(path)
        if faults:
            raise NotSavedError(f"{path} does not hold what was written: {'; '.join(faults)}")
        self._verified.add(path)
        return path

    def _prune_states(self, step: int) -> None:
        """Remove what is older than the newest `keep_train_states` states of this line, now that the one of `step` is verified."""
        keys, kept = self._keys, 1  # the one of this step
        for found, path in states_in(self._output_dir):  # the newest first
            if found >= step or step_of(path.name) != (keys.output_name, found) or not keys.keep_train_states:
                continue
            if kept >= keys.keep_train_states:
                discard(path)
            elif path in self._verified or not state_faults(path):
                self._verified.add(path)
                kept += 1

    def _prune_models(self) -> None:
        """Remove all but the newest `keep_models` models of this line, now that the newest is verified."""
        if not self._keys.keep_models:
            return
        models = [(step_of(path.stem), path) for path in (self._output_dir / "models").glob(f"*{SUFFIX}")]
        own = sorted(((found[1], path) for found, path in models if found and found[0] == self._keys.output_name), reverse=True)
        for _, path in own[self._keys.keep_models :]:
            discard(path)

    def _check_room(self, snapshot: Snapshot) -> None:
        needed = model_bytes(self._base, self._keys.save_precision) if self._keys.save_model else 0
        needed += snapshot.num_bytes if self._keys.save_train_state else 0
        try:
            free = shutil.disk_usage(self._output_dir).free
        except OSError as error:  # it was unmounted or removed; it may come back
            raise NotSavedError(f"{self._output_dir}: cannot be saved to: {_reason(error)}") from error
        if free < needed:
            raise NotSavedError(f"{self._output_dir}: {os.strerror(errno.ENOSPC)}: {needed} bytes needed, {free} free")

    def _cause(self, error: OSError, needed: int) -> str:
        try:
            free = f"{shutil.disk_usage(self._output_dir).free} free"
        except OSError as unknown:
            free = f"the free ones are not known ({_reason(unknown)})"
        return f"{_reason(error)}; {needed} bytes needed, {free}"


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


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
