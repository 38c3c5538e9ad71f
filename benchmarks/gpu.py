"""Measures the goals for a GPU, G1 ... G12, with the full SDXL in random weights; prints one table. Needs one CUDA GPU and nothing else.

    python benchmarks/gpu.py [--only G1,G9] [--quick] [--json]

docs/benchmarks.md says what each line is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import gpu_steps
import gpu_vae
import torch
from gpu_figures import Figure, as_objects, as_table
from gpu_steps import Bench, Scale
from table import metrics_of, told

from sdxl_train.device_speed import device_peak_flops

# In this order: what runs uncompiled comes before what compiles the same networks.
GROUPS: dict[str, Callable[[Bench, Path], Iterator[Figure]]] = {
    "G10": gpu_vae.caching_figures,
    "G9": lambda bench, folder: gpu_steps.optimizer_figures(bench),
    "G12": gpu_steps.saving_figures,
    "G4": lambda bench, folder: gpu_steps.bare_loop_figures(bench),
    "G11": lambda bench, folder: gpu_steps.loader_figures(bench),
    "G1": lambda bench, folder: gpu_steps.full_speed_figures(bench),
    "G5": lambda bench, folder: gpu_steps.single_figures(bench),
    "G3": lambda bench, folder: gpu_steps.large_figures(bench),
    "G2": lambda bench, folder: gpu_steps.checkpointed_figures(bench),
    "G6": lambda bench, folder: gpu_steps.memory_figures(bench, "G6"),
    "G7": lambda bench, folder: gpu_steps.memory_figures(bench, "G7"),
}


def main() -> None:
    """Measure what the command line asks for, and print it as it comes."""
    arguments = _arguments()
    if not torch.cuda.is_available() and not arguments.tiny:
        print("benchmarks/gpu.py needs one CUDA GPU with 78 GiB or more (H100, H200), and torch finds none", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    scale = Scale.tiny(device) if arguments.tiny else Scale(device)
    if arguments.quick:
        scale = replace(scale, backend=None, steps=max(1, scale.steps // 2), photographs=max(1, scale.photographs // 2))
    start = time.monotonic()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), scale)
        for metric in sorted(set(arguments.only), key=list(GROUPS).index):
            figures += told(_measured(metric, bench, Path(folder)), start)
        bench.free()
    if arguments.json:
        print(json.dumps({"device": device_name, "torch": torch.__version__, "figures": as_objects(figures, device_name)}, indent=1))
    else:
        peak = device_peak_flops(device)
        known = f"{peak / 1e12:g} TFLOP/s at best in bf16" if peak else "its peak is not known"
        print(f"{device_name}: {known}; torch {torch.__version__}\n\n{as_table(figures, device_name)}")


def _measured(metric: str, bench: Bench, folder: Path) -> Iterator[Figure]:
    """The figures of a goal; a device that is too small for it is a finding, and the others go on."""
    message = None
    try:
        yield from GROUPS[metric](bench, folder)
    except torch.cuda.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
    if message is not None:  # outside of the handler, whose error keeps tensors alive
        bench.free()
        yield Figure(metric, "not measured", None, note=f"out of memory: {message}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures steps, memory, caching and saving on one GPU; see docs/benchmarks.md.")
    metrics = partial(metrics_of, GROUPS)
    parser.add_argument("--only", type=metrics, default=list(GROUPS), metavar="G1,G9", help=f"of {', '.join(GROUPS)}; absent: all")
    parser.add_argument("--quick", action="store_true", help="nothing compiled, fewer repeats")
    parser.add_argument("--tiny", action="store_true", help="a tiny SDXL, also on the CPU: only to see that it works")
    parser.add_argument("--json", action="store_true", help="print an object in place of the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
