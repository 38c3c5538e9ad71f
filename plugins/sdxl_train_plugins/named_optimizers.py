"""Optimizers that other packages bring: the documented names, every class of pytorch_optimizer and torch.optim, and `package.Class`.

Which arguments one takes is known by its constructor alone, so options are checked when a training starts. What can be known without
importing the package (that it is there, which names it has) is known to every command.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict

import sdxl_train
from sdxl_train import PluginError, hookimpl

if TYPE_CHECKING:
    from torch.optim import Optimizer

OPTIMIZERS_EXTRA = {"pytorch_optimizer": 'pip install "sdxl-train[optimizers]"'}
# Built for trial before the training; a class of the user's own is built once, by the training.
TRIED_PACKAGES = ("torch", "pytorch_optimizer", "bitsandbytes", "dadaptation")


class NamedOptimizer:
    """An optimizer class of another package; its constructor says what `optimizer_kwargs` may hold.

    Attributes:
        path: the class, as `package.module.Class`.
        defaults: arguments that are given unless the user gives them.
        needs_packages: what must be installed, each with how to install it.
    """

    class Options(sdxl_train.Options):
        model_config = ConfigDict(extra="allow")

        def problem_with_keys(self, keys: Mapping[str, Any]) -> str | None:
            name = keys["optimizer_type"]
            if not keys["fused_backward"] or ("." in name and name.partition(".")[0] not in TRIED_PACKAGES):
                return None  # what a class of anybody's offers is seen when it is made
            return f"fused_backward = true needs an optimizer that can step tensor by tensor (AdaFactor, AdamW); {name} cannot"

    path: ClassVar[str]
    defaults: ClassVar[dict[str, Any]] = {}
    needs_packages: ClassVar[dict[str, str]] = {}

    def __init__(self, options: Options) -> None:
        self._given: dict[str, Any] = dict(options.model_extra or {})

    @hookimpl
    def build_optimizer(self, param_groups: list[dict[str, Any]]) -> Optimizer:
        optimizer_class = load_optimizer_class(self.path)
        parameters = inspect.signature(optimizer_class).parameters
        arguments = {**self.defaults, **self._given}
        for name, value in arguments.items():
            if isinstance(value, list) and name in parameters and isinstance(parameters[name].default, tuple):
                arguments[name] = tuple(value)
        if "lr" in parameters and parameters["lr"].default is inspect.Parameter.empty:
            arguments["lr"] = param_groups[0]["lr"]  # the groups' own rates count
        if "relative_step" in parameters:  # the rates of the file count, as for AdaFactor, unless the optimizer is asked to set its own
            arguments["relative_step"] = arguments.get("relative_step", False) or arguments.get("warmup_init", False)
            if arguments["relative_step"]:
                param_groups = [{name: value for name, value in group.items() if name != "lr"} for group in param_groups]
        return optimizer_class(param_groups, **arguments)

    def library_problems(self) -> Iterator[tuple[str, str]]:
        """(option, or "" for the optimizer itself; what is wrong), as the imported class says."""
        try:
            optimizer_class = load_optimizer_class(self.path)
        except PluginError as error:
            yield "", str(error)
            return
        found = [*unfit_arguments(optimizer_class, self._given), *unsuited(optimizer_class, {*self.defaults, *self._given})]
        if not found and self.path.partition(".")[0] in TRIED_PACKAGES:
            found = list(self._trial())
        yield from found

    def _trial(self) -> Iterator[tuple[str, str]]:
        """Two steps on a few small tensors, without touching a global random generator."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        shapes = ((4,), (8, 4), (4, 4, 3, 3))
        weights = [torch.nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel(), device=device).view(shape)) for shape in shapes]
        doing = "cannot be made with these optimizer_kwargs"
        try:
            with torch.random.fork_rng():
                optimizer = self.build_optimizer([{"name": "unet", "params": weights, "lr": 1e-3}])
                doing = "cannot train here"
                for _ in range(2):
                    for weight in weights:
                        weight.grad = weight.detach().clone()
                    optimizer.step()
        except Exception as error:  # whatever a foreign class raises is the cause to show
            yield "", f"{self.path} {doing}: {type(error).__name__}: {error}"


