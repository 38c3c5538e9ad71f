"""Brings the batches of an epoch plan to the device, ahead of the steps that train them.

Loader processes choose texts, tokenise them and decode pictures; the main process adds stored latents and base noise, in another thread.
An entry of the plan carries all that decides what is drawn for it, so it makes no difference which process fetches it, or when.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from sdxl_train.data.batches import Batch, FetchedBatch, Fetcher, assemble
from sdxl_train.data.epoch_plan import BatchPlan
from sdxl_train.data.loader_processes import JOIN_S, FailedFetch, LoaderProcesses, WorkerDiedError, WorkerStuckError
from sdxl_train.keys import Config
from sdxl_train.model.tokenizer import PromptTokenizer
from sdxl_train.plugins import Plugins
from sdxl_train.text_display import shown

if TYPE_CHECKING:
    import torch

    from sdxl_train.data.index import Index
    from sdxl_train.data.latents import LatentStore

NUM_PREFETCHED = 2
POLL_S = 0.2
LIMIT_S = 300.0

log = logging.getLogger(__name__)


class BatchLoader:
    """Makes the batches of a run.

    With 0 workers everything happens in the caller's thread, because plain plugin functions may use the global generators.

    Args:
        plugins: used with 0 workers; each loader process makes its own instances of them.
        store: the latents to train from; None decodes pixels instead, which are to be encoded in each step.
        limit_s: so many seconds without a batch are an error; the attribute may be set at any time.
    """

    def __init__(
        self,
        index: Index,
        plugins: Plugins,
        config: Config,
        store: LatentStore | None,
        seed: int,
        device: torch.device | str,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._index = index
        self._store = store
        self._device = device
        self.limit_s = limit_s
        self._fetcher = Fetcher(index, plugins, PromptTokenizer(), config, seed, with_pixels=store is None)
        self.num_workers = min(config.max_dataloader_n_workers, (os.cpu_count() or 1) - 1)
        self._is_persistent = config.persistent_data_loader_workers and self.num_workers > 0
        if config.persistent_data_loader_workers and not self._is_persistent:
            log.info("persistent_data_loader_workers has no effect: there are no loader processes")
        self._kept: LoaderProcesses | None = None

    def batches(self, plan: Sequence[BatchPlan]) -> Generator[Batch, None, None]:
        """The batches of a plan, in its order, on the device. Closing the iterator early ends what was fetched ahead.

        Raises:
            PluginError, DataError: as `Fetcher` and `LatentStore.read` do, also from a loader process.
            WorkerDiedError, WorkerStuckError: a loader process does not work any more; all of them are ended then.
        """
        if self.num_workers == 0:
            for entry in plan:
                yield self._finish(self._fetcher(entry))
            return
        processes = self._kept or LoaderProcesses(self._fetcher, self.num_workers, self._is_persistent)
        self._kept = processes if self._is_persistent else None
        prefetch = _Prefetch(processes.fetch(plan), self._finish)
        works = True
        try:
            for entry in plan:
                yield self._next(prefetch, processes, entry)
        except (WorkerDiedError, WorkerStuckError):
            works = False
            raise
        finally:
            works = prefetch.stop(JOIN_S if works else 0) and works
            if not works:
                processes.kill()
            if not works or not self._is_persistent:
                processes.end()
                self._kept = None

    def close(self) -> None:
        """End the loader processes that are kept between epochs."""
        if self._kept is not None:
            self._kept.end()
            self._kept = None

    def _finish(self, fetched: FetchedBatch) -> Batch:
        return assemble(fetched, self._index, self._store).to(self._device)

    def _next(self, prefetch: _Prefetch, processes: LoaderProcesses, entry: BatchPlan) -> Batch:
        end = time.monotonic() + self.limit_s
        while True:
            try:
                return prefetch.next(POLL_S)
            except queue.Empty:
                processes.check()
            except RuntimeError:  # DataLoader's, for a process that ended
                processes.check(any_end=True)
                raise
            if time.monotonic() > end:
                processes.check(any_end=True)  # on a busy machine DataLoader may miss that a process left by itself
                keys = ", ".join(shown(self._index.key(datum)) for datum, _ in entry.data)
                raise WorkerStuckError(f"data loader: no batch for {self.limit_s:g} s; stuck at this one of epoch {entry.epoch}: {keys}")


class _Prefetch:
    """A thread that finishes fetched batches ahead of their use, at most `NUM_PREFETCHED` of them."""

    def __init__(self, fetched: Iterator[FetchedBatch | FailedFetch], finish: Callable[[FetchedBatch], Batch]) -> None:
        self._finish = finish
        self._ready: queue.Queue[Batch | FailedFetch | BaseException] = queue.Queue(NUM_PREFETCHED)
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(fetched,), name="prefetch", daemon=True)
        self._thread.start()

    def next(self, timeout_s: float) -> Batch:
        """The next batch.

        Raises:
            queue.Empty: it did not come in time.
        """
        ready = self._ready.get(timeout=timeout_s)
        if isinstance(ready, FailedFetch):
            ready.reraise()
        if isinstance(ready, BaseException):
            raise ready
        return ready

    def stop(self, wait_s: float) -> bool:
        """End the thread and drop what it holds; False if it has not ended in time, because it waits for a process."""
        self._is_stopped.set()
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _run(self, fetched: Iterator[FetchedBatch | FailedFetch]) -> None:
        try:
            for one in fetched:
                if not self._put(one if isinstance(one, FailedFetch) else self._finish(one)):
                    return
        except BaseException as error:  # for whoever waits for the batch
            del fetched  # the error's traceback would keep DataLoader's processes alive
            self._put(error)

    def _put(self, ready: Batch | FailedFetch | BaseException) -> bool:
        while not self._is_stopped.is_set():
            try:
                self._ready.put(ready, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False
