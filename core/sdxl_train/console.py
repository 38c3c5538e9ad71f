"""What a person sees: plain lines on stderr, and a progress bar where stderr is a terminal."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sdxl_train.text_display import printable

PLAIN_INTERVAL_S = 10.0


class Console:
    """Messages and progress on stderr: without markup, highlighting or hard wrapping; no control sequences unless it is a terminal."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._bar: Any = None
        self._last_plain = 0.0

    def line(self, text: str) -> None:
        """Print one message, at once, above the progress bar if there is one."""
        text = printable(text)
        try:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)
        except OSError:
            self._fall_silent()

    def warn(self, text: str) -> None:
        """Print one warning."""
        self.line(f"warning: {text}")

    def start_progress(self, label: str, total: int, done: int = 0) -> None:
        """Begin to show how far something is."""
        self.end_progress()
        self._label, self._total, self._done = label, total, done
        self._started, self._from = time.monotonic(), done
        self._last_plain = time.monotonic()
        if self._is_terminal:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=RichConsole(stderr=True))
            self._task = self._bar.add_task(label, total=total, completed=done, figures="")
            self._bar.start()

    def watch(self, label: str, total: int) -> Callable[[int, int], None]:
        """Begin to show how far something is; the function is told (done, in all)."""
        self.start_progress(label, total)
        return lambda done, _: self.progress(done)

    def progress(self, done: int, label: str | None = None, figures: str = "") -> None:
        """Show that `done` of the total are done; without a terminal at most one line per 10 s, and one for the last."""
        self._done, self._label = done, label or self._label
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=self._label, figures=figures)
        elif time.monotonic() - self._last_plain >= PLAIN_INTERVAL_S or done == self._total:
            self._last_plain = time.monotonic()
            self.line(f"{self._label} {done}/{self._total} {figures}{self._remaining()}".rstrip())

    def end_progress(self) -> None:
        """Take the progress bar away."""
        if self._bar is not None:
            try:
                self._bar.stop()
            except OSError:
                self._fall_silent()
            self._bar = None

    def _fall_silent(self) -> None:
        """Nobody reads stderr any more: the terminal was closed, or `| tee` ended. That must not end a save, nor change the exit code."""
        self._bar = None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)

    def _remaining(self) -> str:
        done, left = self._done - self._from, self._total - self._done
        if done <= 0 or left <= 0:
            return ""
        seconds = int((time.monotonic() - self._started) / done * left)
        return f", {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"


class _LogLines(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.warn(self.format(record))


@contextmanager
def showing_log(console: Console) -> Iterator[None]:
    """Within the block, what the parts log (a tracker that failed, a picture that could not be rendered) is shown as warnings."""
    lines = _LogLines(console)
    logging.getLogger("sdxl_train").addHandler(lines)
    try:
        yield
    finally:  # else a second command in this process would say everything twice
        logging.getLogger("sdxl_train").removeHandler(lines)


_FIGURES = (
    ("loss/step", "loss {:.4f}"),
    ("loss_avr/step", "avr {:.4f}"),
    ("loss_ema/step", "ema {:.4f}"),
    ("speed/img_per_s", "{:.2f} img/s"),
    ("speed/tflop_per_s", "{:.3g} TFLOP/s"),
    ("speed/mfu_percent", "MFU {:.1f}%"),
    ("speed/data_wait_percent", "data wait {:.1f}%"),
    ("speed/peak_gib", "peak {:.2f} GiB"),
    ("speed/rss_gib", "RSS {:.2f} GiB"),
)


def figures_of(metrics: Mapping[str, float]) -> str:
    """The three losses, speed and memory, for the progress line."""
    return ", ".join(form.format(metrics[tag]) for tag, form in _FIGURES if tag in metrics)
