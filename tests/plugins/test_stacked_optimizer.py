"""What AdaFactor and AdamW do alike: stacks, masks, scales, steps of single parameters, state that survives."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_runs import are_equal, parameters, run, run_one_by_one, set_gradients, tensors_of
from torch._dynamo.testing import CompileCounterWithBackend

from sdxl_train.masked_optimizer import MaskedOptimizer
from sdxl_train.model.compiling import RECOMPILE_LIMIT
from sdxl_train_plugins.adafactor import StackedAdafactor
from sdxl_train_plugins.adamw import StackedAdamW
from sdxl_train_plugins.shape_stacks import gathered, scatter, stacks_of
from sdxl_train_plugins.stacked_optimizer import StackedOptimizer

Build = Callable[[Any], StackedOptimizer]
OPTIMIZERS: dict[str, Build] = {
    "adafactor": lambda weights: StackedAdafactor(weights, lr=1e-2, relative_step=False, scale_parameter=False),
    "adafactor, all options": lambda weights: StackedAdafactor(weights, beta1=0.9, weight_decay=0.1, warmup_init=True),
    "adamw": lambda weights: StackedAdamW(weights, lr=1e-2),
    "adamw, all options": lambda weights: StackedAdamW(weights, amsgrad=True, maximize=True, state_dtype=torch.bfloat16),
}
every_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])


def test_stacks_hold_what_is_alike_up_to_the_limit() -> None:
    shapes = [(2, 3), (6,), (2, 3), (2, 3), (6,), (100,), (2, 3)]
    weights = [torch.zeros(shape) for shape in shapes] + [torch.zeros(6, dtype=torch.bfloat16)]
    assert stacks_of(weights, 18) == [[0, 2, 3], [1, 4], [5], [6], [7]]


def test_stacks_are_row_major_whatever_the_strides() -> None:
    values = torch.arange(48.0).view(2, 4, 3, 2)
    for count in (1, 2):
        tensors = [values.clone().to(memory_format=torch.channels_last) for _ in range(count)]
        assert torch.equal(gathered(tensors).view(count, -1)[-1], torch.arange(48.0))
        scatter(torch.arange(48.0 * count).view(count, 2, 24), tensors)
        assert torch.equal(tensors[-1], values + 48 * (count - 1)) and not tensors[-1].is_contiguous()


@every_optimizer
@every_dtype
def test_stacks_and_single_parameters_are_updated_alike(build: Build, dtype: torch.dtype) -> None:
    first, second, third = (build(parameters(dtype)) for _ in range(3))
    third.max_batch_elements = 150
    results = run(first, range(1, 6)), run_one_by_one(second, range(1, 6)), run(third, range(1, 6))
    assert not are_equal(results[0], parameters(dtype))
    for one in (second, third):
        assert are_equal(tensors_of(first), tensors_of(one))


@every_optimizer
def test_random_bits_depend_on_names_and_not_on_the_order(build: Build) -> None:
    forth, back = parameters(torch.bfloat16), parameters(torch.bfloat16)
    first = build([(f"unet.{i}", weight) for i, weight in enumerate(forth)])
    second = build([(f"unet.{i}", back[i]) for i in reversed(range(len(back)))])
    other = build([(f"te.{i}", weight) for i, weight in enumerate(parameters(torch.bfloat16))])
    for step in range(1, 4):
        set_gradients(forth, step)
        for weight, like in zip(back, forth, strict=True):
            weight.grad = like.grad
        for optimizer in (first, second):
            optimizer.step_key = step.to_bytes(16, "little")
            optimizer.step()
    assert are_equal([weight.detach() for weight in forth], [weight.detach() for weight in back])
    assert not are_equal(run(other, range(1, 4)), [weight.detach() for weight in forth])


@every_optimizer
def test_strides_do_not_matter(build: Build) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        first, second = run(build(parameters(dtype)), range(1, 4)), run(build(parameters(dtype, channels_last=True)), range(1, 4))
        assert any(not weight.is_contiguous() for weight in second)
        assert are_equal(first, second)


@every_optimizer
@every_dtype
def test_nothing_changes_where_found_inf_is_set(build: Build, dtype: torch.dtype) -> None:
    optimizer = build(parameters(dtype))
    weights = optimizer.param_groups[0]["params"]
    optimizer.found_inf = torch.zeros(())
    run(optimizer, range(1, 4))
    with torch.no_grad():
        weights[1][0, 0] = -0.0
    before = tensors_of(optimizer)
    optimizer.found_inf = torch.ones(())
    run(optimizer, [4])
    for bad in (torch.nan, torch.inf):
        for weight in weights:
            weight.grad = torch.full_like(weight, bad)
        optimizer.step()
        optimizer.begin_step()
        optimizer.step_parameter(weights[1])
    assert are_equal(before, tensors_of(optimizer))


@every_optimizer
def test_a_masked_step_leaves_no_trace_in_later_ones(build: Build) -> None:
    plain, masked = build(parameters()), build(parameters())
    masked.found_inf = torch.ones(())
    run(masked, [1])
    masked.found_inf = torch.zeros(())
    run(masked, [1, 2])
    run(plain, [1, 2])
    assert are_equal(tensors_of(plain), tensors_of(masked))


@every_optimizer
def test_gradients_are_divided_by_grad_scale(build: Build) -> None:
    plain, scaled = build(parameters()), build(parameters())
    scaled.grad_scale = torch.tensor(1024.0)
    assert are_equal(run(plain, range(1, 4)), run(scaled, range(1, 4), scale=1024.0))
    assert torch.equal(scaled.param_groups[0]["params"][1].grad, 1024 * plain.param_groups[0]["params"][1].grad)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_read_from_the_device(build: Build, dtype: torch.dtype) -> None:
    """The meta device has no values: whatever reads one raises."""
    optimizer = build([torch.nn.Parameter(weight.detach().to("meta")) for weight in parameters(dtype)])
    weights = optimizer.param_groups[0]["params"]
    optimizer.step_key = bytes(16)
    for found_inf in (None, torch.zeros((), device="meta")):
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="meta"), found_inf
        optimizer.step()
        optimizer.begin_step()
        optimizer.step_parameter(weights[0])


@every_optimizer
def test_parameters_without_a_gradient_are_left_alone(build: Build) -> None:
    optimizer, whole = build(parameters()), build(parameters())
    weights = optimizer.param_groups[0]["params"]
    set_gradients(weights, 1)
    for weight in weights[1::2]:
        weight.grad = None
    optimizer.step_key = (1).to_bytes(16, "little")
    optimizer.step()
    run(whole, [1])
    for i, (weight, other, start) in enumerate(zip(weights, whole.param_groups[0]["params"], parameters(), strict=True)):
        assert torch.equal(weight, start if i % 2 else other)


@every_optimizer
def test_it_is_a_masked_optimizer_and_counts_steps_in_one_tensor(build: Build) -> None:
    optimizer = build(parameters())
    assert isinstance(optimizer, MaskedOptimizer) and optimizer.grad_scale is None and optimizer.found_inf is None
    run(optimizer, [1, 2, 3])
    steps = {id(state["step"]): state["step"] for state in optimizer.state.values()}
    assert [step.item() for step in steps.values()] == [3]


@every_optimizer
@pytest.mark.parametrize("unscales", [True, False])
def test_torchs_grad_scaler_drives_it(build: Build, unscales: bool) -> None:
    plain, scaled = build(parameters()), build(parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    weights = scaled.param_groups[0]["params"]
    for step, scale in ((1, 256.0), (2, torch.inf), (3, 128.0)):
        scaler.scale(torch.zeros(()))
        set_gradients(weights, step, scale)
        if unscales:
            scaler.unscale_(scaled)
        else:
            scaled.grad_scale = torch.ones(())  # the scaler multiplies it by its own
        scaled.step_key = step.to_bytes(16, "little")
        scaler.step(scaled)
        scaler.update()
        assert scaled.grad_scale is None and scaled.found_inf is None
    run(plain, [1, 3])
    assert are_equal(tensors_of(plain), tensors_of(scaled))


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("go_on", [run, run_one_by_one])
def test_a_resumed_run_equals_the_uninterrupted_one(build: Build, dtype: torch.dtype, go_on: Callable) -> None:
    whole, first, resumed = (build([(f"w{i}", weight) for i, weight in enumerate(parameters(dtype))]) for _ in range(3))
    run(whole, [1, 2])
    run(first, [1, 2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for weight, saved in zip(resumed.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
            weight.copy_(saved)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert are_equal(tensors_of(first), tensors_of(resumed))
    go_on(whole, [3, 4])
    go_on(resumed, [3, 4])
    assert are_equal(tensors_of(whole), tensors_of(resumed))


@every_optimizer
def test_copies_and_added_groups_keep_their_state(build: Build) -> None:
    weights = parameters()
    optimizer = build(weights[:5])
    whole = build([{"params": parameters()[:5]}])
    run(optimizer, [1])
    run(whole, [1])
    clone = copy.deepcopy(optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    run(optimizer, [2])
    run(clone, [2])
    run(whole, [2])
    assert are_equal(tensors_of(whole), tensors_of(clone))
    assert are_equal([weight.detach() for weight in weights[:5]], [weight.detach() for weight in whole.param_groups[0]["params"]])


@every_optimizer
def test_state_that_does_not_fit_is_refused(build: Build) -> None:
    optimizer = build(parameters())
    run(optimizer, [1])
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][3]["step"] = torch.tensor(7.0)
    with pytest.raises(ValueError, match=r"\[1\.0, 7\.0\] steps"):
        build(parameters()).load_state_dict(state)
    with pytest.raises(ValueError, match="needs step and"):
        build([torch.nn.Parameter(torch.zeros(5, 5)) for _ in parameters()]).load_state_dict(optimizer.state_dict())


@every_optimizer
def test_random_bits_need_a_key(build: Build) -> None:
    optimizer = build(parameters(torch.bfloat16))
    set_gradients(optimizer.param_groups[0]["params"], 1)
    with pytest.raises(RuntimeError, match="step_key"):
        optimizer.step()


@every_optimizer
def test_updates_too_small_for_bfloat16_add_up(build: Build) -> None:
    """Weights of 1 and updates of 1e-4 a step, a fortieth of the distance to the next bfloat16."""
    optimizer = build([torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))])
    (group,) = optimizer.param_groups
    group.update(weight_decay=0.0, lr=1e-4)
    if "relative_step" in group:
        group.update(relative_step=False, scale_parameter=False, warmup_init=False)
    (weight,) = group["params"]
    for step in range(1, 101):
        weight.grad = torch.full_like(weight, -1.0 if group.get("maximize") else 1.0)
        optimizer.step_key = step.to_bytes(16, "little")
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(0.99, abs=1e-3)


# ---- Compiled ----


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@every_optimizer
def test_traced_updates_are_the_same_bit_for_bit(build: Build, fresh_dynamo: None) -> None:
    plain, traced, single = (build(parameters(torch.bfloat16)) for _ in range(3))
    counters = [CompileCounterWithBackend("eager") for _ in range(2)]
    traced.compile_update(counters[0])
    single.compile_update(counters[1])
    for optimizer in (plain, traced, single):
        optimizer.max_batch_elements = 1  # every tensor is a stack
    run(plain, range(1, 4))
    run(traced, range(1, 4))
    run_one_by_one(single, range(1, 4))
    assert are_equal(tensors_of(plain), tensors_of(traced)) and are_equal(tensors_of(plain), tensors_of(single))
    # Vectors and matrices, one and several, and of one element, for which torch makes code of its own.
    assert all(0 < counter.frame_count <= 6 for counter in counters)


def test_neither_rates_nor_sizes_need_another_compilation(fresh_dynamo: None) -> None:
    weights = [torch.nn.Parameter(torch.randn(2 + i, 3 + i)) for i in range(8)]
    optimizer, counter = StackedAdamW(weights, lr=1e-3), CompileCounterWithBackend("eager")
    optimizer.max_batch_elements = 1
    optimizer.compile_update(counter)
    for step in range(1, 6):
        optimizer.param_groups[0]["lr"] = 1e-3 / step
        set_gradients(weights, step)
        optimizer.step()
    assert counter.frame_count == 1


def test_masked_steps_change_nothing_when_compiled(fresh_dynamo: None) -> None:
    optimizer, counter = StackedAdamW(parameters(torch.bfloat16), lr=1e-2), CompileCounterWithBackend("eager")
    optimizer.max_batch_elements = 1  # or small stacks would be laid end to end, which are not compiled
    optimizer.compile_update(counter)
    run(optimizer, [1])
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    optimizer.found_inf = torch.ones(())
    run(optimizer, [2])
    assert are_equal(before, tensors_of(optimizer)) and counter.frame_count > 0


@pytest.mark.slow
@every_optimizer
def test_compiled_updates_agree_within_rounding(build: Build, fresh_dynamo: None) -> None:
    plain, compiled = (build(parameters(torch.float32)) for _ in range(2))
    compiled.compile_update()
    for optimizer in (plain, compiled):
        optimizer.max_batch_elements = 150
    for exact, ours in zip(run(plain, range(1, 6)), run(compiled, range(1, 6)), strict=True):
        assert torch.allclose(ours, exact, rtol=1e-5, atol=1e-6)
