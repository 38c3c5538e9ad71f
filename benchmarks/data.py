"""Measures the goals for data, C4 ... C9 and the check of C14, each beside a plain alternative; prints one table.

    python benchmarks/data.py [--only C4,C7] [--rows N] [--quick] [--dir FOLDER] [--json]

docs/benchmarks.md says what each line is.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import check_command
import latent_files
import pictures
import starts
from measuring import Line, Sizes
from table import as_json, as_table, metrics_of, told

GROUPS: dict[str, tuple[Callable[[Path, Sizes], Iterator[Line]], ...]] = {
    "C4": (starts.cold_lines,),
    "C5": (starts.start_lines,),
    "C6": (starts.start_lines, starts.worker_lines),
    "C7": (latent_files.read_lines,),
    "C8": (pictures.decode_lines,),
    "C9": (latent_files.cache_lines,),
    "C14": (check_command.check_lines,),
}


def main() -> None:
    """Measure what the command line asks for, and print it as it comes."""
    arguments = _arguments()
    sizes = Sizes.tiny() if arguments.tiny else Sizes.quick() if arguments.quick else Sizes()
    if arguments.rows:
        sizes = replace(sizes, rows=arguments.rows)
    groups = dict.fromkeys(group for metric in arguments.only for group in GROUPS[metric])
    start = time.monotonic()
    lines: list[Line] = []
    with nullcontext(arguments.dir) if arguments.dir else tempfile.TemporaryDirectory() as folder:
        for group in groups:
            found = group(Path(folder).absolute(), sizes)
            lines += found if arguments.json else told(found, start)
    print(as_json(lines) if arguments.json else as_table(lines))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures how the data of a training are read; see docs/benchmarks.md.")
    metrics = partial(metrics_of, GROUPS)
    parser.add_argument("--only", type=metrics, default=list(GROUPS), metavar="C4,C7", help=f"of {', '.join(GROUPS)}; absent: all")
    parser.add_argument("--rows", type=int, metavar="N", help="data of the index for C4, C5 and C6; absent: 1000000")
    parser.add_argument("--quick", action="store_true", help="one repeat of everything, fewer pictures")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: only to see that it works")
    parser.add_argument("--dir", type=Path, help="keep what is made in this folder, and use it again; absent: a folder that is removed")
    parser.add_argument("--json", action="store_true", help="print a list of objects in place of the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
