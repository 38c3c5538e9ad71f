"""What the benchmarks print: Markdown or JSON of lines; and what they are asked for."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Protocol, TypeVar

from measuring import Line

_HEADINGS = ("goal of", "measured", "count", "value", "plain alternative", "ratio", "goal", "met")


def metrics_of(known: Iterable[str], text: str) -> list[str]:
    """The goals that `--only` names, "C4,C7", which have to be known ones; for argparse."""
    metrics = text.split(",")
    if unknown := [metric for metric in metrics if metric not in known]:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; choose from {', '.join(known)}")
    return metrics


class _Named(Protocol):
    """A line or figure: of which goal, and what it is."""

    @property
    def metric(self) -> str | None: ...
    @property
    def what(self) -> str: ...


Found = TypeVar("Found", bound=_Named)


def told(found: Iterable[Found], start: float) -> Iterator[Found]:
    """Name each line on stderr as it comes, with the seconds since `start` (by time.monotonic)."""
    for one in found:
        print(f"{time.monotonic() - start:5.0f} s  {one.metric or '-':4}{one.what}", file=sys.stderr, flush=True)
        yield one


def as_json(lines: Iterable[Line]) -> str:
    """A list of objects."""
    return json.dumps([{**asdict(line), "ratio": line.ratio, "is_met": line.is_met} for line in lines], indent=1)


def as_table(lines: Iterable[Line]) -> str:
    """Markdown, so that it can be pasted into docs/benchmarks.md."""
    return markdown(_HEADINGS, map(_cells, lines))


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are aligned in the text too."""
    headed = [headings, *rows]
    widths = [max(len(row[column]) for row in headed) for column in range(len(headings))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in headed]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {row} |" for row in (padded[0], rule, *padded[1:]))


def number(value: float) -> str:
    """Three digits, more where there are more before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cells(line: Line) -> tuple[str, ...]:
    plain = "" if line.plain is None else f"{number(line.plain)} {line.plain_what}"
    ratio = "" if line.ratio is None else f"{line.ratio:.3g}"
    met = {True: "yes", False: "NO", None: ""}[line.is_met]
    value = f"{number(line.value)} {line.unit}"
    return line.metric, line.what, str(line.count), value, plain, ratio, str(line.goal) if line.goal else "", met
