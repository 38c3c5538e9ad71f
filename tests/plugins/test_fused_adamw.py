"""AdamW in torch's kernel: torch's results, steps that are scaled, masked and of single parameters, state that survives."""

import copy

import pytest
import torch
from optimizer_runs import are_equal, parameters, run, run_one_by_one, set_gradients, tensors_of

from sdxl_train.masked_optimizer import MaskedOptimizer
from sdxl_train_plugins.fused_adamw import FusedAdamW

OPTIONS = {
    "defaults": {},
    "everything": {"amsgrad": True, "maximize": True, "weight_decay": 0.3, "betas": (0.5, 0.9), "eps": 1e-3, "lr": 0.1},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@every_option
def test_it_updates_as_torch_does(options: dict) -> None:
    ours = run(FusedAdamW(parameters(), **options), range(1, 41))
    theirs = run(torch.optim.AdamW(parameters(), **options, foreach=False), range(1, 41))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)


@every_option
def test_single_parameters_are_updated_as_all_are_bit_for_bit(options: dict) -> None:
    first, second = FusedAdamW(parameters(), **options), FusedAdamW(parameters(), **options)
    run(first, range(1, 6))
    run_one_by_one(second, range(1, 6))
    assert are_equal(tensors_of(first), tensors_of(second)) and not are_equal(tensors_of(first)[:14], parameters())


@every_option
def test_a_scale_divides_the_gradients_and_a_mask_leaves_everything_as_it_is(options: dict) -> None:
    plain, scaled = FusedAdamW(parameters(), **options), FusedAdamW(parameters(), **options)
    assert isinstance(scaled, MaskedOptimizer)
    scaled.grad_scale, scaled.found_inf = torch.tensor(8.0), torch.zeros(())
    run(plain, range(1, 4))
    run(scaled, range(1, 4), scale=8.0)
    assert are_equal(tensors_of(plain), tensors_of(scaled))
    before = tensors_of(scaled)
    scaled.found_inf = torch.ones(())
    run(scaled, [4], scale=float("nan"))
    run_one_by_one(scaled, [5])
    assert are_equal(before, tensors_of(scaled))


def test_parameters_without_a_gradient_stay_and_are_counted() -> None:
    optimizer = FusedAdamW(parameters(), lr=1e-2)
    weights = optimizer.param_groups[0]["params"]
    set_gradients(weights, 1)
    weights[0].grad = None
    optimizer.step()
    assert are_equal([weights[0]], [parameters()[0]]) and not are_equal([weights[1]], [parameters()[1]])
    run(optimizer, [2])
    assert not are_equal([weights[0]], [parameters()[0]])
    assert {optimizer.state[weight]["step"].item() for weight in weights} == {2.0}


def test_a_closure_is_asked_once_and_a_group_that_came_later_is_trained() -> None:
    first, second = parameters()[:2]
    optimizer = FusedAdamW([first], lr=1e-2)
    optimizer.add_param_group({"params": [second], "lr": 1e-3})

    def closure() -> float:
        loss = first.square().sum() + second.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx((parameters()[0].square().sum() + parameters()[1].square().sum()).item())
    torch.testing.assert_close((first - parameters()[0] * (1 - 1e-4)).abs(), torch.full((7,), 1e-2), rtol=1e-3, atol=1e-6)
    assert not are_equal([second], [parameters()[1]])


@pytest.mark.parametrize("other", [FusedAdamW, torch.optim.AdamW])
def test_it_goes_on_from_a_state_of_its_own_or_of_torchs(other: type) -> None:
    whole, begun, goes_on = FusedAdamW(parameters(), lr=1e-2), other(parameters(), lr=1e-2), FusedAdamW(parameters(), lr=1e-2)
    run(whole, range(1, 7))
    weights = run(begun, range(1, 4))
    for mine, weight in zip(goes_on.param_groups[0]["params"], weights, strict=True):
        mine.data.copy_(weight)
    goes_on.load_state_dict(copy.deepcopy(begun.state_dict()))
    run(goes_on, range(4, 7))
    for one, same in zip(tensors_of(whole), tensors_of(goes_on), strict=True):
        torch.testing.assert_close(one, same, rtol=2e-6, atol=2e-7)
    assert other is torch.optim.AdamW or are_equal(tensors_of(whole), tensors_of(goes_on))


def test_counters_that_differ_are_refused() -> None:
    optimizer = FusedAdamW(parameters(), lr=1e-2)
    run(optimizer, [1])
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][3]["step"] = state["state"][3]["step"] + 1  # a tensor that others share
    with pytest.raises(ValueError, match=r"\[1.0, 2.0\] steps"):
        FusedAdamW(parameters(), lr=1e-2).load_state_dict(state)
