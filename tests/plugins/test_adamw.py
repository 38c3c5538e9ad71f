"""AdamW beside torch's, and its running means in bfloat16."""

import pytest
import torch
from optimizer_runs import parameters, run

from sdxl_train_plugins.adamw import StackedAdamW, bias_correction

OPTIONS = {
    "defaults": {},
    "amsgrad": {"amsgrad": True, "lr": 0.01},
    "everything": {"amsgrad": True, "maximize": True, "weight_decay": 0.3, "betas": (0.5, 0.9), "eps": 1e-3, "lr": 0.1},
    "no memory": {"betas": (0.0, 0.5), "weight_decay": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_it_updates_as_torch_does(options: dict) -> None:
    ours = run(StackedAdamW(parameters(), **options), range(1, 41))
    theirs = run(torch.optim.AdamW(parameters(), **options, foreach=False), range(1, 41))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)


def test_bias_corrections_keep_their_precision() -> None:
    for beta in (0.0, 0.9, 0.999, 0.99999):
        for step in (1, 2, 1000, 10**6):
            found = bias_correction(beta, torch.tensor(float(step))).item()
            assert found == pytest.approx(1 - beta**step, rel=3e-7)


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (torch.float32, {}, torch.float32),
        (torch.float32, {"state_dtype": torch.bfloat16}, torch.bfloat16),
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.bfloat16, {"state_dtype": torch.float32}, torch.float32),
        (torch.bfloat16, {"stochastic_rounding": False}, torch.float32),
        (torch.float16, {}, torch.float32),
    ],
)
def test_running_means_are_kept_in(dtype: torch.dtype, options: dict, expected: torch.dtype) -> None:
    optimizer = StackedAdamW(parameters(dtype), **options)
    run(optimizer, [1])
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {expected} and state["step"].dtype is torch.float32


def test_bfloat16_means_without_stochastic_rounding_are_refused() -> None:
    with pytest.raises(ValueError, match="stochastic"):
        StackedAdamW(parameters(), state_dtype=torch.bfloat16, stochastic_rounding=False)


def test_second_moments_in_bfloat16_follow_the_gradient() -> None:
    """beta2 = 0.999 moves a mean by 0.1 % of a step, a quarter of a bfloat16: rounded to nearest it would stay where it is."""
    weight = torch.nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    optimizer = StackedAdamW([weight], lr=0.0)
    for step in range(1, 301):
        weight.grad = torch.full_like(weight, 1.0 if step <= 100 else 0.0)
        optimizer.step_key = step.to_bytes(16, "little")
        optimizer.step()
    expected = (1 - 0.999**100) * 0.999**200
    assert optimizer.state[weight]["exp_avg_sq"].float().mean().item() == pytest.approx(expected, rel=0.02)


def test_it_learns_in_bfloat16_as_in_float32() -> None:
    """A least-squares problem of which the steps are smaller than the distance between neighbouring weights."""
    random = torch.Generator().manual_seed(0)
    inputs, solution = torch.randn(256, 32, generator=random), 3 + torch.randn(32, generator=random)
    targets = inputs @ solution

    def loss_after_training(dtype: torch.dtype, **options: object) -> float:
        weight = torch.nn.Parameter((solution + 0.1).to(dtype))
        optimizer = StackedAdamW([weight], lr=5e-4, weight_decay=0.0, **options)  # pyright: ignore[reportArgumentType]
        for step in range(1, 401):
            optimizer.step_key = step.to_bytes(16, "little")
            weight.grad = None
            (inputs @ weight.float() - targets).square().mean().backward()
            optimizer.step()
        return (inputs @ weight.detach().float() - targets).square().mean().item()

    start = (inputs @ torch.full((32,), 0.1)).square().mean().item()
    assert loss_after_training(torch.float32) < 0.01 * start
    assert loss_after_training(torch.bfloat16) < 0.05 * start
    assert loss_after_training(torch.bfloat16, stochastic_rounding=False) > 0.3 * start
