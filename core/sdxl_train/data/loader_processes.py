"""The processes that fetch batches: torch's DataLoader over an epoch plan, and what it lacks when a process fails or dies."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from sdxl_train.data.batches import FetchedBatch, Fetcher
from sdxl_train.data.epoch_plan import BatchPlan

JOIN_S = 5.0


class WorkerDiedError(RuntimeError):
    """A loader process ended by itself, or was killed."""


class WorkerStuckError(RuntimeError):
    """No batch came for so long that a loader process must be stuck."""


class _LoaderTraceback(Exception):  # noqa: N818
    """Shown as the cause of an exception from a loader process: its traceback there, as text."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


@dataclass(frozen=True)
class FailedFetch:
    """An exception on its way from a loader process; DataLoader's own way would change its message."""

    error: Exception
    trace: str

    @classmethod
    def of(cls, error: Exception) -> FailedFetch:
        trace = "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # whatever a foreign exception class does when it is pickled
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(error, trace)

    def reraise(self) -> NoReturn:
        raise self.error from _LoaderTraceback(self.trace)


class LoaderProcesses:
    """Loader processes that fetch the entries of a plan, `num_workers` of them. They start with the first plan.

    They are forked on Linux and spawned elsewhere, form no part of the terminal's process group, and ignore Ctrl-C.
    """

    def __init__(self, fetcher: Fetcher, num_workers: int, stay_alive: bool) -> None:
        """
        Args:
            stay_alive: the processes outlive a plan and fetch the next one too.
        """
        import torch
        from torch.utils.data import DataLoader

        self._sampler = _PlanSampler()
        dataset: Any = _Dataset(fetcher)
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._sampler,
            num_workers=num_workers,
            persistent_workers=stay_alive,
            collate_fn=_as_it_is,
            worker_init_fn=_start_process,
            multiprocessing_context="fork" if sys.platform == "linux" else "spawn",
            generator=torch.Generator(),  # else it would draw from the global one
        )
        self._processes: list[BaseProcess] = []

    def fetch(self, plan: Sequence[BatchPlan]) -> Iterator[FetchedBatch | FailedFetch]:
        """Start on a plan. Call it in the main thread; the iterator may be used in another."""
        assert self._loader is not None
        self._sampler.plan = plan
        before = set(multiprocessing.active_children())
        with _no_sigchld_handler():
            fetched = iter(self._loader)
        self._processes += [process for process in multiprocessing.active_children() if process not in before]
        return fetched

    @property
    def pids(self) -> list[int]:
        """The process ids of all processes started so far."""
        return [process.pid for process in self._processes if process.pid is not None]

    def check(self, any_end: bool = False) -> None:
        """
        Args:
            any_end: a process that ended with exit code 0 is a failure too.
        Raises:
            WorkerDiedError: a process was killed or failed.
        """
        for process in self._processes:
            code = process.exitcode
            if code is None or (code == 0 and not any_end):
                continue
            if code < 0:
                what = f"worker killed (out of memory?): process {process.pid} got {signal.Signals(-code).name}"
            else:
                what = f"worker ended: process {process.pid}, exit code {code}"
            raise WorkerDiedError(
                f"data loader: {what}; a smaller max_dataloader_n_workers or batch_size needs less memory, "
                "and max_dataloader_n_workers = 0 loads in the main process"
            )

    def kill(self) -> None:
        """End the processes at once, also stopped ones."""
        for process in self._processes:
            process.kill()

    def end(self) -> None:
        """End the processes and wait for them."""
        self._loader = None  # DataLoader ends its processes when the last reference to it goes
        for process in self._processes:
            if process.is_alive():
                process.terminate()
            process.join(JOIN_S)
            if process.is_alive():
                process.kill()
                process.join(JOIN_S)


class _PlanSampler:
    """Gives DataLoader the entries of the plan themselves in place of numbers, so that all they say travels to the process."""

    plan: Sequence[BatchPlan] = ()

    def __iter__(self) -> Iterator[BatchPlan]:
        return iter(self.plan)

    def __len__(self) -> int:
        return len(self.plan)


class _Dataset:
    """What DataLoader copies into each process; there it gets plugin instances of its own."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._given = fetcher
        self._own: Fetcher | None = None

    def __getitem__(self, entry: BatchPlan) -> FetchedBatch | FailedFetch:
        try:
            if self._own is None:
                self._own = self._given.rebuilt()
            return self._own(entry)
        except Exception as error:
            return FailedFetch.of(error)


def _as_it_is(fetched: object) -> object:
    return fetched


def _start_process(_: int) -> None:
    """First thing in a loader process: torch has already set one thread."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # a signal to the group of the terminal or the launcher is for the main process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"  # for libraries that are loaded from here on
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def _no_sigchld_handler() -> Iterator[None]:
    """Take back the handler that torch installs: it raises in whatever the main thread does when a process dies, even in a save."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
