"""Measures goal C2: the host's time for clipping, optimizer and zero_grad over the 1,680 tensors of SDXL's U-Net; prints one table.

    python benchmarks/optimizers.py [--large] [--repeats N] [--rounds N] [--json]
    python benchmarks/optimizers.py --compiled

The tensors are tiny, so that what is measured is what the host spends on queueing operations; with --large they have a hundredth of
SDXL's numbers, so that the arithmetic is. docs/benchmarks.md says more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch
from measuring import Goal, Line, in_turn
from torch import Tensor
from transformers.optimization import Adafactor

from sdxl_train.model.architecture import SDXL
from sdxl_train.model.key_names import unet_entries
from sdxl_train.update import total_norm
from sdxl_train_plugins.adafactor import StackedAdafactor
from sdxl_train_plugins.adamw import StackedAdamW
from sdxl_train_plugins.fused_adamw import FusedAdamW

_GOAL = Goal(5)
_SIDE = 1280
_STEPS = {"lr": 1e-5, "relative_step": False, "scale_parameter": False}


def tiny_unet(dtype: torch.dtype) -> list[Tensor]:
    """As many parameters as SDXL's U-Net has, alike where its are alike and with as many dimensions, of 1 to 25 elements."""
    real = [entry.module_shape for entry in unet_entries(SDXL)]
    tiny: dict[tuple[int, ...], tuple[int, ...]] = {}
    for shape, _ in Counter(real).most_common():  # the commonest become the smallest
        i = sum(len(other) == len(shape) for other in tiny)
        tiny[shape] = (i + 1,) if len(shape) == 1 else (i // 5 + 1, i % 5 + 1, *[1] * (len(shape) - 2))
    return [torch.nn.Parameter(torch.randn(tiny[shape]).to(dtype)) for shape in real]


def large_unet(dtype: torch.dtype) -> list[Tensor]:
    """SDXL's U-Net with a tenth of its channels: 26 million numbers."""
    shapes = [[side // 10 if side > 16 else side for side in entry.module_shape] for entry in unet_entries(SDXL)]
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def ours(optimizer: StackedAdafactor | StackedAdamW | FusedAdamW) -> Callable[[list[Tensor]], None]:
    """Clipping as an optimizer allows it that scales gradients by itself."""

    def update(parameters: list[Tensor]) -> None:
        norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        optimizer.grad_scale = (norm + 1e-6).clamp(min=1)
        optimizer.step_key = bytes(16)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def plain(optimizer: torch.optim.Optimizer) -> Callable[[list[Tensor]], None]:
    """Clipping as torch does it for any optimizer."""

    def update(parameters: list[Tensor]) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def norm_alone(parameters: list[Tensor]) -> None:
    """The part of the clipping that is left beside an optimizer that scales gradients."""
    total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def candidates(unet: Callable[[torch.dtype], list[Tensor]]) -> Iterator[tuple[str, str, list[Tensor], Callable[[list[Tensor]], None]]]:
    """(what it is, the plain alternative to it, its parameters, its update)."""

    def made(build: Callable[[list[Tensor]], Callable[[list[Tensor]], None]], dtype: torch.dtype = torch.float32):
        parameters = unet(dtype)
        return parameters, build(parameters)

    full, half = torch.float32, torch.bfloat16
    yield "transformers' Adafactor", "", *made(lambda p: plain(Adafactor(p, **_STEPS)))
    yield "torch's AdamW, loop", "", *made(lambda p: plain(torch.optim.AdamW(p, lr=1e-5, foreach=False)))
    yield "torch's AdamW, foreach", "", *made(lambda p: plain(torch.optim.AdamW(p, lr=1e-5, foreach=True)))
    yield "torch's AdamW, fused", "", *made(lambda p: plain(torch.optim.AdamW(p, lr=1e-5, fused=True)))
    yield "norm of the gradients alone", "", *made(lambda p: norm_alone)
    for name, dtype, adamw in (("float32", full, FusedAdamW), ("bfloat16", half, StackedAdamW)):
        yield f"AdaFactor, {name}", "transformers' Adafactor", *made(lambda p: ours(StackedAdafactor(p, **_STEPS)), dtype)
        yield f"AdamW, {name}", "torch's AdamW, fused", *made(lambda p, adamw=adamw: ours(adamw(p, lr=1e-5)), dtype)


def measure(repeats: int, rounds: int, is_large: bool = False) -> list[Line]:
    """Every candidate in turn, `rounds` times; the median round counts, and a round is the least of `repeats` updates."""
    made = list(candidates(large_unet if is_large else tiny_unet))
    metric, goal = ("arithmetic", None) if is_large else ("C2", _GOAL)
    found: dict[str, list[float]] = {name: [] for name, *_ in made}
    for _ in range(rounds + 1):
        for name, _, parameters, update in made:
            found[name].append(min(_cpu_ms(parameters, update) for _ in range(repeats)))
    median = {name: statistics.median(times[1:]) for name, times in found.items()}  # the first round makes the state
    return [
        Line(metric, name, len(parameters), median[name], "CPU ms", median.get(beside), beside, goal if beside else None)
        for name, beside, parameters, _ in made
    ]


def measure_compiled(rounds: int) -> list[Line]:
    """Updates of four large bfloat16 matrices, of which the arithmetic takes the time, compiled and not, in turn; medians."""
    optimizers: dict[str, Callable[[list[Tensor]], StackedAdafactor | StackedAdamW]] = {
        "AdaFactor": lambda p: StackedAdafactor(p, **_STEPS),
        "AdamW": lambda p: StackedAdamW(p, lr=1e-5),
    }
    lines: list[Line] = []
    for name, build in optimizers.items():
        matrices = torch.randn(4, _SIDE, _SIDE).bfloat16()
        sides: list[list[Tensor]] = [[torch.nn.Parameter(matrix.clone()) for matrix in matrices] for _ in range(2)]
        made = [build(parameters) for parameters in sides]
        made[0].compile_update()
        once = [partial(_cpu_ms, parameters, ours(optimizer)) for parameters, optimizer in zip(sides, made, strict=True)]
        for update in once:
            update()  # makes the state, and compiles
        compiled, plain = in_turn(rounds, *once)
        what = f"{name} compiled, bfloat16, {_SIDE}x{_SIDE}"
        lines.append(Line("G9, on the CPU", what, 4, compiled, "CPU ms", plain, "uncompiled"))
    return lines


def _cpu_ms(parameters: list[Tensor], update: Callable[[list[Tensor]], None]) -> float:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    start = time.process_time()
    update(parameters)
    return 1000 * (time.process_time() - start)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description="Measures the host's time of an optimizer step; see docs/benchmarks.md.")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="updates of a round; default: 5")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds over all optimizers; default: 7")
    parser.add_argument("--large", action="store_true", help="take tensors of which the arithmetic takes the time")
    parser.add_argument("--compiled", action="store_true", help="measure what compiling saves of the arithmetic, in place of goal C2")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = measure_compiled(arguments.rounds) if arguments.compiled else measure(arguments.repeats, arguments.rounds, arguments.large)
    if arguments.json:
        print("\n".join(json.dumps({**asdict(line), "ratio": line.ratio, "is_met": line.is_met}) for line in lines))
        return
    print(f"| goal of | measured, {lines[0].count} tensors | CPU ms | beside | ratio | goal | met |\n|---|---|---|---|---|---|---|")
    for line in lines:
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        met = {None: "", True: "yes", False: "no"}[line.is_met]
        print(f"| {line.metric} | {line.what} | {line.value:.1f} | {line.plain_what} | {ratio} | {line.goal or ''} | {met} |")


if __name__ == "__main__":
    main()
