"""Learning-rate schedules: one factor f(k) for all parameter groups, where k is the number of schedule steps done.

The formulas are those of diffusers.optimization, except that the polynomial one decays towards the same share of every group's rate
(diffusers takes the rate from the optimizer's defaults, which groups with rates of their own do not use).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

import sdxl_train
from sdxl_train import ConfigError, PluginError, hookimpl, option

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

Factor = Callable[[int], float]


def with_warmup(factor: Factor, num_warmup_steps: int) -> Factor:
    """k / num_warmup_steps before step `num_warmup_steps`, then the factor."""
    return lambda k: k / num_warmup_steps if k < num_warmup_steps else factor(k)


def progress(k: int, num_warmup_steps: int, num_training_steps: int) -> float:
    """The share of the steps after the warm-up that are done: 0 at its end, 1 at the end of the run, and above 1 after it."""
    return (k - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)


def linear_factor(num_warmup_steps: int, num_training_steps: int) -> Factor:
    """Falls from 1 to 0 in a line."""
    return lambda k: max(0.0, (num_training_steps - k) / max(1, num_training_steps - num_warmup_steps))


def cosine_factor(num_warmup_steps: int, num_training_steps: int, num_cycles: float) -> Factor:
    """Follows `num_cycles` periods of a cosine between 1 and 0; 0.5 falls once."""
    return lambda k: 0.5 * (1 + math.cos(2 * math.pi * num_cycles * progress(k, num_warmup_steps, num_training_steps)))


def cosine_with_restarts_factor(num_warmup_steps: int, num_training_steps: int, num_cycles: int) -> Factor:
    """Falls from 1 to 0 along half a cosine, `num_cycles` times."""

    def factor(k: int) -> float:
        done = progress(k, num_warmup_steps, num_training_steps)
        return 0.0 if done >= 1 else 0.5 * (1 + math.cos(math.pi * ((num_cycles * done) % 1.0)))

    return factor


def polynomial_factor(num_warmup_steps: int, num_training_steps: int, power: float, lr: float, lr_end: float) -> Factor:
    """Falls from 1 to lr_end / lr as (1 - progress) ** power, and stays there after the last step."""

    def factor(k: int) -> float:
        if k > num_training_steps:
            return lr_end / lr
        left = 1 - progress(k, num_warmup_steps, num_training_steps)
        return ((lr - lr_end) * left**power + lr_end) / lr

    return factor


def parse_step_rules(step_rules: str) -> tuple[list[tuple[int, float]], float]:
    """Read "1:10,0.1:20,0.01": factor 1 before step 10, 0.1 before step 20, 0.01 from then on.

    Returns:
        ([(step before which a factor holds, the factor), ...], the last factor).
    Raises:
        ValueError: anything but factors >= 0 with rising steps >= 1, and one last factor without a step.
    """
    example = '; write it like "1:10,0.1:20,0.01"'
    *rules, last = step_rules.split(",")
    parsed: list[tuple[int, float]] = []
    for rule in rules:
        factor, colon, step = rule.partition(":")
        if not colon:
            raise ValueError(f"{rule.strip()!r} has no step{example}")
        try:
            parsed.append((int(step), _factor(factor)))
        except ValueError as error:
            raise ValueError(f"{rule.strip()!r} is not factor:step{example}") from error
    steps = [step for step, _ in parsed]
    if steps != sorted(set(steps)) or (steps and steps[0] < 1):
        raise ValueError(f"the steps must rise from 1 or more, got {steps}")
    try:
        return parsed, _factor(last)
    except ValueError as error:
        raise ValueError(f"the last factor has no step, got {last.strip()!r}{example}") from error


def _factor(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"a factor is finite and >= 0, got {text.strip()!r}")
    return value


def piecewise_constant_factor(rules: list[tuple[int, float]], last: float) -> Factor:
    """The factor of the first rule whose step is not reached yet, else the last one."""
    return lambda k: next((factor for step, factor in rules if k < step), last)


def leading_rate(optimizer: Optimizer) -> float:
    """The U-Net's learning rate, or the largest of all groups where the U-Net is not trained."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    unet_rates = [rate for rate, group in zip(rates, optimizer.param_groups, strict=True) if group.get("name") == "unet"]
    return next((rate for rate in unet_rates if rate > 0), max(rates))


