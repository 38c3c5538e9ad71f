"""Whether a hook was answered with the right type, shape and dtype."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

Arguments = Mapping[str, Any]


def wrong_answer(hook: str, answer: Any, arguments: Arguments) -> str | None:
    """What is wrong with one plugin's answer ("expected ..., got ..."), or None when it is right or the hook takes no answer."""
    check = _CHECKS.get(hook)
    expected = check(answer, arguments) if check else None
    return f"expected {expected}, got {describe(answer)}" if expected else None


def describe(answer: Any) -> str:
    """An answer in a few words: a tensor by dtype and shape, anything else by type and value."""
    if hasattr(answer, "dtype") and hasattr(answer, "shape"):
        attached = "" if getattr(answer, "requires_grad", True) else ", detached"
        return f"{type(answer).__name__} {list(answer.shape)} {answer.dtype}{attached}"
    text = repr(answer)
    return "None" if answer is None else f"{type(answer).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def _repeats(answer: Any, _: Arguments) -> str | None:
    expected = "an integer >= 0"
    if isinstance(answer, bool):
        return expected
    try:
        return None if operator.index(answer) >= 0 else expected
    except TypeError:
        return expected


def _text(answer: Any, _: Arguments) -> str | None:
    return None if isinstance(answer, str) else "a str"


def _reason(answer: Any, _: Arguments) -> str | None:
    return None if answer is None or isinstance(answer, str) else "a reason (str) or None"


def _metadata(answer: Any, _: Arguments) -> str | None:
    is_right = isinstance(answer, dict) and all(isinstance(part, str) for entry in answer.items() for part in entry)
    return None if is_right else "a dict of str to str"


def _optimizer(answer: Any, arguments: Arguments) -> str | None:
    from torch.optim import Optimizer

    if not isinstance(answer, Optimizer):
        return "a torch.optim.Optimizer"
    given = [id(parameter) for group in arguments["param_groups"] for parameter in group["params"]]
    held = [id(parameter) for group in answer.param_groups for parameter in group["params"]]
    return None if sorted(given) == sorted(held) else "an optimizer over exactly the parameters of param_groups"


def _lr_scheduler(answer: Any, _: Arguments) -> str | None:
    from torch.optim.lr_scheduler import LRScheduler

    return None if isinstance(answer, LRScheduler) else "a torch.optim.lr_scheduler.LRScheduler"


def _timesteps(answer: Any, arguments: Arguments) -> str | None:
    import torch

    size, low, high = arguments["batch_size"], arguments["min_timestep"], arguments["max_timestep"]
    expected = f"int64 timesteps of shape [{size}] in [{low}, {high})"
    if not isinstance(answer, torch.Tensor) or answer.shape != (size,) or answer.dtype != torch.int64:
        return expected
    if answer.device.type != "cpu":  # reading it would wait for the device; the device itself stops on it instead
        torch._assert_async(((answer >= low) & (answer < high)).all())  # pyright: ignore[reportPrivateImportUsage]
        return None
    return None if all(low <= timestep < high for timestep in answer.tolist()) else expected


def _noise(answer: Any, arguments: Arguments) -> str | None:
    import torch

    noise = arguments["noise"]
    is_right = isinstance(answer, torch.Tensor) and answer.shape == noise.shape and answer.dtype == torch.float32
    return None if is_right else f"noise of shape {list(noise.shape)} torch.float32"


def _loss(answer: Any, arguments: Arguments) -> str | None:
    import torch

    model_pred = arguments["model_pred"]
    is_right = isinstance(answer, torch.Tensor) and answer.shape == model_pred.shape[:1] and answer.dtype == torch.float32
    if is_right and (answer.requires_grad or not model_pred.requires_grad):
        return None
    return f"one loss per sample, [{model_pred.shape[0]}] torch.float32, attached to model_pred's graph"


def _factors(answer: Any, arguments: Arguments) -> str | None:
    import torch

    timesteps = arguments["timesteps"]
    is_right = isinstance(answer, torch.Tensor) and answer.shape == timesteps.shape and answer.is_floating_point()
    return None if is_right else f"one factor per sample, {list(timesteps.shape)} floating point"


def _sampler(answer: Any, _: Arguments) -> str | None:
    is_right = all(hasattr(answer, name) for name in ("set_timesteps", "scale_model_input", "step"))
    return None if is_right else "a diffusers scheduler"


_CHECKS: dict[str, Callable[[Any, Arguments], str | None]] = {
    "count_repeats": _repeats,
    "process_caption": _text,
    "process_description": _text,
    "build_optimizer": _optimizer,
    "build_lr_scheduler": _lr_scheduler,
    "sample_timesteps": _timesteps,
    "shape_noise": _noise,
    "shape_input_noise": _noise,
    "compute_loss": _loss,
    "weigh_loss": _factors,
    "should_stop": _reason,
    "should_save": _reason,
    "should_sample": _reason,
    "checkpoint_metadata": _metadata,
    "build_sampler": _sampler,
}
