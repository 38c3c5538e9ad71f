"""C1, C12: the trainer's step beside a loop written by hand, and what asking the plugins costs. On a tiny SDXL, where the host decides."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from made_data import captioned_pictures
from made_run import PlainSteps, TrainerSteps, batches_of, made_run
from measuring import Goal, Line, in_own_process, in_turn

from sdxl_train.model.tiny import tiny_architecture
from sdxl_train.randomness import StepRandom
from sdxl_train.run import Run

_SIDE = 64  # px
_BATCH = 4
_PICTURES = 16
_WARM_UP = 5

_Call = tuple[str, dict[str, Any]]


def step_lines(folder: Path, num_steps: int) -> Iterator[Line]:
    """C1."""
    for name in ("AdamW", "AdaFactor"):
        (ours, plain), (ours_outside, plain_outside) = in_own_process(time_steps, folder, name, num_steps)
        what = f"step of the trainer, {name}, tiny SDXL, batch {_BATCH}"
        loop = "forward, backward, optimizer by hand"
        yield Line("C1", what, num_steps, ours, "CPU ms", plain, loop, Goal(1.02, of_ratio=True))
        yield Line("C1", "of it outside of model and optimizer", num_steps, ours_outside, "CPU ms", plain_outside, loop, Goal(1))


def hook_lines(folder: Path, num_rounds: int) -> Iterator[Line]:
    """C12."""
    count, hooks, alone = in_own_process(time_hooks, folder, num_rounds)
    what = f"the {count} calls of hooks of a step, built-in plugins only"
    yield Line("C12", what, num_rounds, hooks, "CPU us", alone, "the same methods of plugins called directly", Goal(60))
    yield Line("C12", "of it what the hook points add to the plugins' own work", num_rounds, hooks - alone, "CPU us", goal=Goal(60))


# ---- each of these runs in a process of its own ----


def time_steps(folder: Path, optimizer: str, num_steps: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Median CPU ms of a step, and of its part outside of model and optimizer: each of the trainer and of the plain loop, in turn."""
    run = _run(folder, optimizer)
    batches = batches_of(run, _PICTURES // _BATCH)
    unet = copy.deepcopy(run.unet)
    groups = [{"name": "unet", "params": list(unet.parameters()), "lr": run.optimizer.param_groups[0]["lr"]}]
    # The best at hand: transformers' Adafactor would take more time than all the rest of the step.
    by_hand = torch.optim.AdamW(groups, fused=True) if optimizer == "AdamW" else run.parts.hooks.build_optimizer(param_groups=groups)
    trainer, plain = TrainerSteps(run, batches), PlainSteps(run, batches, unet, by_hand)
    for _ in range(_WARM_UP):
        trainer()
        plain()
    in_all = in_turn(num_steps, lambda: _cpu_ms(trainer), lambda: _cpu_ms(plain))
    inside = _Inside()
    with inside.of(run.unet, unet, *run.text_encoders, optimizers=(run.optimizer, by_hand)):
        outside = in_turn(num_steps, lambda: _cpu_ms(trainer) - inside.take_ms(), lambda: _cpu_ms(plain) - inside.take_ms())
    return in_all, outside


def time_hooks(folder: Path, num_rounds: int) -> tuple[int, float, float]:
    """How many hooks a step calls; median CPU us of all of them; and of the plugins' methods, called without hooks."""
    run = _run(folder, "AdamW")
    calls = _calls_of_a_step(run)
    hooks = run.parts.plugins.hooks
    methods = {name: _methods(run, name) for name, _ in calls}

    def through_hooks(fresh: list[_Call]) -> None:
        for name, arguments in fresh:
            getattr(hooks, name)(**arguments)

    def directly(fresh: list[tuple[Callable[..., Any], dict[str, Any]]]) -> None:
        for method, arguments in fresh:
            method(**arguments)

    def fresh_calls() -> list[_Call]:
        return [(name, _fresh(run, name, arguments)) for name, arguments in calls]

    def fresh_methods() -> list[tuple[Callable[..., Any], dict[str, Any]]]:
        fresh = [(method, names, arguments) for hook, arguments in fresh_calls() for method, names in methods[hook]]
        return [(method, {name: arguments[name] for name in names}) for method, names, arguments in fresh]

    for _ in range(_WARM_UP):
        through_hooks(fresh_calls())
        directly(fresh_methods())
    ours, alone = in_turn(num_rounds, lambda: _timed(through_hooks, fresh_calls()), lambda: _timed(directly, fresh_methods()))
    return len(calls), 1000 * ours, 1000 * alone


def _run(folder: Path, optimizer: str) -> Run:
    torch.set_num_threads(1)
    images = captioned_pictures(folder, (_SIDE, _SIDE), _PICTURES)
    keys = {"cpu": True, "resolution": _SIDE, "batch_size": _BATCH, "max_dataloader_n_workers": 0, "optimizer_type": optimizer}
    run = made_run(folder / optimizer, tiny_architecture(), images, **keys)
    run.parts.hooks.on_train_start(run=run)
    return run


def _cpu_ms(work: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    work()
    return (time.thread_time_ns() - start) / 1e6


def _timed(work: Callable[[Any], object], argument: object) -> float:
    return _cpu_ms(lambda: work(argument))


class _Inside:
    """The main thread's CPU time in networks, backward passes and optimizers."""

    def __init__(self) -> None:
        self._ns = 0

    def of(self, *networks: torch.nn.Module, optimizers: tuple[torch.optim.Optimizer, ...]) -> ExitStack:
        """Measure these until the block ends."""
        stack = ExitStack()
        methods: list[tuple[Any, str]] = [(network, "forward") for network in networks]
        methods += [(optimizer, name) for optimizer in optimizers for name in ("step", "zero_grad")]
        for owner, name in [*methods, (torch.Tensor, "backward")]:
            stack.enter_context(patch.object(owner, name, self._measured(getattr(owner, name))))
        return stack

    def take_ms(self) -> float:
        """What was measured since the last time."""
        taken, self._ns = self._ns, 0
        return taken / 1e6

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **named: Any) -> Any:
            start = time.thread_time_ns()
            try:
                return function(*arguments, **named)
            finally:
                self._ns += time.thread_time_ns() - start

        return measured


class _Recorder:
    """Hands calls of hooks on, and keeps them."""

    def __init__(self, hooks: Any) -> None:
        self._hooks = hooks
        self.calls: list[_Call] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            self.calls.append((name, arguments))
            return getattr(self._hooks, name)(**arguments)

        return call


def _calls_of_a_step(run: Run) -> list[_Call]:
    step = TrainerSteps(run, batches_of(run, 1))
    step()
    recorder: Any = _Recorder(run.parts.plugins.hooks)
    with patch.object(run.parts.plugins, "hooks", recorder):
        step()
    return recorder.calls


def _fresh(run: Run, hook: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a random stream from which nothing was drawn yet, as in a step."""
    if "random" not in arguments:
        return arguments
    return {**arguments, "random": StepRandom(arguments["batch"].places, hook, run.device)}


def _methods(run: Run, hook: str) -> list[tuple[Callable[..., Any], list[str]]]:
    """What the plugins of a run answer to a hook, with the arguments that each wants."""
    found = [getattr(plugin.instance, hook) for plugin in run.parts.plugins.loaded if hasattr(plugin.instance, hook)]
    return [(method, list(method.__code__.co_varnames[1 : method.__code__.co_argcount])) for method in found]
