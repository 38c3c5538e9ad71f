"""The rules that join several keys (errors, exit 2) and the settings that have no effect (warnings)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdxl_train.learning_rates import block_rates
from sdxl_train.model.attention import active_backend, backend_problem

Values = Mapping[str, Any]
Rule = tuple[tuple[str, ...], str]
Note = tuple[str, str]


def broken_rules(values: Values, bad: set[str], needs: set[str]) -> Iterator[Rule]:
    """(keys, message) for each broken rule; rules about a key in `bad` are left out, since its value is already refused.

    Args:
        values: every effective key.
        needs: what the command works with: "data", "training", "samples".
    """
    for rule in (_precision, _attention, _steps, _fused, _schedule, _sampling, _inputs):
        yield from (found for found in rule(values, needs) if not bad & set(found[0]))


def warnings(values: Values, given: set[str]) -> Iterator[str]:
    """One line for each setting that will have no effect, or that is probably a mistake.

    Args:
        given: the keys that the file or --set names.
    """
    for text, holds in _WARNINGS.items():
        if holds(values, given):
            yield text


def _precision(values: Values, _: set[str]) -> Iterator[Rule]:
    if values["full_bf16"] and values["full_fp16"]:
        yield ("full_bf16", "full_fp16"), "full_bf16 and full_fp16 are both true; choose one"
    for key, precision in (("full_bf16", "bf16"), ("full_fp16", "fp16")):
        if values[key] and values["mixed_precision"] != precision:
            yield (key, "mixed_precision"), f'{key} = true needs mixed_precision = "{precision}", got "{values["mixed_precision"]}"'
    if values["cpu"] and (values["mixed_precision"] == "fp16" or values["full_fp16"]):
        yield ("cpu", "mixed_precision"), 'cpu = true cannot run mixed_precision = "fp16"; use "bf16" or "no"'


def _attention(values: Values, needs: set[str]) -> Iterator[Rule]:
    if needs & {"training", "cache", "samples"} and (problem := backend_problem(values)) is not None:
        yield (active_backend(values), "cpu"), problem


def _steps(values: Values, needs: set[str]) -> Iterator[Rule]:
    low, high = values["min_timestep"], values["max_timestep"]
    if low >= high:
        yield ("min_timestep", "max_timestep"), f"min_timestep = {low} must be below max_timestep = {high}"
    if values["resolution"] < values["bucket_reso_step"]:
        yield (
            ("resolution", "bucket_reso_step"),
            (f"resolution = {values['resolution']} must not be below bucket_reso_step = {values['bucket_reso_step']}"),
        )
    trains_text = values["train_text_encoder"] and any(
        values["learning_rate"] if values[key] is None else values[key] for key in ("learning_rate_te1", "learning_rate_te2")
    )
    by_block = values["block_lr"] is not None
    if by_block and values["learning_rate"] == 0:
        yield ("block_lr", "learning_rate"), "block_lr with learning_rate = 0: leave block_lr out, or set a learning_rate"
    elif "training" in needs and not trains_text and not any(block_rates(values["block_lr"]) if by_block else [values["learning_rate"]]):
        key = "block_lr" if by_block else "learning_rate"
        yield (key,), f"{key} = 0 leaves nothing to train"


def _fused(values: Values, needs: set[str]) -> Iterator[Rule]:
    if "training" not in needs or not values["fused_backward"]:
        return
    for key, neutral, why in (
        ("gradient_accumulation_steps", 1, "each gradient is used up by the first backward pass"),
        ("max_grad_norm", 0, "the total norm is known only when all gradients are there"),
    ):
        if values[key] != neutral:
            yield ("fused_backward", key), f"fused_backward = true needs {key} = {neutral}, got {values[key]}: {why}"
    if values["mixed_precision"] == "fp16":
        yield ("fused_backward", "mixed_precision"), 'fused_backward = true excludes mixed_precision = "fp16": an overflow shows too late'


def _schedule(values: Values, _: set[str]) -> Iterator[Rule]:
    if values["lr_scheduler"] and values["lr_scheduler"].startswith("adafactor") and not _sets_own_rate(values):
        name, found = values["lr_scheduler"], values["optimizer_type"]
        yield (
            ("lr_scheduler", "optimizer_type", "optimizer_kwargs"),
            f'lr_scheduler = "{name}" needs optimizer_type = "AdaFactor" with optimizer_kwargs.relative_step = true, got "{found}"'
            + (" with relative_step = false" if _is_adafactor(found) else ""),
        )


def _sampling(values: Values, needs: set[str]) -> Iterator[Rule]:
    if values["sample_benchmark"] is None:
        for key in ("sample_every_n_epochs", "sample_every_n_steps"):
            if values.get(key):
                yield (key, "sample_benchmark"), f"{key} = {values[key]} needs sample_benchmark, the JSON file with what to render"
        if "samples" in needs:
            yield ("sample_benchmark",), "sample_benchmark is needed: the JSON file with what to render"


def _inputs(values: Values, needs: set[str]) -> Iterator[Rule]:
    if "data" in needs:
        if not values["image_dirs"] and not values["metadata_files"]:
            yield ("image_dirs", "metadata_files"), "image_dirs and metadata_files are both empty: there is nothing to train on"
        for folder in values["image_dirs"]:
            if not Path(folder).is_dir():
                yield ("image_dirs",), f"image_dirs: {folder} is {'not a folder' if Path(folder).exists() else 'missing'}"
        for file in values["metadata_files"]:
            if not Path(file).is_file():
                yield ("metadata_files",), f"metadata_files: {file} is {'not a file' if Path(file).exists() else 'missing'}"
    for key in ("pretrained_model_name_or_path", "vae"):
        if needs & {"training", "cache", "samples"} and values.get(key) and not Path(values[key]).exists():
            yield (key,), f"{key}: {values[key]} is missing"
    if values["sample_benchmark"] is not None and not Path(values["sample_benchmark"]).is_file():
        yield ("sample_benchmark",), f"sample_benchmark: {values['sample_benchmark']} is missing"


def schedule_warnings(values: Values, num_train_steps: int) -> list[str]:
    """What of the schedule does not fit the number of steps, which is known once the data are read."""
    warmup, name = values["lr_warmup_steps"], values["lr_scheduler"]
    if warmup < max(1, num_train_steps) or name in ("constant", "piecewise_constant") or name.startswith("adafactor"):
        return []
    return [f"lr_warmup_steps = {warmup}: the run has only {num_train_steps} steps, so the learning rate never reaches its height"]


def _text_rates(values: Values, given: set[str]) -> bool:
    return not values["train_text_encoder"] and bool({"learning_rate_te1", "learning_rate_te2"} & given)


def _is_adafactor(name: object) -> bool:
    """Also of `package.Adafactor` and `./file.py:Adafactor`."""
    return isinstance(name, str) and _last_part(name) == "adafactor"


def _last_part(name: str) -> str:
    return re.split(r"[.:]", name)[-1].casefold()


def _sets_own_rate(values: Values) -> bool:
    """Whether the optimizer is an Adafactor that computes its rate itself; warmup_init implies it."""
    options = values.get("optimizer_kwargs")
    asked = isinstance(options, Mapping) and any(options.get(name) is True for name in ("relative_step", "warmup_init"))
    return asked and _is_adafactor(values.get("optimizer_type", "AdaFactor"))


def _adafactor_alone(values: Values) -> bool:
    return _is_adafactor(values["optimizer_type"]) and not _sets_own_rate(values)


def follow_relative_step(data: Values) -> tuple[dict[str, Any], list[Note]]:
    """What an Adafactor that computes its rate itself leaves of the schedule's keys: only what is reported before its first step.

    Args:
        data: the file's keys, unchecked.
    Returns:
        (the keys in effect, (key, note) for each that changes or has no effect).
    """
    name, rate = data.get("lr_scheduler"), data.get("learning_rate", 1e-5)
    result, notes = dict(data), list[Note]()
    is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
    reporting = f"adafactor:{rate:g}" if is_number else "adafactor"
    if name == "adafactor":
        result["lr_scheduler"] = reporting
    if not _sets_own_rate(data):
        return result, notes
    options = data["optimizer_kwargs"]
    if options.get("warmup_init") is True and options.get("relative_step") is not True:
        notes.append(("optimizer_kwargs", "optimizer_kwargs.warmup_init = true turns relative_step on"))
    if name is None or (isinstance(name, str) and not name.startswith("adafactor")):
        result["lr_scheduler"] = reporting
        notes.append(("lr_scheduler", f'lr_scheduler is "{reporting}", since Adafactor with relative_step = true sets its own rate'))
        if result.pop("lr_scheduler_kwargs", None):
            notes.append(("lr_scheduler_kwargs", "lr_scheduler_kwargs has no effect with relative_step = true"))
    if data.get("lr_warmup_steps"):
        notes.append(("lr_warmup_steps", "lr_warmup_steps counts as 0 with relative_step = true"))
    result["lr_warmup_steps"] = 0 if isinstance(data.get("lr_warmup_steps", 0), int) else data["lr_warmup_steps"]
    for key in ("learning_rate", "learning_rate_te1", "learning_rate_te2", "block_lr"):
        if data.get(key) and (key != "learning_rate" or result["lr_scheduler"] != reporting):
            notes.append((key, f"{key} sets no rate with relative_step = true"))
    return result, notes


def _rates(values: Values) -> list[float]:
    """The learning rates of all trained groups, the U-Net's first."""
    rates = [values["learning_rate"]]
    if values["train_text_encoder"]:
        rates += [values["learning_rate"] if values[key] is None else values[key] for key in ("learning_rate_te1", "learning_rate_te2")]
    return [rate for rate in rates if rate > 0]


