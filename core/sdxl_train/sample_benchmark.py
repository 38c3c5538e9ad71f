"""The pictures a user wants to see rendered: the JSON list of `sample_benchmark`, filled from `sample_params`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdxl_train.errors import ConfigError
from sdxl_train.keys import SampleParams

MAX_BENCHMARK_BYTES = 64 << 20
NULLABLE = ("seed", "original_width", "original_height")
SIDE_STEP_PX = 32
MIN_SIDE_PX = 64


@dataclass(frozen=True)
class SampleEntry:
    """One entry of the benchmark with nothing left out; it gives `batch_size * batch_count` pictures.

    Attributes:
        scale: of classifier-free guidance; 1 or less means none, and no negative pass.
        seed: of the entry's first picture, picture b has seed + b; None: to be drawn at random.
        width, height: picture size in px, multiples of 32 and at least 64.
        original_width, original_height: size told to the model as the original one, in px; None: see `original_size`.
        save_latents: also decode and save every denoising step.
    """

    prompt: str
    negative_prompt: str
    steps: int
    batch_size: int
    batch_count: int
    scale: float
    seed: int | None
    width: int
    height: int
    original_width: int | None
    original_height: int | None
    original_scale_factor: float
    save_latents: bool

    @property
    def num_pictures(self) -> int:
        return self.batch_size * self.batch_count

    @property
    def original_size(self) -> tuple[int, int]:
        """(w, h) in px told to the model: the original sides if both are given, else the picture's times `original_scale_factor`."""
        if self.original_width is not None and self.original_height is not None:
            return self.original_width, self.original_height
        return round(self.width * self.original_scale_factor), round(self.height * self.original_scale_factor)


def read_benchmark(path: Path, sample_params: SampleParams, warn: Callable[[str], None]) -> list[SampleEntry]:
    """The entries of a benchmark file, in its order.

    A field that an entry leaves out comes from `sample_params`. An explicit null stays null: a random seed, or no original side.

    Args:
        warn: told of fields that are no sampling parameters.
    Raises:
        ConfigError: the file is missing, not UTF-8, not JSON or no list, or entries are wrong: all of them in one message.
    """
    listed = _read_list(path)
    problems: list[str] = []
    entries: list[SampleEntry] = []
    for i, fields in enumerate(listed):
        where = f"{path}: entry {i}"
        if not isinstance(fields, dict):
            problems.append(f"{where} must be an object like {{\"prompt\": \"a cat\"}}, got {_shown(fields)}")
            continue
        unknown = [name for name in fields if name not in SampleParams.model_fields]
        if unknown:
            warn(f"{where}: ignored {', '.join(map(_shown, unknown))}: no sampling parameter")
        given = {name: value for name, value in fields.items() if name not in unknown}
        found = list(_field_problems(given, sample_params))
        problems += [f"{where}: {problem}" for problem in found]
        if not found:
            entries.append(_merged(given, sample_params))
    if problems:
        raise ConfigError("\n".join(problems))
    return entries


def _merged(given: dict[str, Any], sample_params: SampleParams) -> SampleEntry:
    values = {**sample_params.model_dump(), **given}
    if values["seed"] == -1:
        values["seed"] = None
    for side in ("width", "height"):
        values[side] = max(MIN_SIDE_PX, values[side] // SIDE_STEP_PX * SIDE_STEP_PX)
    for factor in ("scale", "original_scale_factor"):
        values[factor] = float(values[factor])
    return SampleEntry(**values)


def _field_problems(given: dict[str, Any], sample_params: SampleParams) -> Iterator[str]:
    """What is wrong with the fields of one entry; `SampleParams` holds their types and bounds."""
    for name, value in given.items():
        if value is None and name not in NULLABLE:
            yield f"{name} may not be null; leave it out to take it from sample_params"
        if isinstance(value, str) and not _is_unicode(value):
            yield f"{name} holds half of a surrogate pair (\\ud800 ... \\udfff), which is no character"
    checked = {name: value for name, value in given.items() if value is not None}
    for side in ("width", "height"):
        if type(checked.get(side)) is int and checked[side] > 0:
            checked[side] = max(MIN_SIDE_PX, checked[side])  # the TOML bound is 64; an entry is raised to it
    try:
        SampleParams.model_validate(checked, strict=True)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            yield f"{'.'.join(map(str, one['loc']))}: {one['msg']}, got {_shown(one['input'])}"
    seed = given.get("seed", sample_params.seed)
    if type(seed) is int and seed >= 2**63:
        yield f"seed must be below 2**63, got {_shown(seed)}"
    if "prompt" not in given and sample_params.prompt is None:
        yield "no prompt, and none in sample_params; give one in either"


def _read_list(path: Path) -> list[Any]:
    if not path.is_file():
        raise ConfigError(f"sample_benchmark: {path} is {'no regular file' if path.exists() else 'missing'}")
    try:
        if path.stat().st_size > MAX_BENCHMARK_BYTES:
            raise ConfigError(f"sample_benchmark: {path} is larger than {MAX_BENCHMARK_BYTES >> 20} MiB")
        listed = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_number)
    except OSError as error:
        raise ConfigError(f"sample_benchmark: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"sample_benchmark: {path} is not UTF-8: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"sample_benchmark: {path} is nested too deeply; it must be a list of objects") from error
    except ValueError as error:  # json.JSONDecodeError names line and column
        raise ConfigError(f"sample_benchmark: {path} is not valid JSON: {error}") from error
    if not isinstance(listed, list):
        raise ConfigError(f"sample_benchmark: {path} must hold a list of objects, got {_shown(listed)}")
    return listed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_shown(max(names, key=names.count))} is given twice in one object")
    return read


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _shown(value: object) -> str:
    """A value for a message: as JSON with everything but ASCII escaped, cut to a line."""
    try:
        text = json.dumps(value)
    except ValueError:  # an integer of more than 4300 digits
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a value too long to show"
    return text if len(text) <= 80 else text[:77] + "..."
