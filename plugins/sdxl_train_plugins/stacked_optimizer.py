"""What AdaFactor and AdamW share: parameters of one shape are updated in one go, and the update is masked and scaled on the device.

A step of SDXL's U-Net updates 1,680 tensors of 44 shapes. One after the other, the host needs longer to queue them than the device to
compute them. Here they are stacked by shape, and small stacks are laid end to end, at most `max_batch_elements` at a time. The parameters
stay where they are, and the state lives in the batches. Imported by the optimizers when they are built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sdxl_train_plugins.masked_step import MaskedStep
from sdxl_train_plugins.shape_stacks import end_to_end, gathered, scatter, split, stacks_of
from sdxl_train_plugins.stacked_update import State, update_values
from sdxl_train_plugins.stochastic_rounding import keys_of_step, name_keys

_BATCH_ELEMENTS, _CPU_BATCH_ELEMENTS = 2**24, 2**18


@dataclass(eq=False)
class _Stack:
    """Parameters of one shape, dtype and device.

    Attributes:
        row_shape: the shape in which the update sees one of them.
        first: the place of the first one among the stacked parameters of the group.
        state: by name, [n, ...], of which `Optimizer.state` holds the rows; empty before the first update.
    """

    parameters: list[Tensor]
    row_shape: Sequence[int]
    first: int
    state: State = field(default_factory=dict)

    @property
    def num_elements(self) -> int:
        return len(self.parameters) * self.parameters[0].numel()


@dataclass(eq=False)
class _Batch:
    """Stacks of one dtype and device that are updated together.

    Attributes:
        state: by name, the state of the stacks end to end. [elements]; empty before the first update.
    """

    stacks: list[_Stack]
    state: State = field(default_factory=dict)


@dataclass(frozen=True)
class _Piece:
    """The rows of a stack from `first` up to `last`."""

    stack: _Stack
    first: int
    last: int

    @property
    def parameters(self) -> list[Tensor]:
        return self.stack.parameters[self.first : self.last]

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, *row shape]."""
        return (self.last - self.first, *self.stack.row_shape)

    def keys(self, keys: Tensor) -> Tensor:
        """Those of the piece, of those of the group's stacked parameters. [n, 2] int32."""
        return keys[self.stack.first + self.first : self.stack.first + self.last]


@dataclass
class _Group:
    """What belongs to one of `param_groups`.

    Attributes:
        batches: together the parameters of the group.
        step: steps applied so far. 0-dim float32, on the device.
        name_keys: of the stacked parameters' names; None where nothing is rounded stochastically. [n, 2] int32.
        step_keys: of the present step, likewise.
        coefficients: what the updates of the present step share, from `_coefficients`.
    """

    batches: list[_Batch]
    step: Tensor
    name_keys: Tensor | None
    step_keys: Tensor | None = None
    coefficients: Any = None


