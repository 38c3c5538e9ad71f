"""The state of any torch optimizer by parameter names, and back into an optimizer without a change of dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer

_OF_THE_RUN = {"params", "param_names", "name"}
_OF_THE_SCHEDULE = {"lr", "initial_lr"}


def optimizer_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """{"state": by parameter name, "groups": by group name}.

    Args:
        names: of the parameters, by `id`.
    """
    state = optimizer.state_dict()["state"]
    numbered = _numbered(optimizer, names)
    # Sorted: in which order an optimizer made its state is no part of it, and equal states are to give equal files.
    return {"state": {numbered[i]: dict(sorted(state[i].items())) for i in sorted(state)}, "groups": groups_by_name(optimizer)}


def groups_by_name(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The options and counters of each group, without parameters and rates."""
    return {
        group["name"]: {key: value for key, value in group.items() if key not in _OF_THE_RUN | _OF_THE_SCHEDULE}
        for group in optimizer.state_dict()["param_groups"]
    }


def load_optimizer_state(
    optimizer: Optimizer,
    names: Mapping[int, str],
    saved: Mapping[str, Any],
    saved_first: Mapping[str, Mapping[str, Any]],
    now_first: Mapping[str, Mapping[str, Any]],
) -> None:
    """Go on from a saved state. Every tensor keeps its saved dtype; torch's own loading would round moments to their parameter's.

    A value of a group that the configuration gives otherwise than it did then is the new one; all others are those of the state.

    Args:
        saved: from `optimizer_state`.
        saved_first, now_first: `groups_by_name` of the optimizer as it was first made, then and now.
    """
    numbered = _numbered(optimizer, names)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {i: _laid_out_as(parameters[i], saved["state"][name]) for i, name in numbered.items() if name in saved["state"]}
    groups = [dict(group) for group in optimizer.state_dict()["param_groups"]]
    for group in groups:
        name = group["name"]
        for key, value in saved["groups"].get(name, {}).items():
            if key not in now_first[name] or _are_equal(now_first[name][key], saved_first.get(name, {}).get(key)):
                group[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for i, values in state.items():
        optimizer.state[parameters[i]] = _with_dtypes(optimizer.state[parameters[i]], values)


def _numbered(optimizer: Optimizer, names: Mapping[int, str]) -> dict[int, str]:
    """Names by the numbers that `Optimizer.state_dict` gives to parameters."""
    return dict(enumerate(names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]))


def _laid_out_as(parameter: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter, in which tensors of its shape have its strides too: fused kernels take that for granted."""

    def laid_out(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
            return value
        return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)

    return {name: laid_out(value) for name, value in values.items()}


def _with_dtypes(loaded: Any, saved: Any) -> Any:
    """What was loaded, but each tensor that lost its dtype as it was saved."""
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, Mapping) and isinstance(loaded, dict):
        return {key: _with_dtypes(value, saved[key]) if key in saved else value for key, value in loaded.items()}
    if isinstance(saved, list | tuple) and isinstance(loaded, list | tuple) and len(saved) == len(loaded):
        return type(loaded)(_with_dtypes(one, other) for one, other in zip(loaded, saved, strict=True))
    return loaded


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one.cpu(), other.cpu())
    return one == other
