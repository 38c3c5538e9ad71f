"""The optimizers. Their rates come with the parameter groups, so `lr` is no option."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

import sdxl_train
from sdxl_train import hookimpl, option

if TYPE_CHECKING:
    from torch.optim import Optimizer

log = logging.getLogger("sdxl_train.optimizer_type")  # a child of the logger whose warnings the run shows

Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


class AdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101): 8 bytes of state per parameter in float32, 4 in bfloat16."""

    class Options(sdxl_train.Options):
        betas: tuple[Decay, Decay] = option(
            (0.9, 0.999),
            "share of the old running mean of the gradient, and of its square, kept at each step",
            zh="梯度及其平方的滑动平均系数",
        )
        eps: float = option(1e-8, "added to the denominator for numerical stability", zh="分母的数值稳定项", ge=0)
        weight_decay: float = option(
            1e-2, "share of each weight, times the learning rate, removed at each step; 0 turns it off", zh="权重衰减；0 为关闭", ge=0
        )
        amsgrad: bool = option(
            False, "divide by the largest running mean of squares so far (AMSGrad); half as much state again", zh="使用 AMSGrad 变体"
        )
        maximize: bool = option(False, "climb the loss instead of descending it; false is training", zh="最大化目标而非最小化")
        stochastic_rounding: bool = option(
            True,
            "round bfloat16 weights (full_bf16) up or down at random so that small updates are not lost; false rounds to nearest; "
            "no effect on float32 weights",
            zh="对 bfloat16 权重（full_bf16）使用随机舍入，避免丢失小的更新；false 为就近舍入；对 float32 权重无影响",
        )
        state_dtype: Literal["float32", "bfloat16"] | None = option(
            None,
            "number format of the running means; absent: bfloat16 for bfloat16 weights that are rounded stochastically, else float32",
            zh="滑动平均的数值格式；缺省：随机舍入的 bfloat16 权重用 bfloat16，其余用 float32",
        )
        foreach: bool | None = option(
            None,
            "torch.optim.AdamW does the update, for all parameters at once (true) or one by one (false); absent: as fused says",
            zh="由 torch.optim.AdamW 更新：true 为一次更新全部参数，false 为逐个更新；缺省见 fused",
        )
        capturable: bool = option(
            False,
            "torch.optim.AdamW does the update, fit for CUDA graphs; false is the usual",
            zh="由 torch.optim.AdamW 更新，允许在 CUDA graph 中捕获",
        )
        differentiable: bool = option(
            False,
            "torch.optim.AdamW does the update, and autograd sees it; false is the usual",
            zh="由 torch.optim.AdamW 更新，允许对更新步骤求导",
        )
        fused: bool | None = option(
            None,
            "torch's kernel does the update (true), or torch.optim.AdamW without it (false); absent: the kernel for float32 weights and "
            "means, stacks of equal shapes for all others",
            zh="true 使用 torch 的融合核更新，false 由 torch.optim.AdamW 更新；缺省：float32 权重与滑动平均使用融合核，其余按形状分组更新",
        )

        @property
        def by_torch(self) -> dict[str, Any]:
            """The options that ask for torch's code, where they are set."""
            given = {"foreach": self.foreach, "capturable": self.capturable, "differentiable": self.differentiable, "fused": self.fused}
            return {name: value for name, value in given.items() if value is not None and (value or name in ("foreach", "fused"))}

        @property
        def of_torch(self) -> dict[str, Any]:
            """The same where they need torch.optim.AdamW; `fused` alone asks for its kernel only."""
            return {} if self.by_torch == {"fused": True} else self.by_torch

        @model_validator(mode="after")
        def _has_one_way_to_update(self) -> AdamW.Options:
            if self.fused and (self.foreach or self.differentiable):
                raise ValueError("fused excludes foreach and differentiable; set one of them to true")
            if self.by_torch and self.state_dtype is not None:
                raise ValueError(f"state_dtype excludes {' and '.join(self.by_torch)}: torch's AdamW keeps state as it keeps the weights")
            if self.state_dtype == "bfloat16" and not self.stochastic_rounding:
                raise ValueError('state_dtype = "bfloat16" needs stochastic_rounding: rounded to nearest, running means come to a halt')
            return self

        def problem_with_keys(self, keys: Mapping[str, Any]) -> str | None:
            if not self.by_torch:
                return None
            updated_by = f"optimizer_kwargs.{next(iter(self.by_torch))} is set, so torch.optim.AdamW does the update, which"
            if self.of_torch and keys["fused_backward"]:
                return f"{updated_by} cannot step tensor by tensor; leave it out, or set fused_backward = false"
            if keys["full_bf16"] and self.stochastic_rounding:
                return (
                    f"{updated_by} rounds bfloat16 weights to nearest; leave it out, or set optimizer_kwargs.stochastic_rounding = false"
                )
            return None

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def build_optimizer(self, param_groups: list[dict[str, Any]]) -> Optimizer:
        import torch

        from sdxl_train_plugins.adamw import StackedAdamW
        from sdxl_train_plugins.fused_adamw import FusedAdamW

        options = self._options
        shared = options.model_dump(include={"betas", "eps", "weight_decay", "amsgrad", "maximize"})
        if options.of_torch:
            return torch.optim.AdamW(param_groups, **shared, **options.of_torch)
        dtypes = {parameter.dtype for group in param_groups for parameter in group["params"]}
        if options.fused or (options.fused is None and dtypes == {torch.float32} and options.state_dtype != "bfloat16"):
            return FusedAdamW(param_groups, **shared)
        dtype = getattr(torch, options.state_dtype) if options.state_dtype else None
        return StackedAdamW(param_groups, **shared, state_dtype=dtype, stochastic_rounding=options.stochastic_rounding)