def load_optimizer_class(path: str) -> type[Any]:
    """Import `package.module.Class`.

    Raises:
        PluginError: it is not there, or no torch optimizer.
    """
    from torch.optim import Optimizer

    module_name, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a foreign package may raise anything while it is imported
        raise PluginError(f"the optimizer {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, Optimizer)):
        raise PluginError(f"{path} is no torch.optim.Optimizer")
    return found


def unfit_arguments(optimizer_class: type[Any], given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The given arguments that a class does not take. Its `**kwargs` count for nothing where the package ignores what is in it."""
    _, *parameters = inspect.signature(optimizer_class).parameters.values()
    takes = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and one.name != "lr"]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters) and not optimizer_class.__module__.startswith(TRIED_PACKAGES)
    for name in given:
        if name in ("lr", "params"):
            yield name, f"{name} is no option: the rates come from learning_rate and its like"
        elif name not in takes and not takes_any:
            near = difflib.get_close_matches(name, takes, 1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            yield name, f"{optimizer_class.__name__} takes no {name}{hint} (it takes: {', '.join(takes)})"


def unsuited(optimizer_class: type[Any], given: set[str]) -> Iterator[tuple[str, str]]:
    """Why a class cannot be used by a loop that hands it parameters, gradients and one call of `step`."""
    name, (first, *others) = optimizer_class.__name__, inspect.signature(optimizer_class).parameters.values()
    missing = [one.name for one in others if _is_required(one) and one.name not in {*given, "lr"}]
    if first.name in ("model", "optimizer"):
        yield "", f"{name} is built around a whole {first.name}, not over parameters; choose an optimizer without it"
    elif any(one.name.startswith("lora_") for one in others):
        yield "", f"{name} updates pairs of LoRA matrices, and this trainer trains whole weights; choose another optimizer"
    elif missing:
        yield "", f"{name} needs {', '.join(missing)}; give it in optimizer_kwargs if a TOML value can be it, or choose another optimizer"
    elif any(_is_required(one) for one in list(inspect.signature(optimizer_class.step).parameters.values())[1:]):
        yield "", f"{name} computes the loss several times a step (a closure), which this trainer does not do; choose another optimizer"
    elif callable(getattr(optimizer_class, "train", None)) and callable(getattr(optimizer_class, "eval", None)):
        yield (
            "",
            f"{name} trains other weights than those to be saved, and going from one to the other changes them by rounding, "
            "so saving would change the training; choose an optimizer without train() and eval()",
        )


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


class OptimizerNames:
    """The values of `optimizer_type` beyond the entry points: classes of pytorch_optimizer and torch.optim, and `package.Class`."""

    def names(self) -> list[str]:
        """What is installed, read from the packages' sources."""
        return sorted({*_exported("torch", "optim/__init__.py"), *_exported("pytorch_optimizer", "optimizer/__init__.py")})

    def find(self, name: str) -> tuple[str, type[NamedOptimizer]] | None:
        """The name in its own spelling and the plugin; None for a name of nothing.

        A class that both packages have under one name is torch's, whatever is installed.
        """
        in_torch, in_package = _exported("torch", "optim/__init__.py"), _exported("pytorch_optimizer", "optimizer/__init__.py")
        matches = [known for known in in_package if known.casefold() == name.casefold()]
        for known in (name, *matches):
            if known in in_torch:
                return known, _plugin(f"torch.optim.{known}", {"torch": "pip install torch"})
        if matches:
            return matches[0], _plugin(f"pytorch_optimizer.{matches[0]}", OPTIMIZERS_EXTRA)
        package, dot, _ = name.partition(".")
        if dot and all(part.isidentifier() for part in name.split(".")):
            return name, _plugin(name, {package: f"pip install the package that brings {package}"})
        return None


def _plugin(path: str, needs_packages: dict[str, str]) -> type[NamedOptimizer]:
    name = path.rpartition(".")[2]
    return type(name, (NamedOptimizer,), {"__doc__": f"The class {path}.", "path": path, "needs_packages": needs_packages})


@lru_cache
def _exported(package: str, file: str) -> tuple[str, ...]:
    """The class names that a file of a package imports from the package or from torch.optim; empty where it is not installed.

    The package is not imported: that takes seconds.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return ()
    tree = ast.parse((Path(spec.origin).parent / file).read_text("utf-8"))
    sources = (f"{package}.optimizer.", "torch.optim")
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(sources)]
    names = [alias.asname or alias.name for node in imports for alias in node.names]
    return tuple(name for name in names if name[0].isupper() and name != "Optimizer")


class _OfBitsandbytes(NamedOptimizer):
    needs_packages: ClassVar = {"bitsandbytes": 'pip install "sdxl-train[bitsandbytes]"'}


class AdamW8bit(_OfBitsandbytes):
    """AdamW with 8-bit state (Dettmers et al. 2021, arXiv:2110.02861): 2 bytes a parameter."""

    path = "bitsandbytes.optim.AdamW8bit"


class PagedAdamW8bit(_OfBitsandbytes):
    """AdamW with 8-bit state that moves to host memory when the GPU is full."""

    path = "bitsandbytes.optim.PagedAdamW8bit"


class PagedAdamW32bit(_OfBitsandbytes):
    """AdamW with float32 state that moves to host memory when the GPU is full."""

    path = "bitsandbytes.optim.PagedAdamW32bit"


class Lion8bit(_OfBitsandbytes):
    """Lion with 8-bit state: 1 byte a parameter."""

    path = "bitsandbytes.optim.Lion8bit"


class PagedLion8bit(_OfBitsandbytes):
    """Lion with 8-bit state that moves to host memory when the GPU is full."""

    path = "bitsandbytes.optim.PagedLion8bit"


class SGDNesterov8bit(_OfBitsandbytes):
    """SGD with momentum (0.9 unless given) and 8-bit state; bitsandbytes takes `nesterov` and computes plain momentum."""

    path = "bitsandbytes.optim.SGD8bit"
    defaults: ClassVar = {"momentum": 0.9, "nesterov": True}


class SGDNesterov(NamedOptimizer):
    """torch.optim.SGD with Nesterov momentum, 0.9 unless given."""

    path = "torch.optim.SGD"
    defaults: ClassVar = {"momentum": 0.9, "nesterov": True}


class _OfPytorchOptimizer(NamedOptimizer):
    needs_packages: ClassVar = OPTIMIZERS_EXTRA


class Lion(_OfPytorchOptimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of a running mean; 4 bytes a parameter. A third of AdamW's rate is usual."""

    path = "pytorch_optimizer.Lion"


class Prodigy(_OfPytorchOptimizer):
    """Prodigy (Mishchenko & Defazio 2023, arXiv:2306.06101): finds its own step size; learning_rate = 1 is usual."""

    path = "pytorch_optimizer.Prodigy"


class DAdaptAdam(_OfPytorchOptimizer):
    """Adam with D-adaptation (Defazio & Mishchenko 2023, arXiv:2301.07733); learning_rate = 1 is usual."""

    path = "pytorch_optimizer.DAdaptAdam"


class DAdaptAdaGrad(_OfPytorchOptimizer):
    """AdaGrad with D-adaptation; learning_rate = 1 is usual."""

    path = "pytorch_optimizer.DAdaptAdaGrad"


class DAdaptAdan(_OfPytorchOptimizer):
    """Adan with D-adaptation; learning_rate = 1 is usual."""

    path = "pytorch_optimizer.DAdaptAdan"


class DAdaptLion(_OfPytorchOptimizer):
    """Lion with D-adaptation; learning_rate = 1 is usual."""

    path = "pytorch_optimizer.DAdaptLion"


class DAdaptSGD(_OfPytorchOptimizer):
    """SGD with D-adaptation; learning_rate = 1 is usual."""

    path = "pytorch_optimizer.DAdaptSGD"


class _OfDadaptation(NamedOptimizer):
    needs_packages: ClassVar = {"dadaptation": "pip install dadaptation"}


class DAdaptAdamPreprint(_OfDadaptation):
    """Adam with D-adaptation as in the first preprint; learning_rate = 1 is usual."""

    path = "dadaptation.experimental.DAdaptAdamPreprint"


class DAdaptAdanIP(_OfDadaptation):
    """Adan with D-adaptation by inner products; learning_rate = 1 is usual."""

    path = "dadaptation.experimental.DAdaptAdanIP"