class StackedOptimizer(MaskedStep):
    """Base of optimizers that update stacks of equal shapes. A subclass gives the state, the coefficients and the update.

    Updates are computed in float32. bfloat16 weights, and state held in bfloat16, are rounded stochastically where the group says
    `stochastic_rounding`. Parameters without a gradient are skipped, but there is one step counter a group, which counts for them too.

    `step_parameter` updates a parameter as `step` does: bit for bit on the CPU, and on CUDA where no sums over elements are part of the
    update (Adafactor's are; CUDA may split the sum of a tensor otherwise than those of a stack, which changes the last bits).

    Attributes:
        grad_scale, found_inf, step_key: as in `MaskedStep`.
        max_batch_elements: of the tensors updated together. The memory of an update is some 30 bytes an element. None: 2**24, or on the
            CPU 2**18, which stays in its caches.
    """

    max_batch_elements: int | None = None

    _update_of_piece: Callable[..., Tensor] = staticmethod(update_values)
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

    def _updated(
        self, weights: Tensor, grads: Tensor, state: State, shapes: list[tuple[int, ...]], group: dict[str, Any], coefficients: Any
    ) -> tuple[Tensor, State]:
        """New weights and new state, both float32 and as they were given; changes nothing that it is given.

        Args:
            weights, grads: stacks end to end. [elements] float32.
            state: that of the stacks, by name, likewise.
            shapes: [n, *row shape] of each stack.
        """
        raise NotImplementedError

    def compile_update(self, backend: Any = "inductor") -> None:
        """Compile the arithmetic of an update into few kernels: weights, gradients and state are read once and written once.

        Results differ from the uncompiled ones by rounding: sums have another order, and products may be fused with sums. Sizes are symbols
        of the compiled code, so there are a few compilations and not one a shape. Small stacks laid end to end stay uncompiled: they are
        one in a hundred of SDXL's parameters, and each number of them would be a compilation.

        Args:
            backend: as for torch.compile; None: compute uncompiled again.
        """
        compiled = backend and torch.compile(update_values, dynamic=True, fullgraph=True, backend=backend)
        self._update_of_piece = compiled or update_values

    # ---- Steps ------------------------------------------------------------------------------------------------------------------

    def _update_all(self) -> None:
        for i, group in enumerate(self._made_groups()):
            for batch in group.batches:
                pieces = [piece for stack in batch.stacks for piece in _with_gradients(stack)]
                if pieces == [_Piece(stack, 0, len(stack.parameters)) for stack in batch.stacks]:
                    self._update(i, batch, pieces)
                else:
                    for piece in pieces:
                        self._update(i, batch, [piece])

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
        group, batch, stack, row = self._places[parameter]
        self._update(group, batch, [_Piece(stack, row, row + 1)])

    def _update(self, group_index: int, batch: _Batch, pieces: list[_Piece]) -> None:
        """Update the whole of a batch, or one piece of it."""
        group, options = self._made_groups()[group_index], self.param_groups[group_index]
        if not batch.state:
            self._make_state(group, options, batch)
        state, update = batch.state, update_values
        if len(pieces) == 1:
            update, (piece,) = self._update_of_piece, pieces
            state = {name: rows[piece.first : piece.last].view(-1) for name, rows in piece.stack.state.items()}

        weights = update(
            self._updated,
            end_to_end([gathered(piece.parameters) for piece in pieces]),
            end_to_end([gathered([parameter.grad for parameter in piece.parameters]) for piece in pieces]),
            state,
            shapes := [piece.shape for piece in pieces],
            options,
            group.coefficients,
            None if group.step_keys is None else [piece.keys(group.step_keys) for piece in pieces],
            self.grad_scale,
            self._skip,
        )
        for piece, new in zip(pieces, split(weights, shapes), strict=True):
            scatter(new, piece.parameters)

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
        self._places: dict[Tensor, tuple[int, _Batch, _Stack, int]] = {}
        self._groups = []
        for i, options in enumerate(self.param_groups):
            parameters: list[Tensor] = options["params"]
            names = options.get("param_names") or [f"{i}.{place}" for place in range(len(parameters))]
            stacks: list[_Stack] = []
            order: list[int] = []
            device = parameters[0].device if parameters else torch.device("cpu")
            max_elements = self.max_batch_elements or (_CPU_BATCH_ELEMENTS if device.type == "cpu" else _BATCH_ELEMENTS)
            for places in stacks_of(parameters, max_elements):
                members = [parameters[place] for place in places]
                stacks.append(_Stack(members, self._row_shape(members[0].shape), len(order)))
                order += places
            batches = _batches_of(stacks, max_elements)
            self._places |= {
                parameter: (i, batch, stack, row)
                for batch in batches
                for stack in batch.stacks
                for row, parameter in enumerate(stack.parameters)
            }
            keys = name_keys([names[place] for place in order], device) if self._rounds(options, stacks) else None
            step = torch.zeros((), dtype=torch.float32, device=device)
            self._groups.append(_Group(batches, step, keys))
            self._adopt_state(self._groups[-1], options)
        return self._groups

    def _rounds(self, options: dict[str, Any], stacks: list[_Stack]) -> bool:
        """Whether anything of a group is rounded stochastically."""
        dtypes = {stack.parameters[0].dtype for stack in stacks}
        for stack in stacks:
            dtypes |= {dtype for _, dtype in self._state_shapes(options, stack.parameters[0]).values()}
        return options["stochastic_rounding"] and torch.bfloat16 in dtypes

    def _make_state(self, group: _Group, options: dict[str, Any], batch: _Batch) -> None:
        """Zeros for all stacks of a batch, and `self.state` of its parameters as views of them."""
        shapes = [self._state_shapes(options, stack.parameters[0]) for stack in batch.stacks]
        counts = [len(stack.parameters) for stack in batch.stacks]
        device = batch.stacks[0].parameters[0].device
        for name in dict.fromkeys(chain.from_iterable(shapes)):
            of_name = [(stack, n, *shape[name]) for stack, n, shape in zip(batch.stacks, counts, shapes, strict=True) if name in shape]
            sizes = [n * math.prod(shape) for _, n, shape, _ in of_name]
            batch.state[name] = torch.zeros(sum(sizes), dtype=of_name[0][3], device=device)
            for (stack, n, shape, _), rows in zip(of_name, batch.state[name].split(sizes), strict=True):
                stack.state[name] = rows.view(n, *shape)
        for stack in batch.stacks:
            rows = {name: tensor.unbind(0) for name, tensor in stack.state.items()}
            for row, parameter in enumerate(stack.parameters):
                self.state[parameter] = {"step": group.step, **{name: tensors[row] for name, tensors in rows.items()}}

    def _adopt_state(self, group: _Group, options: dict[str, Any]) -> None:
        """Copy the state of a group's parameters into its batches."""
        steps: dict[int, Tensor] = {}
        for batch in group.batches:
            found = {parameter: self.state.get(parameter) for stack in batch.stacks for parameter in stack.parameters}
            if not any(found.values()):
                continue
            self._make_state(group, options, batch)
            for stack in batch.stacks:
                _copy_state(stack, [found[parameter] for parameter in stack.parameters], steps, type(self).__name__)
        counts = {float(step) for step in steps.values()} if len(steps) > 1 else set()
        if len(counts) > 1:
            raise ValueError(f"the parameters of a group have made {sorted(counts)} steps; {type(self).__name__} counts one number a group")
        for step in steps.values():
            group.step.copy_(step)


