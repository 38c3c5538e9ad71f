"""Forks of this process, which has imported torch: what a process of its own costs without its start, for tests that kill or limit it."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sdxl_train.stopping import SIGNALS


@dataclass(frozen=True)
class Fork:
    """A forked process: its id, and where its stderr goes."""

    pid: int
    log: Path

    def wait(self, at_most_s: float = 300) -> int:
        """Its exit code, negative for a signal. After so many seconds it is killed."""
        end = time.monotonic() + at_most_s
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still at work after {at_most_s} s:\n{self.log.read_text()}")
            time.sleep(0.005)
        return os.waitstatus_to_exitcode(ended[1])


def fork(body: Callable[[], object], log: Path) -> Fork:
    """Run `body` in a fork: exit code 0, 1 after an exception (its traceback is in the log), or what it gives to sys.exit."""
    pid = os.fork()
    if pid:
        return Fork(pid, log)
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        body()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def command(*arguments: object, prepare: Callable[[], object] = lambda: None) -> Callable[[], None]:
    """What a fork runs to be `sdxl-train` with these arguments; it calls `prepare` first."""

    def body() -> None:
        from sdxl_train.cli import main

        for signum in SIGNALS:  # a test run in the background inherits ignored ones
            signal.signal(signum, signal.SIG_DFL)
        sys.argv = ["sdxl-train", *map(str, arguments)]
        prepare()
        main()

    return body


class ForkedRun:
    """`sdxl-train` with these arguments in a forked process of its own group; killed, if it is still there, when the block ends.

    Args:
        log: the file that takes stderr, line by line.
        environment: variables for it.
        prepare: is called in the new process first.
    """

    def __init__(
        self, log: Path, *arguments: object, environment: dict[str, str] | None = None, prepare: Callable[[], object] = lambda: None
    ) -> None:
        def prepared() -> None:
            os.setpgid(0, 0)
            os.environ.update(environment or {})
            prepare()

        self._log = log
        sys.stderr.flush()
        self.pid = fork(command(*arguments, prepare=prepared), log).pid
        self._code: int | None = None

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        return self._log.read_text() if self._log.exists() else ""

    def code(self, timeout_s: float = 120) -> int:
        """Wait for the exit code; -9 for a process that was killed."""
        end = time.monotonic() + timeout_s
        while self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            else:
                assert time.monotonic() < end, self.err[-3000:]
                time.sleep(0.01)
        return self._code

    def await_file(self, path: Path, timeout_s: float = 120) -> None:
        """Wait until it has made this file."""
        self.await_that(path.exists, timeout_s)

    def await_that(self, has_come: Callable[[], bool], timeout_s: float = 120) -> None:
        """Wait for something that it brings about."""
        end = time.monotonic() + timeout_s
        while not has_come():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else self._code
            assert self._code is None, f"ended with {self._code}: {self.err[-3000:]}"
            assert time.monotonic() < end, self.err[-3000:]
            time.sleep(0.01)

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def __enter__(self) -> "ForkedRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.code()
