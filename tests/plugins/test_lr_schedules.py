"""Every schedule against the oracles and its closed form, on groups with different rates."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sdxl_train import ConfigError, PluginError
from sdxl_train_plugins import lr_schedules
from sdxl_train_plugins.lr_schedules import PiecewiseConstant, Polynomial, parse_step_rules

ORACLES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text("utf-8"))
CASES = list(zip(ORACLES["lr_schedules"]["inputs"], ORACLES["lr_schedules"]["expected"], strict=True))
CLASSES = {
    "constant": lr_schedules.Constant,
    "constant_with_warmup": lr_schedules.ConstantWithWarmup,
    "linear": lr_schedules.Linear,
    "cosine": lr_schedules.Cosine,
    "cosine_with_restarts": lr_schedules.CosineWithRestarts,
    "polynomial": lr_schedules.Polynomial,
    "piecewise_constant": lr_schedules.PiecewiseConstant,
}


def optimizer(*rates: float, names: tuple[str, ...] = ("unet", "text_encoder1", "text_encoder2")) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate, "name": names[i]} for i, rate in enumerate(rates)]
    return torch.optim.SGD(groups, lr=1.0)


def rates_of(name: str, rates: tuple[float, ...], warmup: int, total: int, **options: Any) -> list[list[float]]:
    """The rate of each group at each of the updates 0 ... total."""
    plugin_class: Any = CLASSES[name]
    plugin = plugin_class(plugin_class.Options(**options)) if hasattr(plugin_class, "Options") else plugin_class()
    hook = plugin.build_lr_scheduler
    wanted = hook.__code__.co_varnames[1 : hook.__code__.co_argcount]
    arguments = {"optimizer": optimizer(*rates), "num_warmup_steps": warmup, "num_training_steps": total}
    schedule = hook(**{key: arguments[key] for key in wanted})
    used = []
    for _ in range(total + 1):
        used.append([group["lr"] for group in arguments["optimizer"].param_groups])
        arguments["optimizer"].step()
        schedule.step()
    return used


@pytest.mark.parametrize(("given", "expected"), CASES)
def test_every_schedule_holds_the_oracle_values(given: dict, expected: dict) -> None:
    options = {key: value for key, value in given.items() if key in ("lr_scheduler_num_cycles", "lr_scheduler_power")}
    options |= given.get("lr_scheduler_kwargs", {})
    lr = given["learning_rate"]
    used = rates_of(given["lr_scheduler"], (lr,), given["lr_warmup_steps"], given["total_steps"], **options)
    assert [used[k][0] for k in given["k"]] == pytest.approx(expected["lr"], rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", CLASSES)
def test_all_groups_follow_one_factor(name: str) -> None:
    options = {"step_rules": "1:5,0.5"} if name == "piecewise_constant" else {}
    used = rates_of(name, (1e-4, 3e-5, 2e-6), 4, 20, **options)
    for unet, text_encoder1, text_encoder2 in used:
        assert text_encoder1 == pytest.approx(0.3 * unet, rel=1e-12)
        assert text_encoder2 == pytest.approx(0.02 * unet, rel=1e-12)


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_warmup_rises_from_zero_in_a_line(name: str) -> None:
    used = [rate for (rate,) in rates_of(name, (1.0,), 4, 10)]
    assert used[:5] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(("name", "options"), [("constant", {}), ("piecewise_constant", {"step_rules": "1"})])
def test_schedules_without_warmup_begin_at_the_full_rate(name: str, options: dict) -> None:
    assert rates_of(name, (1e-5,), 100, 3, **options) == [[1e-5]] * 4


def test_without_warmup_the_first_update_has_the_full_rate() -> None:
    for name in ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"):
        assert rates_of(name, (0.5,), 0, 2)[0] == [0.5]


def test_cosine_runs_through_its_periods() -> None:
    used = [rate for (rate,) in rates_of("cosine", (1.0,), 0, 8, num_cycles=2.0)]
    assert used == pytest.approx([1, 0.5, 0, 0.5, 1, 0.5, 0, 0.5, 1], abs=1e-12)


def test_cosine_with_restarts_restarts_and_ends_at_zero() -> None:
    used = [rate for (rate,) in rates_of("cosine_with_restarts", (1.0,), 2, 10, lr_scheduler_num_cycles=2)]
    falling = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert used[2:] == pytest.approx([*falling, *falling, 0.0])


def test_polynomial_ends_at_lr_end_and_stays_there() -> None:
    plugin = Polynomial(Polynomial.Options(lr_scheduler_power=2.0, lr_end=2e-6))
    groups = optimizer(1e-5, 1e-4)
    schedule = plugin.build_lr_scheduler(groups, 0, 4)
    used = []
    for _ in range(8):
        used.append([group["lr"] for group in groups.param_groups])
        groups.step()
        schedule.step()
    assert [unet for unet, _ in used] == pytest.approx([8e-6 * (1 - k / 4) ** 2 + 2e-6 for k in range(5)] + [2e-6] * 3)
    assert [encoder for _, encoder in used] == pytest.approx([10 * unet for unet, _ in used])


def test_polynomial_measures_lr_end_against_the_unet() -> None:
    with pytest.raises(ConfigError, match="lr_end = 2e-05"):
        Polynomial(Polynomial.Options(lr_end=2e-5)).build_lr_scheduler(optimizer(1e-5, 1e-3), 0, 4)


def test_polynomial_measures_lr_end_against_the_largest_group_without_a_unet() -> None:
    groups = optimizer(1e-5, 4e-5, names=("text_encoder1", "text_encoder2"))
    Polynomial(Polynomial.Options(lr_end=1e-5)).build_lr_scheduler(groups, 0, 4)
    with pytest.raises(ConfigError, match="4e-05"):
        Polynomial(Polynomial.Options(lr_end=4e-5)).build_lr_scheduler(groups, 0, 4)


def test_step_rules_are_read_in_order() -> None:
    assert parse_step_rules("1:10, 0.1:20 ,0.01") == ([(10, 1.0), (20, 0.1)], 0.01)
    assert parse_step_rules("2") == ([], 2.0)


@pytest.mark.parametrize("rules", ["", "1:10", "1:20,0.1:10,0", "1:0,2", "1:10,0.1:10,0", "a:1,1", "1:1.5,1", "1,2", "1:1,nan", "1:1,-1"])
def test_step_rules_that_cannot_be_meant_are_errors(rules: str) -> None:
    with pytest.raises(ValidationError):
        PiecewiseConstant.Options(step_rules=rules)


def test_step_rules_are_required() -> None:
    with pytest.raises(ValidationError, match="step_rules"):
        PiecewiseConstant.Options()  # pyright: ignore[reportCallIssue]


def test_warmup_longer_than_the_run_stays_finite() -> None:
    for name in ("linear", "cosine", "cosine_with_restarts", "polynomial"):
        used = rates_of(name, (1.0,), 10, 5)
        assert [rate for (rate,) in used] == pytest.approx([k / 10 for k in range(6)])


def test_a_rebuilt_schedule_set_to_its_position_goes_on_exactly() -> None:
    plugin = CLASSES["cosine"](lr_schedules.Cosine.Options())
    whole = rates_of("cosine", (1e-4,), 3, 20)
    first_groups = optimizer(1e-4)
    first = plugin.build_lr_scheduler(first_groups, 3, 20)
    for _ in range(8):
        first_groups.step()
        first.step()
    second_groups = optimizer(1e-4)
    second = plugin.build_lr_scheduler(second_groups, 3, 20)
    second.load_state_dict(first.state_dict())
    second_groups.step()
    second.step()
    assert second_groups.param_groups[0]["lr"] == whole[9][0]


def own_rate_optimizer(**options: Any) -> Any:
    from transformers.optimization import Adafactor

    groups = [{"params": [torch.nn.Parameter(torch.full((4, 4), size))], "name": name} for size, name in ((1.0, "unet"), (2.0, "te"))]
    return Adafactor(groups, relative_step=True, **options)


def reported(optimizer: Any, name: str, steps: int) -> list[list[float]]:
    from sdxl_train.plugin_discovery import Catalogue
    from sdxl_train.plugin_keys import PLUGIN_KEYS

    plugin = Catalogue().find(PLUGIN_KEYS["lr_scheduler"], name).value()
    rates = plugin.build_lr_scheduler(optimizer)
    seen = [[float(rate) for rate in rates.get_last_lr()]]
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(4, 4)
        optimizer.step()
        optimizer.zero_grad()  # the rates are known without the gradients
        rates.step()
        seen.append([float(rate) for rate in rates.get_last_lr()])
    assert [group["lr"] for group in optimizer.param_groups] == [None, None]
    return seen


def test_adafactors_own_rate_is_reported_from_the_initial_one_on() -> None:
    seen = reported(own_rate_optimizer(scale_parameter=False, warmup_init=True), "adafactor:3e-5", 3)
    assert seen == [[pytest.approx(rate)] * 2 for rate in (3e-5, 1e-6, 2e-6, 3e-6)]  # warmup_init: 1e-6 * step


def test_adafactors_own_rate_is_that_of_each_group() -> None:
    (first, second) = reported(own_rate_optimizer(scale_parameter=True), "adafactor:1e-5", 1)
    assert first == [1e-5, 1e-5] and second == pytest.approx([0.01, 0.02])  # 1e-2 times the weights' root mean square


def test_adafactors_schedule_continues_from_its_state() -> None:
    optimizer = own_rate_optimizer(scale_parameter=False, warmup_init=True)
    reported(optimizer, "adafactor:1e-5", 2)
    first, second = (lr_schedules.adafactor_rates(optimizer, rate) for rate in (1e-5, 7.0))
    first.step()
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr() == first.get_last_lr() == pytest.approx([2e-6, 2e-6])


def test_the_adafactor_schedule_refuses_an_optimizer_without_a_rate_of_its_own() -> None:
    with pytest.raises(ConfigError, match="relative_step"):
        lr_schedules.Adafactor().build_lr_scheduler(optimizer(1e-3))


@pytest.mark.parametrize("name", ["adafactor:", "adafactor:fast", "adafactor:-1", "adafactor:nan"])
def test_an_initial_rate_that_is_none_is_an_error(name: str) -> None:
    with pytest.raises(PluginError, match="initial learning rate"):
        lr_schedules.ScheduleNames().find(name)