class AdaFactor:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) as in transformers: the state of a matrix is one row and one column.

    Convolution kernels are factored as matrices too, [out, in * height * width].
    """

    class Options(sdxl_train.Options):
        relative_step: bool = option(
            False,
            "let the optimizer set its own rate from the step, at most 0.01; false uses the learning rates of the file",
            zh="由优化器自行决定学习率，至多 0.01；false 使用配置中的学习率",
        )
        scale_parameter: bool = option(
            False, "multiply the rate of each tensor by the tensor's root mean square; false turns it off", zh="按参数的均方根缩放学习率"
        )
        warmup_init: bool = option(
            False,
            "begin with a rate of 1e-6 that rises by as much at each step; sets relative_step to true",
            zh="学习率从 1e-6 开始逐步上升；会将 relative_step 设为 true",
        )
        eps: tuple[NonNegative, NonNegative] = option(
            (1e-30, 1e-3),
            "added to the squared gradient, and the least root mean square that scale_parameter assumes",
            zh="梯度平方与参数尺度的数值稳定项",
        )
        clip_threshold: float = option(
            1.0, "root mean square to which the update of each tensor is clipped", zh="每个张量更新量的均方根上限", gt=0
        )
        decay_rate: float = option(
            -0.8, "the running mean of squares keeps 1 - step ** decay_rate of its old value", zh="二阶矩衰减的指数", lt=0
        )
        beta1: Decay | None = option(
            None,
            "share of the old running mean of the update that is kept; absent: no running mean and no memory for it",
            zh="一阶矩的滑动平均系数；缺省为不使用",
        )
        weight_decay: float = option(
            0.0, "share of each weight, times the learning rate, removed at each step; 0 turns it off", zh="权重衰减；0 为关闭", ge=0
        )

        stochastic_rounding: bool = option(
            True,
            "round bfloat16 weights (full_bf16) up or down at random so that small updates are not lost; false rounds to nearest; "
            "no effect on float32 weights",
            zh="对 bfloat16 权重（full_bf16）使用随机舍入，避免丢失小的更新；false 为就近舍入；对 float32 权重无影响",
        )

        _is_forced: bool = PrivateAttr(False)  # relative_step is on because warmup_init is

        @model_validator(mode="after")
        def _warmup_needs_its_own_rate(self) -> AdaFactor.Options:
            if self.warmup_init and not self.relative_step:
                object.__setattr__(self, "relative_step", True)  # the options are frozen from here on
                self._is_forced = True
            return self

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def build_optimizer(self, param_groups: list[dict[str, Any]]) -> Optimizer:
        from sdxl_train_plugins.adafactor import StackedAdafactor

        if self._options._is_forced:
            log.warning("optimizer_kwargs.warmup_init = true: the optimizer sets its own rate (relative_step = true)")
        if self._options.relative_step:
            param_groups = [{name: value for name, value in group.items() if name != "lr"} for group in param_groups]
        return StackedAdafactor(param_groups, **self._options.model_dump())
