"""Lines of the table, CPU time, memory, and functions that run in a process of their own."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Goal:
    """
    Attributes:
        limit: what the line's value, or its ratio to the plain alternative, is held against.
        of_ratio: the ratio is meant.
        at_least: the limit is a lower one.
    """

    limit: float
    of_ratio: bool = False
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}{'x' if self.of_ratio else ''}"


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        metric: the goal it belongs to, "C4" ...
        what: what was measured.
        count: of how many data, pictures or batches.
        value: what was measured, in `unit`.
        plain: the plain alternative in the same unit, measured in the same run; None where there is none.
        plain_what: what the plain alternative is.
        goal: None for lines that only inform.
    """

    metric: str
    what: str
    count: int
    value: float
    unit: str
    plain: float | None = None
    plain_what: str = ""
    goal: Goal | None = None

    @property
    def ratio(self) -> float | None:
        """value / plain."""
        return self.value / self.plain if self.plain else None

    @property
    def is_met(self) -> bool | None:
        """None without a goal."""
        if self.goal is None:
            return None
        found = self.ratio if self.goal.of_ratio else self.value
        assert found is not None, "a goal of a ratio needs a plain alternative"
        return found >= self.goal.limit if self.goal.at_least else found <= self.goal.limit


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rows: data of the index (C4, C5, C6).
        repeats: interleaved repeats of what takes seconds; the median counts.
        fetches: batches that loader processes fetch (C6).
        latents, reads: cache files to choose from, and batches read (C7).
        photographs: pictures of each size (C8).
        pictures: pictures that are cached (C9).
        checked: pictures that are checked (C14).
        shrink: pictures and buckets of C7, C8 and C9 are so many times smaller in each direction.
    """

    rows: int = 1_000_000
    repeats: int = 3
    fetches: int = 400
    latents: int = 640
    reads: int = 300
    photographs: int = 3
    pictures: int = 96
    checked: int = 1000
    shrink: int = 1

    @classmethod
    def quick(cls) -> Sizes:
        """One repeat of everything, fewer pictures."""
        return cls(repeats=1, reads=100, photographs=1, pictures=48)

    @classmethod
    def tiny(cls) -> Sizes:
        """Only to see that it works; the times mean nothing."""
        return cls(rows=2000, repeats=1, fetches=4, latents=20, reads=3, photographs=1, pictures=8, checked=20, shrink=4)


def in_turn(times: int, ours: Callable[[], float], plain: Callable[[], float]) -> tuple[float, float]:
    """The medians of both; each is first in every other turn."""
    found: dict[Callable[[], float], list[float]] = {ours: [], plain: []}
    for turn in range(times):
        for work in (ours, plain) if turn % 2 else (plain, ours):
            found[work].append(work())
    return median(found[ours]), median(found[plain])


def in_own_process(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Call a function of a module in a fresh process: its memory and caches are its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **named).result()


def cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of this process, all threads and the system's part included."""
    start = time.process_time()
    work()
    return time.process_time() - start


def interleaved(repeats: int, ours: Callable[[], T], plain: Callable[[], U]) -> tuple[list[T], list[U]]:
    """The answers of both, called in turn so that a busy moment of the machine meets both."""
    ours_found, plain_found = zip(*[(ours(), plain()) for _ in range(repeats)], strict=True)
    return list(ours_found), list(plain_found)


class StepTimes:
    """CPU seconds of the functions of a module that other functions of the module call."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, float] = {}

    @contextmanager
    def of(self, module: Any, *names: str) -> Iterator[None]:
        """Measure these functions until the block ends."""
        given = {name: getattr(module, name) for name in names}
        for name, function in given.items():
            setattr(module, name, self._timed(name, function))
        try:
            yield
        finally:
            for name, function in given.items():
                setattr(module, name, function)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.process_time() - start

        return timed


@dataclass(frozen=True)
class PrivateMemory:
    """Bytes of a process that no other process shares.

    Attributes:
        dirty: written by it.
        clean: pages of mapped files, which the system may drop at any time.
    """

    dirty: int
    clean: int

    def __sub__(self, other: PrivateMemory) -> PrivateMemory:
        return PrivateMemory(self.dirty - other.dirty, self.clean - other.clean)


def private_memory(pid: int | None = None) -> PrivateMemory:
    """Of a process; None: of this one, once its garbage is collected. Linux only."""
    if pid is None:
        gc.collect()
    with open(f"/proc/{pid or 'self'}/smaps_rollup") as file:
        fields = {name: rest for name, _, rest in (line.partition(":") for line in file)}
    return PrivateMemory(*(1024 * int(fields[name].split()[0]) for name in ("Private_Dirty", "Private_Clean")))
