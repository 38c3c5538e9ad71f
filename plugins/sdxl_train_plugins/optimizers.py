"""The optimizers. Their rates come with the parameter groups, so `lr` is no option."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator, model_validator

import sdxl_train
from sdxl_train import hookimpl, option

if TYPE_CHECKING:
    from torch.optim import Optimizer

Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


class AdamW:
    """torch.optim.AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101): 8 bytes of state per parameter in float32."""

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
            False, "divide by the largest running mean of squares so far (AMSGrad); 4 more bytes per parameter", zh="使用 AMSGrad 变体"
        )
        maximize: bool = option(False, "climb the loss instead of descending it; false is training", zh="最大化目标而非最小化")
        foreach: bool | None = option(
            None,
            "update all parameters of a group at once: faster, more memory; absent: as torch chooses",
            zh="成组更新参数，以显存换速度；缺省由 torch 决定",
        )
        capturable: bool = option(
            False, "keep the step counters on the device, for CUDA graphs; false is the usual", zh="允许在 CUDA graph 中捕获"
        )
        differentiable: bool = option(False, "let autograd see the update; false is the usual", zh="允许对更新步骤求导")
        fused: bool | None = option(
            None, "one kernel for the whole update; absent: as torch chooses", zh="使用融合核更新；缺省由 torch 决定"
        )

        @model_validator(mode="after")
        def _has_one_way_to_update(self) -> AdamW.Options:
            if self.fused and (self.foreach or self.differentiable):
                raise ValueError("fused excludes foreach and differentiable; set one of them to true")
            return self

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def build_optimizer(self, param_groups: list[dict[str, Any]]) -> Optimizer:
        import torch

        return torch.optim.AdamW(param_groups, **self._options.model_dump())


class AdaFactor:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) as in transformers: the state of a matrix is one row and one column."""

    class Options(sdxl_train.Options):
        relative_step: bool = option(
            False,
            "let the optimizer set its own rate from the step; false uses the learning rates of the file",
            zh="由优化器自行决定学习率",
        )
        scale_parameter: bool = option(
            False, "multiply the rate of each tensor by the tensor's root mean square; false turns it off", zh="按参数的均方根缩放学习率"
        )
        warmup_init: bool = option(
            False, "begin with a low rate that rises with the step; needs relative_step", zh="相对步长从低学习率开始"
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

        @field_validator("relative_step", "warmup_init")
        @classmethod
        def _is_built_by_this_version(cls, is_on: bool) -> bool:
            if is_on:
                raise ValueError("this version builds no Adafactor that sets its own rate; leave it false and set learning_rate")
            return is_on

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def build_optimizer(self, param_groups: list[dict[str, Any]]) -> Optimizer:
        from transformers.optimization import Adafactor

        return Adafactor(param_groups, **self._options.model_dump())
