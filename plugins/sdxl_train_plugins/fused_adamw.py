"""AdamW in torch's own kernel, which reads and writes each number once. Imported by the plugin when it is built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdxl_train_plugins.masked_step import MaskedStep


class FusedAdamW(MaskedStep):
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) by the kernel that torch.optim.AdamW has for `fused = true`.

    What torch's class lacks is a step that is scaled without GradScaler, and one of a single parameter; see
    `sdxl_train/masked_optimizer.py`. There is one step counter a group: it counts also for parameters that have no gradient in a step.
    State has the dtype of its parameter, and must lie in memory as it does; so must gradients, as those of autograd do.

    Args:
        params: as torch's.
        lr: >= 0.

    Attributes:
        grad_scale, found_inf: as in `MaskedStep`; gradients are divided in place, and the mask is 0 or 1.
        step_key: not used, since nothing is rounded stochastically.
        state_class: train states name it; the states of both are alike, and those of earlier versions are of that one.
    """

    state_class = "sdxl_train_plugins.adamw.StackedAdamW"

    _groups: dict[Tensor, dict[str, Any]] | None = None  # made when first needed

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        # `fused` lets torch's `load_state_dict` bring the counters to the device.
        options = {"eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize, "fused": True}
        super().__init__(params, {"lr": lr, "betas": tuple(betas), **options})

    def _update_all(self) -> None:
        for group in self.param_groups:
            self._update(group, [parameter for parameter in group["params"] if parameter.grad is not None])

    @torch.no_grad()
    def begin_step(self) -> None:
        """Count a step, unless `found_inf` says otherwise."""
        for group in self.param_groups:
            if group["params"]:
                step = self._counter(group)
                step.add_(1 if self.found_inf is None else 1 - self.found_inf)

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """Update one parameter from its `grad`, after `begin_step`, as `step` would bit for bit."""
        if self._groups is None:
            self._groups = {one: group for group in self.param_groups for one in group["params"]}
        self._update(self._groups[parameter], [parameter])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self._groups = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: the groups do not fit, or the parameters of a group have made different numbers of steps.
        """
        super().load_state_dict(state_dict)
        self._groups = None
        for group in self.param_groups:
            states = [self.state[parameter] for parameter in group["params"] if parameter in self.state]
            counts = {float(state["step"]) for state in states}
            if len(counts) > 1:
                raise ValueError(f"the parameters of a group have made {sorted(counts)} steps; FusedAdamW counts one number a group")
            for state in states:
                state["step"] = states[0]["step"]

    def _counter(self, group: dict[str, Any]) -> Tensor:
        """The steps of a group, 0-dim float32, which the states of all its parameters share."""
        parameters: Sequence[Tensor] = group["params"]
        for parameter in parameters:
            if parameter in self.state:
                return self.state[parameter]["step"]
        step = torch.zeros((), dtype=torch.float32, device=parameters[0].device)
        self._make_state(parameters[0], group, step)
        return step

    def _make_state(self, parameter: Tensor, group: dict[str, Any], step: Tensor) -> None:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        self.state[parameter] = {"step": step, **{name: torch.zeros_like(parameter) for name in names}}

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        step = self._counter(group)
        for parameter in parameters:
            if parameter not in self.state:
                self._make_state(parameter, group, step)
        states = [self.state[parameter] for parameter in parameters]
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [step] * len(parameters),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
        )