def _finds_its_rate(values: Values) -> bool:
    name = _last_part(values["optimizer_type"])
    return name == "prodigy" or name.startswith("dadapt")


_WARNINGS: dict[str, Callable[[Values, set[str]], bool]] = {
    "scale_v_pred_loss_like_noise_pred has no effect with prediction_type = epsilon": lambda v, _: (
        v["prediction_type"] == "epsilon" and bool(v.get("scale_v_pred_loss_like_noise_pred"))
    ),
    "v_pred_like_loss has no effect with prediction_type = v_prediction": lambda v, _: (
        v["prediction_type"] == "v_prediction" and bool(v.get("v_pred_like_loss"))
    ),
    "zero_terminal_snr is meant for v_prediction: epsilon learns nothing at SNR 0, and samples keep the plain schedule": lambda v, _: (
        v["zero_terminal_snr"] and v["prediction_type"] == "epsilon"
    ),
    "adaptive_noise_scale has no effect without noise_offset": lambda v, _: (
        v.get("adaptive_noise_scale") is not None and not v.get("noise_offset")
    ),
    "learning_rate_te1 and learning_rate_te2 have no effect without train_text_encoder": _text_rates,
    "no save trigger is active: this run will save nothing": lambda v, _: (
        not v["save_model"] or not any(v.get(_SAVE_KEYS.get(name, ""), True) for name in v["save_triggers"])
    ),
    "bucket_reso_step is not a multiple of 32; 32 or 64 is recommended": lambda v, _: v["bucket_reso_step"] % 32 != 0,
    "persistent_data_loader_workers has no effect with max_dataloader_n_workers = 0": lambda v, _: (
        v["persistent_data_loader_workers"] and v["max_dataloader_n_workers"] == 0
    ),
    "max_grad_norm with Adafactor: it clips by itself (clip_threshold); the two add up": lambda v, _: (
        _adafactor_alone(v) and v["max_grad_norm"] != 0
    ),
    "Adafactor with relative_step = false is usually run with lr_scheduler = constant_with_warmup": lambda v, _: (
        _adafactor_alone(v) and v["lr_scheduler"] != "constant_with_warmup"
    ),
    "Adafactor is usually run with clip_threshold = 1": lambda v, _: (
        _adafactor_alone(v) and v["optimizer_kwargs"].get("clip_threshold", 1.0) != 1.0
    ),
    "learning_rate is a factor on the rate that D-adaptation and Prodigy find: 1 is usual, 0.1 or less probably a mistake": lambda v, _: (
        _finds_its_rate(v) and min(_rates(v), default=1.0) <= 0.1
    ),
    "learning_rate differs between the trained parts, but D-adaptation and Prodigy use the first rate only": lambda v, _: (
        _finds_its_rate(v) and (len(set(_rates(v))) > 1 or bool(v["block_lr"]))
    ),
    "block_lr is deprecated": lambda v, _: v["block_lr"] is not None,
    "lr_warmup_steps has no effect with this lr_scheduler": lambda v, given: (
        v["lr_scheduler"] in ("constant", "piecewise_constant") and "lr_warmup_steps" in given and v["lr_warmup_steps"] != 0
    ),
}
_SAVE_KEYS = {
    "steps": "save_every_n_steps",
    "epochs": "save_every_n_epochs",
    "train_end": "save_on_train_end",
    "keyboard_interrupt": "save_on_keyboard_interrupt",
    "exception": "save_on_exception",
}
