"""The optimizers: one update against its published formula, and options that reach the optimizer."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sdxl_train_plugins.adamw import StackedAdamW
from sdxl_train_plugins.fused_adamw import FusedAdamW
from sdxl_train_plugins.optimizers import AdaFactor, AdamW


def groups(*values: list[list[float]], lr: float = 0.1) -> list[dict[str, Any]]:
    names = ("unet", "text_encoder1", "text_encoder2")
    return [{"params": [torch.nn.Parameter(torch.tensor(value))], "lr": lr / (i + 1), "name": names[i]} for i, value in enumerate(values)]


def update(optimizer: torch.optim.Optimizer, gradient: list[list[float]]) -> list[torch.Tensor]:
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.tensor(gradient)
    optimizer.step()
    return [group["params"][0].detach() for group in optimizer.param_groups]


@pytest.mark.parametrize("plugin", [AdamW(AdamW.Options()), AdaFactor(AdaFactor.Options())])
def test_groups_keep_their_rates_and_names(plugin: AdamW | AdaFactor) -> None:
    optimizer = plugin.build_optimizer(groups([[1.0]], [[2.0]]))
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("unet", 0.1), ("text_encoder1", 0.05)]


def test_adamw_decays_and_takes_one_normalised_step() -> None:
    optimizer = AdamW(AdamW.Options(weight_decay=0.5)).build_optimizer(groups([[1.0, -2.0]], [[1.0, -2.0]]))
    first, second = update(optimizer, [[0.3, -4.0]])
    torch.testing.assert_close(first, torch.tensor([[1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]]))  # lr 0.1: the first step is lr * sign
    torch.testing.assert_close(second, torch.tensor([[1.0 * 0.975 - 0.05, -2.0 * 0.975 + 0.05]]))


def test_adamws_options_reach_it() -> None:
    given = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.0, "amsgrad": True, "maximize": True, "state_dtype": "bfloat16"}
    group = AdamW(AdamW.Options(**given)).build_optimizer(groups([[1.0]])).param_groups[0]
    assert {name: group[name] for name in given} == {**given, "state_dtype": torch.bfloat16}


@pytest.mark.parametrize("given", [{"foreach": True}, {"foreach": False}, {"capturable": True}, {"differentiable": True}, {"fused": False}])
def test_options_that_only_torch_has_hand_the_update_to_torch(given: dict[str, bool]) -> None:
    optimizer = AdamW(AdamW.Options(eps=1e-6, **given)).build_optimizer(groups([[1.0]]))
    (name, value), group = next(iter(given.items())), optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.AdamW and group[name] is value and group["eps"] == 1e-6
    problem = AdamW.Options(**given).problem_with_keys({"full_bf16": True, "fused_backward": False})
    assert problem is not None and name in problem and "stochastic_rounding = false" in problem
    nearest = AdamW.Options(stochastic_rounding=False, **given)
    assert nearest.problem_with_keys({"full_bf16": True, "fused_backward": False}) is None
    half = [{"params": [torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], "lr": 0.1}]
    assert type(AdamW(nearest).build_optimizer(half)) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        (torch.float32, {}, FusedAdamW),
        (torch.float32, {"state_dtype": "float32"}, FusedAdamW),
        (torch.float32, {"state_dtype": "bfloat16"}, StackedAdamW),
        (torch.float32, {"fused": True, "capturable": True}, torch.optim.AdamW),
        (torch.bfloat16, {}, StackedAdamW),
        (torch.bfloat16, {"stochastic_rounding": False}, StackedAdamW),
        (torch.bfloat16, {"stochastic_rounding": False, "fused": True}, FusedAdamW),
        (torch.float16, {}, StackedAdamW),
    ],
)
def test_adamw_of_float32_weights_and_means_is_torchs_kernel(dtype: torch.dtype, given: dict[str, Any], expected: type) -> None:
    half = [{"params": [torch.nn.Parameter(torch.zeros(2, dtype=dtype))], "lr": 0.1}]
    assert type(AdamW(AdamW.Options(**given)).build_optimizer(half)) is expected


def test_the_kernel_asked_for_by_name_excludes_rounding_and_nothing_else() -> None:
    keys = {"full_bf16": True, "fused_backward": True}
    problem = AdamW.Options(fused=True).problem_with_keys(keys)
    assert problem is not None and "optimizer_kwargs.fused" in problem and "stochastic_rounding = false" in problem
    assert AdamW.Options(fused=True, stochastic_rounding=False).problem_with_keys(keys) is None
    assert AdamW.Options(fused=True).problem_with_keys({**keys, "full_bf16": False}) is None


def test_adamw_takes_all_arguments_of_torch_with_its_defaults() -> None:
    import inspect

    torchs = inspect.signature(torch.optim.AdamW).parameters
    assert set(AdamW.Options.model_fields) == set(torchs) - {"params", "lr"} | {"stochastic_rounding", "state_dtype"}
    defaults = AdamW.Options().model_dump(exclude={"stochastic_rounding", "state_dtype"})
    assert defaults == {name: torchs[name].default for name in defaults}


def test_adafactor_takes_the_published_first_step() -> None:
    gradient = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    optimizer = AdaFactor(AdaFactor.Options()).build_optimizer(groups([[0.0, 0.0], [0.0, 0.0]]))
    (weights,) = update(optimizer, gradient.tolist())
    squares = gradient.square()  # at step 1 the decay 1 - 1 ** -0.8 is 0: the factored second moment is that of this gradient
    second_moment = squares.sum(1, keepdim=True) * squares.sum(0, keepdim=True) / squares.sum()
    step = gradient / second_moment.sqrt()
    step = step / max(1.0, step.square().mean().sqrt().item())
    torch.testing.assert_close(weights, -0.1 * step)


def test_adafactor_uses_the_given_rate_and_not_one_of_its_own() -> None:
    small, large = (
        update(AdaFactor(AdaFactor.Options()).build_optimizer(groups([[1.0, 1.0]], lr=lr)), [[1.0, 2.0]])[0] for lr in (1e-3, 1e-2)
    )
    torch.testing.assert_close(10 * (small - 1), large - 1, rtol=1e-3, atol=1e-6)


def test_adafactors_scale_parameter_multiplies_by_the_root_mean_square() -> None:
    plain, scaled = (
        update(AdaFactor(AdaFactor.Options(scale_parameter=is_on)).build_optimizer(groups([[3.0, 5.0]])), [[1.0, 1.0]])[0]
        for is_on in (False, True)
    )
    start = torch.tensor([[3.0, 5.0]])
    torch.testing.assert_close(scaled - start, (plain - start) * math.sqrt((9 + 25) / 2))


def test_adafactors_first_moment_is_absent_unless_asked_for() -> None:
    for beta1, has_moment in ((None, False), (0.9, True)):
        optimizer = AdaFactor(AdaFactor.Options(beta1=beta1)).build_optimizer(groups([[1.0]]))
        update(optimizer, [[1.0]])
        assert ("exp_avg" in optimizer.state[optimizer.param_groups[0]["params"][0]]) is has_moment


def test_relative_step_drops_the_rates_of_the_groups() -> None:
    optimizer = AdaFactor(AdaFactor.Options(relative_step=True)).build_optimizer(groups([[1.0]], [[2.0]]))
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("unet", None), ("text_encoder1", None)]


@pytest.mark.parametrize(("given", "is_noted"), [({}, True), ({"relative_step": False}, True), ({"relative_step": True}, False)])
def test_warmup_init_forces_relative_step_and_says_so(given: dict, is_noted: bool, caplog: pytest.LogCaptureFixture) -> None:
    options = AdaFactor.Options(warmup_init=True, **given)
    assert options.relative_step and options.model_dump()["relative_step"]
    (weights,) = update(AdaFactor(options).build_optimizer(groups([[1.0]])), [[1.0]])
    torch.testing.assert_close(weights, torch.tensor([[1.0 - 1e-6]]), rtol=0, atol=1e-7)
    assert ("relative_step = true" in caplog.text) is is_noted


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (AdamW.Options, {"lr": 1e-3}),
        (AdamW.Options, {"betas": (0.9, 1.0)}),
        (AdamW.Options, {"weight_decay": -1.0}),
        (AdamW.Options, {"fused": True, "foreach": True}),
        (AdamW.Options, {"fused": True, "state_dtype": "float32"}),
        (AdamW.Options, {"state_dtype": "bfloat16", "stochastic_rounding": False}),
        (AdamW.Options, {"state_dtype": "float16"}),
        (AdaFactor.Options, {"clip_threshold": 0.0}),
        (AdaFactor.Options, {"decay_rate": 0.5}),
        (AdaFactor.Options, {"momentum": 0.9}),
    ],
)
def test_options_that_no_optimizer_takes_are_errors(options: Any, given: dict) -> None:
    with pytest.raises(ValidationError):
        options(**given)


@pytest.mark.parametrize(("options", "name"), [(AdamW.Options, "betas"), (AdaFactor.Options, "eps")])
def test_toml_lists_fit_pairs(options: Any, name: str) -> None:
    assert getattr(options.model_validate_json(f'{{"{name}": [0.5, 0.75]}}', strict=True), name) == (0.5, 0.75)
    with pytest.raises(ValidationError):
        options.model_validate_json(f'{{"{name}": [0.5]}}', strict=True)
