"""A command in a forked process: what a process of its own costs without its start, for tests that kill, signal or limit it."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from command_runs import run_command


class ForkedRun:
    """`sdxl-train` with these arguments in a forked process of its own group; killed, if it is still there, when the block ends.

    Args:
        log: the file that takes stderr, line by line.
        environment: variables for it.
        prepare: is called in the new process first.
    """

    def __init__(self, log: Path, *arguments: object, environment: dict[str, str] | None = None, prepare: Callable[[], object] | None = None) -> None:
        self._log = log
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments, environment or {}, prepare)
        self._code: int | None = None

    def _run(self, arguments: tuple[object, ...], environment: dict[str, str], prepare: Callable[[], object] | None) -> None:
        code = 70
        try:
            os.setpgid(0, 0)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a test run in the background inherits ignored ones
                signal.signal(signum, signal.SIG_DFL)
            os.environ.update(environment)
            descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(descriptor, 2)
            stream = os.fdopen(descriptor, "w", buffering=1)
            if prepare is not None:
                prepare()
            code = run_command(*arguments, err=stream).code
            stream.flush()
        finally:
            os._exit(code)

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
