"""What AdaFactor and AdamW share: parameters of one shape are updated in one go, and the update is masked and scaled on the device.

A step of SDXL's U-Net updates 1,680 tensors of 44 shapes. One after the other, the host needs longer to queue them than the device to
compute them. Here they are stacked by shape, at most `max_stack_elements` at a time; the parameters stay where they are, and the state
lives in the stacks. Imported by the optimizers when they are built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor

from sdxl_train_plugins.shape_stacks import gathered, scatter, stacks_of
from sdxl_train_plugins.stochastic_rounding import keys_of_step, name_keys, next_words, random_words, rounded_to_bfloat16

State = dict[str, Tensor]


@dataclass
class _Stack:
    """Parameters of one shape, dtype and device.

    Attributes:
        first: the place of the first one among the stacked parameters of the group.
        state: by name, [n, ...]; empty before the first update. `Optimizer.state` holds its rows.
    """

    parameters: list[Tensor]
    first: int
    state: State = field(default_factory=dict)


@dataclass
class _Group:
    """What belongs to one of `param_groups`.

    Attributes:
        stacks: together the parameters of the group.
        step: steps applied so far. 0-dim float32, on the device.
        name_keys: of the stacked parameters' names; None where nothing is rounded stochastically. [n, 2] int32.
        step_keys: of the present step, likewise.
        coefficients: what the updates of the present step share, from `_coefficients`.
    """

    stacks: list[_Stack]
    step: Tensor
    name_keys: Tensor | None
    step_keys: Tensor | None = None
    coefficients: Any = None


class StackedOptimizer(torch.optim.Optimizer):
    """Base of optimizers that update stacks of equal shapes. A subclass gives the state, the coefficients and the update.

    Updates are computed in float32. bfloat16 weights, and state held in bfloat16, are rounded stochastically where the group says
    `stochastic_rounding`. Parameters without a gradient are skipped, but there is one step counter a group, which counts for them too.

    `step_parameter` updates a parameter as `step` does: bit for bit on the CPU, and on CUDA where no sums over elements are part of the
    update (Adafactor's are; CUDA may split the sum of a tensor otherwise than those of a stack, which changes the last bits).

    Attributes:
        grad_scale: gradients are divided by it; None counts as 1. 0-dim float32. torch.amp.GradScaler takes a None only after `unscale_`.
        found_inf: where it is not 0, nothing changes; None counts as 0. 0-dim float32.
        step_key: 16 bytes that stand for seed and step; set before each step in which something is rounded stochastically.
        max_stack_elements: of the tensors updated together.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    step_key: bytes = b""
    max_stack_elements: int = 2**24

    _groups: list[_Group] | None = None  # made when first needed, and again when param_groups or state were replaced

    # ---- What a subclass gives --------------------------------------------------------------------------------------------------

    def _state_shapes(self, group: dict[str, Any], parameter: Tensor) -> dict[str, tuple[Sequence[int], torch.dtype]]:
        """Shape and dtype of each tensor in the state of a parameter."""
        raise NotImplementedError

    def _row_shape(self, shape: torch.Size) -> Sequence[int]:
        """The shape in which `_updated` sees a parameter."""
        raise NotImplementedError

    def _coefficients(self, group: dict[str, Any], step: Tensor) -> Any:
        """What follows from the group and the step alone. `step`: from 1; 0-dim float32."""
        raise NotImplementedError

    def _updated(self, weights: Tensor, grads: Tensor, state: State, group: dict[str, Any], coefficients: Any) -> tuple[Tensor, State]:
        """New weights and new state, both float32; changes nothing that it is given.

        Args:
            weights, grads: [n, *row shape] float32.
            state: [n, ...] each.
        """
        raise NotImplementedError

    # ---- Steps ------------------------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. `closure` computes the loss anew; it is asked once, before the update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin_step()
        for i, group in enumerate(self._made_groups()):
            for stack in group.stacks:
                rows = [row for row, parameter in enumerate(stack.parameters) if parameter.grad is not None]
                if len(rows) == len(stack.parameters):
                    self._update(i, stack, 0, len(rows))
                else:
                    for row in rows:
                        self._update(i, stack, row, row + 1)
        return loss

    @torch.no_grad()
    def begin_step(self) -> None:
        """Count a step, unless `found_inf` says otherwise, and compute what its updates share.

        Raises:
            RuntimeError: something is rounded stochastically, and `step_key` is not set.
        """
        groups = self._made_groups()
        if not self.step_key and any(group.name_keys is not None for group in groups):
            raise RuntimeError("stochastic rounding needs step_key, 16 bytes that differ from step to step; it is not set")
        self._skip = None if self.found_inf is None else self.found_inf != 0
        for group, options in zip(groups, self.param_groups, strict=True):
            group.step.add_(1 if self._skip is None else ~self._skip)
            group.coefficients = self._coefficients(options, group.step)
            if group.name_keys is not None:
                group.step_keys = keys_of_step(group.name_keys, self.step_key)

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """Update one parameter from its `grad`, after `begin_step`; the memory needed is that of its update alone."""
        group, stack, row = self._places[parameter]
        self._update(group, stack, row, row + 1)

    def _update(self, group_index: int, stack: _Stack, first: int, last: int) -> None:
        """Update the rows of a stack from `first` up to `last`."""
        group, options = self._made_groups()[group_index], self.param_groups[group_index]
        if not stack.state:
            self._make_state(group, options, stack)
        is_whole = last - first == len(stack.parameters)
        parameters = stack.parameters if is_whole else stack.parameters[first:last]
        state = stack.state if is_whole else {name: rows[first:last] for name, rows in stack.state.items()}
        keys = None if group.step_keys is None else group.step_keys[stack.first + first : stack.first + last]

        shape = (last - first, *self._row_shape(parameters[0].shape))
        old = gathered(parameters).view(shape)
        grads = gathered([parameter.grad for parameter in parameters]).view(shape).float()  # pyright: ignore[reportArgumentType]
        if self.grad_scale is not None:
            grads = grads / self.grad_scale
        weights, new_state = self._updated(old.float(), grads, state, options, group.coefficients)
        del grads

        words = None
        if keys is not None:
            words = random_words(keys, old[0].numel())
        weights = _rounded(weights, old.dtype, words)
        scatter(weights if self._skip is None else torch.where(self._skip, old, weights), parameters)
        del old, weights
        for name, new in new_state.items():
            rows = state[name]
            words = None if words is None else next_words(words)
            new = _rounded(new, rows.dtype, words).view(rows.shape)
            if self._skip is None:
                rows.copy_(new)
            else:
                torch.where(self._skip, rows, new, out=rows)

    # ---- State ------------------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self._groups = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._groups = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps the dtype in which this optimizer holds it, whatever the dtype of the parameters.

        Raises:
            ValueError: the groups or the state do not fit the parameters.
        """
        state_dict = dict(state_dict)
        saved = state_dict["state"]
        places = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        super().load_state_dict({**state_dict, "state": {}})  # torch would cast the state to the parameters' dtype
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        self.state.update({parameter: dict(saved[place]) for place, parameter in zip(places, parameters, strict=True) if place in saved})
        self._made_groups()

    @torch.no_grad()
    def _made_groups(self) -> list[_Group]:
        """The stacks of all groups. State that is in `self.state` is copied into them."""
        if self._groups is not None:
            return self._groups
        self._places: dict[Tensor, tuple[int, _Stack, int]] = {}
        self._groups = []
        for i, options in enumerate(self.param_groups):
            parameters: list[Tensor] = options["params"]
            names = options.get("param_names") or [f"{i}.{place}" for place in range(len(parameters))]
            stacks: list[_Stack] = []
            order: list[int] = []
            for places in stacks_of(parameters, self.max_stack_elements):
                stacks.append(_Stack([parameters[place] for place in places], len(order)))
                order += places
                self._places |= {parameter: (i, stacks[-1], row) for row, parameter in enumerate(stacks[-1].parameters)}
            device = parameters[0].device if parameters else torch.device("cpu")
            keys = name_keys([names[place] for place in order], device) if self._rounds(options, stacks) else None
            step = torch.zeros((), dtype=torch.float32, device=device)
            group = _Group(stacks, step, keys)
            self._groups.append(group)
            self._adopt_state(group, options)
        return self._groups

    def _rounds(self, options: dict[str, Any], stacks: list[_Stack]) -> bool:
        """Whether anything of a group is rounded stochastically."""
        dtypes = {stack.parameters[0].dtype for stack in stacks}
        for stack in stacks:
            dtypes |= {dtype for _, dtype in self._state_shapes(options, stack.parameters[0]).values()}
        return options["stochastic_rounding"] and torch.bfloat16 in dtypes

    def _make_state(self, group: _Group, options: dict[str, Any], stack: _Stack) -> None:
        """Zeros for all rows of a stack, and `self.state` of its parameters as views of them."""
        n, device = len(stack.parameters), stack.parameters[0].device
        shapes = self._state_shapes(options, stack.parameters[0])
        stack.state = {name: torch.zeros(n, *shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
        rows = {name: tensor.unbind(0) for name, tensor in stack.state.items()}
        for row, parameter in enumerate(stack.parameters):
            self.state[parameter] = {"step": group.step, **{name: tensors[row] for name, tensors in rows.items()}}

    def _adopt_state(self, group: _Group, options: dict[str, Any]) -> None:
        """Copy the state of a group's parameters into its stacks."""
        steps: dict[int, Tensor] = {}
        for stack in group.stacks:
            found = [self.state.get(parameter) or {} for parameter in stack.parameters]
            if not any(found):
                continue
            self._make_state(group, options, stack)
            for row, one in enumerate(found):
                one = dict(one)
                if not one:
                    continue
                step = one.pop("step", None)
                shapes = {name: tuple(rows.shape[1:]) for name, rows in stack.state.items()}
                if step is None or {name: tuple(tensor.shape) for name, tensor in one.items()} != shapes:
                    raise ValueError(
                        f"the state of a parameter of shape {tuple(stack.parameters[row].shape)} is "
                        f"{ {name: tuple(tensor.shape) for name, tensor in one.items()} }; {type(self).__name__} needs step and {shapes}"
                    )
                steps[id(step)] = torch.as_tensor(step, dtype=torch.float32)
                for name, tensor in one.items():
                    stack.state[name][row].copy_(tensor)
        counts = {float(step) for step in steps.values()} if len(steps) > 1 else set()
        if len(counts) > 1:
            raise ValueError(f"the parameters of a group have made {sorted(counts)} steps; {type(self).__name__} counts one number a group")
        for step in steps.values():
            group.step.copy_(step)


def _rounded(values: Tensor, dtype: torch.dtype, words: Tensor | None) -> Tensor:
    """float32 values in the dtype in which they are kept; `words`: random bits for bfloat16, or None to round to nearest."""
    if words is None or dtype != torch.bfloat16:
        return values.to(dtype)
    return rounded_to_bfloat16(values, words.view(values.shape))
