"""Figures of the table of `gpu.py`: a value beside floor, goal and stretch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from table import markdown, number

_HEADINGS = ("goal", "measured", "value", "floor / goal / stretch", "reached")


@dataclass(frozen=True)
class Levels:
    """
    Attributes:
        floor, goal, stretch: each None where there is none.
        at_least: more is better.
        device: a word of the name of the device that they are for; "" where they hold for all.
    """

    floor: float | None
    goal: float
    stretch: float | None = None
    at_least: bool = True
    device: str = ""

    def reached(self, value: float, device_name: str) -> str:
        """The best level that a value reaches; empty on another device than these are for."""
        if self.device not in device_name:
            return ""
        levels = {"stretch": self.stretch, "goal": self.goal, "floor": self.floor}
        reached = [name for name, level in levels.items() if level is not None and (value >= level if self.at_least else value <= level)]
        return reached[0] if reached else "NO"

    def __str__(self) -> str:
        shown = " / ".join("-" if level is None else f"{level:g}" for level in (self.floor, self.goal, self.stretch))
        return f"{'>=' if self.at_least else '<='} {shown.removesuffix(' / -')}{f' ({self.device})' if self.device else ''}"


@dataclass(frozen=True)
class Figure:
    """One line.

    Attributes:
        metric: "G1" ...; empty for lines that only inform.
        value: None where it could not be measured; `note` says why.
    """

    metric: str
    what: str
    value: float | None
    unit: str = ""
    levels: Levels | None = None
    note: str = ""


def as_objects(figures: Iterable[Figure], device_name: str) -> list[dict[str, Any]]:
    """For JSON."""
    return [{**asdict(figure), "reached": _reached(figure, device_name)} for figure in figures]


def as_table(figures: Iterable[Figure], device_name: str) -> str:
    """Markdown, so that it can be pasted into docs/benchmarks.md."""
    return markdown(_HEADINGS, [_cells(figure, device_name) for figure in figures])


def _reached(figure: Figure, device_name: str) -> str:
    if figure.levels is None:
        return ""
    return "not measured" if figure.value is None else figure.levels.reached(figure.value, device_name)


def _cells(figure: Figure, device_name: str) -> tuple[str, ...]:
    value = figure.note if figure.value is None else f"{number(figure.value)} {figure.unit}"
    return figure.metric, figure.what, value, str(figure.levels or ""), _reached(figure, device_name)
