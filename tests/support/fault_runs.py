"""Trainings in forked processes whose file system fails, or whose life ends, at a chosen operation; what they leave behind.

A fork of a process that has imported torch and built a run costs a few milliseconds, so hundreds of trials are cheap.
"""

import builtins
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_train.loop import train
from sdxl_train.saves import Saves
from sdxl_train.state_directory import state_faults, states_in

Act = Callable[["Operation"], None]


@dataclass(frozen=True)
class Operation:
    """One thing done to a file: create, write, fsync, rename, unlink, rmdir or mkdir; `number` counts from 1. Or "say", of the same number."""

    number: int
    call: str
    path: str


@dataclass
class Disk:
    """Sees what this process does to files in these folders, and lets `act` fail it (by OSError) or end the process, before it is done.

    Attributes:
        folders: whatever lies below one of them is seen.
        seen: what was done, in order.
    """

    folders: tuple[Path, ...]
    act: Act = lambda operation: None
    seen: list[Operation] = field(default_factory=list)
    _paths: dict[int, str] = field(default_factory=dict)
    _count: int = 0

    def does(self, call: str, path: str) -> None:
        if any(path == str(folder) or path.startswith(f"{folder}/") for folder in self.folders):
            self._count += 1
            self.seen.append(Operation(self._count, call, path))
            self.act(self.seen[-1])

    def said(self, text: str) -> None:
        """A message came between two operations."""
        self.seen.append(Operation(self._count, "say", text))

    def install(self) -> None:
        """From now on, in this process. There is no way back: meant for a forked one."""
        disk, real_open, real_os_open, real_fsync = self, builtins.open, os.open, os.fsync

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.does("write", str(self.name))
                return super().write(data)

        def opening(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
            if isinstance(file, int):
                return real_open(file, mode, buffering, *rest, **named)
            is_new = any(letter in mode for letter in "wxa")
            if is_new:
                disk.does("create", os.fsdecode(file))
            is_raw = is_new and "b" in mode and buffering == 0
            opened = Raw(file, mode.replace("b", "")) if is_raw else real_open(file, mode, buffering, *rest, **named)
            disk._paths[opened.fileno()] = os.fsdecode(file)
            return opened

        def os_opening(path: Any, flags: int, *rest: Any, dir_fd: int | None = None, **named: Any) -> int:
            whole = disk._whole(path, dir_fd)
            if flags & os.O_CREAT:
                disk.does("create", whole)
            descriptor = real_os_open(path, flags, *rest, dir_fd=dir_fd, **named)
            disk._paths[descriptor] = whole
            return descriptor

        def syncing(descriptor: int) -> None:
            disk.does("fsync", disk._paths.get(descriptor, "?"))
            real_fsync(descriptor)

        builtins.open = io.open = opening  # type: ignore[assignment]
        os.open, os.fsync = os_opening, syncing  # type: ignore[assignment]
        for name, call in (("rename", "rename"), ("replace", "rename"), ("unlink", "unlink"), ("rmdir", "rmdir"), ("mkdir", "mkdir")):
            setattr(os, name, self._watched(call, getattr(os, name)))

    def _watched(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def doing(path: Any, *rest: Any, **named: Any) -> Any:
            target = rest[0] if call == "rename" else path
            self.does(call, self._whole(target, named.get("dir_fd")))
            return real(path, *rest, **named)

        return doing

    def _whole(self, path: Any, dir_fd: int | None) -> str:
        return os.fsdecode(path) if dir_fd is None else os.path.join(self._paths.get(dir_fd, "?"), os.fsdecode(path))


def failing(errno: int, which: Callable[[Operation], bool]) -> Act:
    """An `act` that lets these operations fail."""

    def act(operation: Operation) -> None:
        if which(operation):
            raise OSError(errno, os.strerror(errno), operation.path)

    return act


def killing(which: Callable[[Operation], bool]) -> Act:
    """An `act` that ends the process by SIGKILL before such an operation."""

    def act(operation: Operation) -> None:
        if which(operation):
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def train_into(run: Any, out: Path, num_steps: int | None = None) -> None:
    """Train an already built run into another folder, up to so many steps; it must not have been trained in this process."""
    for name in ("models", "samples", "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    run.output_dir = out
    run.parts.saves = Saves(run.parts.keys, run.parts.base, out)
    if num_steps is not None:
        run.num_train_steps = num_steps
    train(run)


def newest_state(out: Path) -> Path | None:
    """What "latest" would go on from."""
    return next((path for _, path in states_in(out) if not state_faults(path)), None)


def hidden(out: Path) -> list[Path]:
    """Half-written files, staging and trash of saves."""
    return sorted(path for folder in ("models", "train_state") for path in out.glob(f"{folder}/.sdxl-train-*"))
