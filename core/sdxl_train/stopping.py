"""Requests to stop that come as signals: the first ends the run at the next micro-batch boundary, the second at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from sdxl_train.atomic import remove_leftovers

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


class Interrupted(BaseException):
    """Ends a run after a signal; no `except Exception` on the way takes it for an error.

    Attributes:
        exit_code: 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopRequest:
    """Whether a signal has asked the run to stop. The handler only sets a flag; `check` is called where stopping does no harm."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.writes_into: Path | None = None  # the folder below which a second signal removes half-written files

    def check(self) -> None:
        """Go on, or raise Interrupted when a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.signum is None:
            self.signum = signum
            name = signal.Signals(signum).name
            with suppress(OSError):  # the terminal may have been closed, or `| tee` ended by the same Ctrl-C
                os.write(2, f"{name}: stopping after this micro-batch; once more stops at once without saving\n".encode())
            return
        if self.writes_into is not None:
            for directory, _, _ in os.walk(self.writes_into):
                with suppress(OSError):  # another thread may be writing there; the next start removes what stays
                    remove_leftovers(Path(directory))
        os._exit(128 + self.signum)


@contextmanager
def ending_with_its_code() -> Iterator[StopRequest]:
    """As `stop_requests`; a signal that ends the block ends the process, with the signal's exit code."""
    try:
        with stop_requests() as request:
            yield request
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_code)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen for stop signals within the block. A SIGHUP that was ignored at start (nohup) stays ignored."""
    request = StopRequest()
    before = {}
    for signum in SIGNALS:
        if signum != getattr(signal, "SIGHUP", None) or signal.getsignal(signum) is not signal.SIG_IGN:
            before[signum] = signal.signal(signum, request.handle)
    try:
        yield request
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        for signum, handler in before.items():
            signal.signal(signum, handler)
