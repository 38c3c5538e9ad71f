"""Measures the goals for a step and a save, C1, C2, C3, C11, C12 and C13, beside plain alternatives; prints one table. Needs no GPU.

    python benchmarks/step.py [--only C1,C12] [--quick] [--json]

docs/benchmarks.md says what each line is.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import meta_steps
import optimizers
import saving
import trainer_steps
from measuring import Line, in_own_process
from table import as_json, as_table, metrics_of, told


@dataclass(frozen=True)
class Counts:
    """How much is measured.

    Attributes:
        steps: of the trainer, and as many of the plain loop, twice (C1).
        repeats, rounds: updates of a round, and rounds over all optimizers (C2).
        saves: states written (C11).
        hook_rounds: calls of all hooks of a step (C12).
        is_tiny: the tiny SDXL in place of a larger one (C11) and of the full one (C13): the figures mean nothing.
    """

    steps: int = 200
    repeats: int = 5
    rounds: int = 7
    saves: int = 5
    hook_rounds: int = 1000
    is_tiny: bool = False


_QUICK = Counts(steps=50, repeats=3, rounds=3, saves=3, hook_rounds=200)
_TINY = Counts(steps=2, repeats=1, rounds=1, saves=1, hook_rounds=3, is_tiny=True)

GROUPS: dict[str, Callable[[Path, Counts], Iterator[Line]]] = {
    "C1": lambda folder, counts: trainer_steps.step_lines(folder, counts.steps),
    "C2": lambda folder, counts: iter(in_own_process(optimizers.measure, counts.repeats, counts.rounds)),
    "C3": lambda folder, counts: meta_steps.wait_lines(folder),
    "C11": lambda folder, counts: saving.saving_lines(folder, counts.saves, counts.is_tiny),
    "C12": lambda folder, counts: trainer_steps.hook_lines(folder, counts.hook_rounds),
    "C13": lambda folder, counts: meta_steps.memory_lines(folder, counts.is_tiny),
}


def main() -> None:
    """Measure what the command line asks for, and print it as it comes."""
    arguments = _arguments()
    counts = _TINY if arguments.tiny else _QUICK if arguments.quick else Counts()
    start = time.monotonic()
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        for metric in dict.fromkeys(arguments.only):
            found = GROUPS[metric](Path(folder), counts)
            lines += found if arguments.json else told(found, start)
    print(as_json(lines) if arguments.json else as_table(lines))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures what a step costs beside the networks; see docs/benchmarks.md.")
    metrics = partial(metrics_of, GROUPS)
    parser.add_argument("--only", type=metrics, default=list(GROUPS), metavar="C1,C12", help=f"of {', '.join(GROUPS)}; absent: all")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--tiny", action="store_true", help="the fewest, and no full SDXL: only to see that it works")
    parser.add_argument("--json", action="store_true", help="print a list of objects in place of the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
