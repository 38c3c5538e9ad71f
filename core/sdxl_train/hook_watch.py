"""Says which plugin keeps a training waiting: a hook that does not return is named with the place where it stands."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdxl_train.run import Run

LIMIT_S = 60.0
_LOOKS = 20  # at the stack, within the limit


@contextmanager
def watching_hooks(run: Run) -> Iterator[None]:
    """Within the block, another thread looks at this one's stack; a call of a hook that takes over `LIMIT_S` is logged with its stack.

    It is told again after twice the time, and so on. Calls are not slowed down: nothing is noted when they begin or end.
    """
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(run, threading.get_ident(), ended, LIMIT_S), name="hook watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(run: Run, thread: int, ended: threading.Event, limit_s: float) -> None:
    codes = run.parts.plugins.hook_codes()
    call, since, limit = None, 0.0, limit_s
    while not ended.wait(limit_s / _LOOKS):
        frame = sys._current_frames().get(thread)
        depth, found = next(((depth, one) for depth, one in enumerate(_outwards(frame), 1) if one.f_code in codes), (0, None))
        # A frame is no more than its address here, which a later call may have too: then the step is another one sooner or later.
        seen = (id(found), run.step) if found is not None else None
        if seen is None or seen != call:
            call, since, limit = seen, time.monotonic(), limit_s
        elif time.monotonic() - since >= limit and found is not None:
            plugin, hook = codes[found.f_code]
            stack = "".join(traceback.format_stack(frame, depth)).rstrip()  # from the hook inwards
            run.parts.console.warn(
                f"{plugin} has not returned from {hook} for {time.monotonic() - since:.0f} s, after step {run.step}; a second Ctrl-C or "
                f"SIGTERM ends the run without saving. It is here:\n{stack}"
            )
            limit *= 2
        del frame, found  # or tensors in its variables would live until the next look


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of a stack, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back