def schedule(optimizer: Optimizer, factor: Factor) -> LRScheduler:
    """Every group's rate times the factor."""
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, factor)


class Constant:
    """The learning rate as given; no warm-up."""

    @hookimpl
    def build_lr_scheduler(self, optimizer: Optimizer) -> LRScheduler:
        return schedule(optimizer, lambda k: 1.0)


class ConstantWithWarmup:
    """The learning rate as given after a linear warm-up."""

    @hookimpl
    def build_lr_scheduler(self, optimizer: Optimizer, num_warmup_steps: int) -> LRScheduler:
        return schedule(optimizer, with_warmup(lambda k: 1.0, num_warmup_steps))


class Linear:
    """Falls to 0 in a line after the warm-up."""

    @hookimpl
    def build_lr_scheduler(self, optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LRScheduler:
        return schedule(optimizer, with_warmup(linear_factor(num_warmup_steps, num_training_steps), num_warmup_steps))


class Cosine:
    """Falls to 0 along half a cosine after the warm-up."""

    class Options(sdxl_train.Options):
        num_cycles: float = option(
            0.5, "periods of the cosine in the run; 0.5 falls once to 0", zh="余弦的周期数；0.5 为单次下降到 0", ge=0
        )

    def __init__(self, options: Options) -> None:
        self._num_cycles = options.num_cycles

    @hookimpl
    def build_lr_scheduler(self, optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LRScheduler:
        factor = cosine_factor(num_warmup_steps, num_training_steps, self._num_cycles)
        return schedule(optimizer, with_warmup(factor, num_warmup_steps))


class CosineWithRestarts:
    """Falls to 0 along half a cosine, several times."""

    class Options(sdxl_train.Options):
        lr_scheduler_num_cycles: int = option(
            1,
            "how often the rate of cosine_with_restarts falls from its height to 0; 1 is without a restart",
            zh="cosine_with_restarts 调度器的周期数",
            flat=True,
            ge=1,
        )

    def __init__(self, options: Options) -> None:
        self._num_cycles = options.lr_scheduler_num_cycles

    @hookimpl
    def build_lr_scheduler(self, optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LRScheduler:
        factor = cosine_with_restarts_factor(num_warmup_steps, num_training_steps, self._num_cycles)
        return schedule(optimizer, with_warmup(factor, num_warmup_steps))


def not_below(lr_end: float, lr: float) -> str:
    """What is wrong with an `lr_end` that the learning rate cannot fall to."""
    return f"lr_scheduler_kwargs.lr_end = {lr_end:g} is not below the learning rate {lr:g}; give a smaller lr_end"


class Polynomial:
    """Falls to `lr_end` along a power of the remaining steps."""

    class Options(sdxl_train.Options):
        lr_scheduler_power: float = option(
            1.0, "exponent of the polynomial schedule; 1 is a line", zh="polynomial 调度器的阶数；1 为直线", flat=True, gt=0
        )
        lr_end: float = option(1e-7, "learning rate at the end, below the learning rate", zh="结束时的学习率，须小于学习率", ge=0)

        def problem_with_keys(self, keys: Mapping[str, Any]) -> str | None:
            lr = keys["learning_rate"]
            return not_below(self.lr_end, lr) if keys["block_lr"] is None and 0 < lr <= self.lr_end else None

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def build_lr_scheduler(self, optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LRScheduler:
        lr, lr_end = leading_rate(optimizer), self._options.lr_end
        if lr_end >= lr:
            raise ConfigError(not_below(lr_end, lr))
        factor = polynomial_factor(num_warmup_steps, num_training_steps, self._options.lr_scheduler_power, lr, lr_end)
        return schedule(optimizer, with_warmup(factor, num_warmup_steps))


class PiecewiseConstant:
    """Constant factors that change at given steps; no warm-up."""

    class Options(sdxl_train.Options):
        step_rules: str = option(
            ...,
            'factors on the learning rate, each with the step before which it holds, such as "1:10,0.1:20,0.01"; "1" changes nothing',
            zh="学习率的倍数及其截止步数，如 1:10,0.1:20,0.01",
            min_length=1,
        )

        @field_validator("step_rules")
        @classmethod
        def _can_be_read(cls, step_rules: str) -> str:
            parse_step_rules(step_rules)
            return step_rules

    def __init__(self, options: Options) -> None:
        self._step_rules = options.step_rules

    @hookimpl
    def build_lr_scheduler(self, optimizer: Optimizer) -> LRScheduler:
        return schedule(optimizer, piecewise_constant_factor(*parse_step_rules(self._step_rules)))


class Adafactor:
    """The rate that Adafactor computes itself with relative_step = true; `adafactor:<rate>` says what is reported before its first step."""

    initial_lr = 0.0

    @hookimpl
    def build_lr_scheduler(self, optimizer: Optimizer) -> LRScheduler:
        return adafactor_rates(optimizer, self.initial_lr)


def adafactor_rates(optimizer: Any, initial_lr: float) -> LRScheduler:
    """A schedule that only reports: `get_last_lr` has the rate of each group's last update, and `initial_lr` before the first one.

    Args:
        optimizer: as transformers' Adafactor: its groups have no rate (lr is None), and `_get_lr(group, state)` is that of the parameter
            with that state.
    Raises:
        ConfigError: the optimizer does not compute its rate.
    """
    from torch.optim.lr_scheduler import LRScheduler

    if not (hasattr(optimizer, "_get_lr") and all(group["lr"] is None for group in optimizer.param_groups)):
        raise ConfigError(f'lr_scheduler = "adafactor" needs an Adafactor with relative_step = true, got {type(optimizer).__name__}')

    class AdafactorRates(LRScheduler):
        def __init__(self) -> None:  # LRScheduler's own would write rates into the groups, whose lr stays None
            self.optimizer = optimizer
            self.base_lrs: list[Any] = [initial_lr] * len(optimizer.param_groups)
            self.last_epoch = 0
            self._last_lr = self.get_lr()

        def get_lr(self) -> list[Any]:
            rates = []
            for group, initial in zip(optimizer.param_groups, self.base_lrs, strict=True):
                states = (optimizer.state.get(parameter) for parameter in group["params"])
                state = next((state for state in states if state and "step" in state), None)
                rates.append(initial if state is None else optimizer._get_lr(group, state))
            return rates

        def step(self, epoch: int | None = None) -> None:
            self.last_epoch += 1
            self._last_lr = self.get_lr()

    return AdafactorRates()


class ScheduleNames:
    """The values of `lr_scheduler` beyond the entry points: `adafactor:<initial lr>`."""

    def names(self) -> list[str]:
        """None that could be listed."""
        return []

    def find(self, name: str) -> tuple[str, type[Adafactor]] | None:
        """The name and its plugin; None for another name.

        Raises:
            PluginError: what follows the colon is no rate.
        """
        kind, colon, rate = name.partition(":")
        if kind != "adafactor" or not colon:
            return None
        try:
            initial_lr = _factor(rate)
        except ValueError as error:
            raise PluginError(f'lr_scheduler = "{name}": after adafactor: comes the initial learning rate, a number >= 0') from error
        return name, type("Adafactor", (Adafactor,), {"__doc__": Adafactor.__doc__, "initial_lr": initial_lr})
