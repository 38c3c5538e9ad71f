"""Going on from a train state: which one, whether it may be gone on with, and what of the configuration is new."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train.errors import ConfigError
from sdxl_train.output_dir import free_stamp, matching_output_dirs
from sdxl_train.state_directory import MANIFEST, state_faults, states_in, step_of

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_train.run import Run
    from sdxl_train.train_state import SavedState

LATEST = "latest"
# Keys that name places or are about this start only: a change of them is no change of the training.
_NOT_OF_THE_TRAINING = {"resume_from", "output_dir", "records_cache_dir", "tokenizer_cache_dir"}


def find_state(resume_from: str, pattern: str, warn: Callable[[str], None]) -> tuple[Path, Path | None] | None:
    """(state, its project folder) to go on from. The folder is None where the state is of none that `output_dir` can mean.

    Args:
        resume_from: a state, or "latest": in the folder with the most recently written complete state, the one of the largest step.
        pattern: the key `output_dir`.
        warn: is told of newer states that do not verify.
    Returns:
        None for "latest" where there is no state at all.
    Raises:
        ConfigError: the state, or for "latest" every one, is not complete; the message names the broken file.
    """
    folders = matching_output_dirs(pattern)
    if resume_from == LATEST:
        return _latest(folders, pattern, warn)
    state = Path(resume_from)
    if not state.is_dir():
        raise ConfigError(f"resume_from: {resume_from} is {'no folder' if state.exists() else 'missing'}")
    faults = state_faults(state)
    if faults:
        raise ConfigError(f"resume_from: {resume_from} is not a complete train state: {'; '.join(faults)}")
    return state, next((folder for folder in folders if folder.resolve() == state.resolve().parent.parent), None)


def _latest(folders: list[Path], pattern: str, warn: Callable[[str], None]) -> tuple[Path, Path] | None:
    found = sorted(((_time_written(state), step, state, folder) for folder in folders for step, state in states_in(folder)), reverse=True)
    if not found:
        warn(f'resume_from = "latest": there is no train state in {pattern}; the training begins anew')
        return None
    read: dict[Path, list[str]] = {}

    def is_complete(state: Path) -> bool:
        if state not in read:
            read[state] = state_faults(state)
        return not read[state]

    folder = next((folder for _, _, state, folder in found if is_complete(state)), None)
    newest = next((state for _, state in states_in(folder) if is_complete(state)), None) if folder else None
    broken = [faults[0] for faults in read.values() if faults]
    if newest is None or folder is None:
        raise ConfigError(f'resume_from = "latest": no train state in {pattern} is complete: {"; ".join(broken)}')
    for fault in broken:
        warn(f"a newer train state is passed over: {fault}")
    return newest, folder


def _time_written(state: Path) -> float:
    try:
        return (state / MANIFEST).stat().st_mtime
    except OSError:
        return -math.inf


def set_later_saves_aside(output_dir: Path, output_name: str, step: int, now: datetime, tell: Callable[[str], None]) -> None:
    """Rename the states and models of later steps to `<name>.old-<time>`: the training takes another way from `step` on.

    Raises:
        OSError: from the file system.
    """
    models = output_dir / "models"
    found = [path for later, path in states_in(output_dir) if later > step]
    if models.is_dir():
        named = [(step_of(path.stem), path) for path in sorted(models.glob("*.safetensors"))]
        found += [path for name, path in named if name and name[0] == output_name and name[1] > step]
    stamp = free_stamp(now, lambda stamp: any(os.path.lexists(f"{path}.old-{stamp}") for path in found))
    for path in found:
        kept = path.with_name(f"{path.name}.old-{stamp}")
        path.rename(kept)
        tell(f"{path} is of a later step than the one that is gone on from; it is now {kept}")


def refuse_other_training(now: Mapping[str, Any], saved: SavedState) -> None:
    """
    Args:
        now: `must_match` of the run.
    Raises:
        ConfigError: something that must be the same differs; the message lists all of it.
    """
    then = saved.json["must_match"]
    differing = [f"{name} ({_said(then.get(name))} then, {_said(now[name])} now)" for name in now if then.get(name) != now[name]]
    if differing:
        raise ConfigError(
            f"resume_from: {saved.directory} is of another training: {'; '.join(differing)}. "
            "Set these as they were, or begin anew with a saved model as pretrained_model_name_or_path"
        )


def refuse_other_shapes(now: Mapping[str, Tensor], saved: SavedState) -> None:
    """
    Args:
        now: the trained parameters, by "part.name".
    Raises:
        ConfigError: the state is of a model of the same names and other widths, or lacks a parameter.
    """
    then = {name: tuple(tensor.shape) for name, tensor in saved.weights().items()}
    for name, parameter in now.items():
        shape = tuple(parameter.shape)
        if then.get(name) != shape:
            raise ConfigError(
                f"resume_from: {saved.directory} is of another training: {name} is {then.get(name)} there and {shape} in the model; "
                "pretrained_model_name_or_path must be of the same architecture"
            )


def changes(run: Run, saved: SavedState, environment: Mapping[str, Any]) -> Iterator[str]:
    """One line for each key and each part of the environment that is not as it was."""
    then, now = saved.json["config"], dict(run.config)
    for key in sorted(then.keys() | now.keys()):
        old, new = then.get(key), now.get(key)
        if key not in _NOT_OF_THE_TRAINING and _plain(old) != _plain(new):
            yield f"resuming: {key} was {old!r} and is now {new!r}"
    for name, new in environment.items():
        old = saved.json["environment"].get(name)
        if old != new:
            yield f"resuming: {name} was {old} and is now {new}: not exact, sums may be rounded otherwise than without the interruption"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _said(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:8] + "…"
