"""What an optimizer may offer beyond torch's interface: a step that is scaled, masked on the device, tensor by tensor or compiled.

It is found by its attributes, so an optimizer of anybody's may offer it; the documentation of `build_optimizer` names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class CompiledUpdate(Protocol):
    """An optimizer whose update can be compiled, which the key `compile` asks for."""

    def compile_update(self) -> None:
        """From now on compile what is computed in an update, when it is first needed."""
        ...


@runtime_checkable
class MaskedOptimizer(Protocol):
    """An optimizer whose step needs no answer from the device before it is queued.

    `grad_scale` and `found_inf` are torch's own convention of fused optimizers (`_step_supports_amp_scaling`), which
    `torch.amp.GradScaler` uses too: it deletes them after the step, so they have to be None on the class.

    Attributes:
        grad_scale: gradients are divided by it before anything else; None counts as 1. 0-dim float32, on the parameters' device.
        found_inf: where it is 1, the step changes nothing: no weight, no state, no counter; None counts as 0. 0-dim float32, there too.
        step_key: 16 bytes that stand for (seed, step). Random bits of stochastic rounding follow from them, the parameter's name
            (`param_names` of its group) and the place in the tensor alone.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None
    step_key: bytes

    def begin_step(self) -> None:
        """Before the first `step_parameter` of a step: count it, unless `found_inf` says otherwise. `step` does this by itself."""
        ...

    def step_parameter(self, parameter: Tensor) -> None:
        """Update one parameter from its `grad`, as `step` would; the caller frees the gradient."""
        ...