def _with_gradients(stack: _Stack) -> list[_Piece]:
    """The rows of a stack that have gradients: all together, or one by one where some have none."""
    rows = [row for row, parameter in enumerate(stack.parameters) if parameter.grad is not None]
    if len(rows) == len(stack.parameters):
        return [_Piece(stack, 0, len(rows))]
    return [_Piece(stack, row, row + 1) for row in rows]


def _batches_of(stacks: Sequence[_Stack], max_elements: int) -> list[_Batch]:
    """Small stacks of one dtype and device together, up to `max_elements`."""
    batches: list[_Batch] = []
    open_batches: dict[tuple[torch.dtype, torch.device], tuple[_Batch, int]] = {}
    for stack in sorted(stacks, key=lambda stack: stack.num_elements):
        alike = (stack.parameters[0].dtype, stack.parameters[0].device)
        batch, size = open_batches.get(alike, (None, 0))
        if batch is None or size + stack.num_elements > max_elements:
            batch, size = _Batch([]), 0
            batches.append(batch)
        batch.stacks.append(stack)
        open_batches[alike] = (batch, size + stack.num_elements)
    return batches


def _copy_state(stack: _Stack, found: Sequence[State | None], steps: dict[int, Tensor], owner: str) -> None:
    """Copy the state of the parameters of a stack into it, and collect their counts of steps, each tensor once."""
    shapes = {name: tuple(rows.shape[1:]) for name, rows in stack.state.items()}
    for row, one in enumerate(found):
        if not one:
            continue
        given = {name: tuple(tensor.shape) for name, tensor in one.items() if name != "step"}
        if "step" not in one or given != shapes:
            shape = tuple(stack.parameters[row].shape)
            raise ValueError(f"the state of a parameter of shape {shape} is {given}; {owner} needs step and {shapes}")
        steps[id(one["step"])] = torch.as_tensor(one["step"], dtype=torch.float32)
        for name, rows in stack.state.items():
            rows[row].copy_(one[name])
