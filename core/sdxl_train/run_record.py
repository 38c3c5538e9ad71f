"""What a training was started with, kept beside its logs: `logs/<time>/run.json`."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sdxl_train.atomic import atomic_file
from sdxl_train.config import Settings
from sdxl_train.errors import ConfigError
from sdxl_train.plugins import Loaded
from sdxl_train.run import Run

RECORD_NAME = "run.json"
MASKED = "***"

_DISTRIBUTIONS = ("sdxl-train", "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "pillow")
# An option with such a name holds a secret. Not any name with "token" or "key" in it: max_token_length is none.
_SECRET_NAME = re.compile(
    r"password|passwd|passphrase|secret|credential|(^|_)(api_?key|access_?key|private_?key|auth|pwd|tokens?)$", re.IGNORECASE
)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def write_run_record(run: Run, settings: Settings) -> None:
    """Write `run.json` into the run's log folder.

    Raises:
        ConfigError: it cannot be written.
    """
    path = run.log_dir / RECORD_NAME
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(run_record(run, settings), indent=2, ensure_ascii=False, default=str) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir: {path} cannot be written: {error.strerror or error}") from error


def run_record(run: Run, settings: Settings) -> dict[str, Any]:
    """What decides how a run goes, without secrets and without the environment's variables.

    Returns:
        `started`: local time with its offset. `step`: completed steps at this start. `output_dir`: resolved. `num_train_steps`.
        `configuration`: every effective key. `given`: the keys that the user set. `plugins`: see `plugin_record`. `environment`.
    """
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": run.step,
        "num_train_steps": run.num_train_steps,
        "output_dir": str(run.output_dir),
        "configuration": without_secrets(settings.values),
        "given": sorted(settings.given),
        "plugins": [plugin_record(plugin) for plugin in settings.plugins.loaded],
        "environment": environment(run.device),
    }


def plugin_record(plugin: Loaded) -> dict[str, str | None]:
    """A plugin by its TOML key and name.

    Returns:
        `key`, `name`; `distribution` and `version` of the package that brings it, both None for a file or an import path;
        `source`: "module:attribute" of an entry point, else the file or module.
    """
    target = plugin.target
    point = target.point
    dist = point.dist if point else None
    return {
        "key": target.key.key,
        "name": target.name,
        "distribution": dist.name if dist else None,
        "version": dist.version if dist else None,
        "source": point.value if point else target.origin,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """The software and the machine, as far as results and speed depend on them."""
    is_cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "distributions": {name: _version(name) for name in _DISTRIBUTIONS},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine(),
        "device_bytes": torch.cuda.get_device_properties(device).total_memory if is_cuda else None,
        "cuda": torch.version.cuda if is_cuda else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def without_secrets(value: Any, name: str = "") -> Any:
    """A value of the configuration with `***` for what an option of such a name keeps secret, and for logins in addresses."""
    if value is not None and _SECRET_NAME.search(name):
        return MASKED
    if isinstance(value, Mapping):
        return {str(inner): without_secrets(item, str(inner)) for inner, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return _LOGIN_IN_URL.sub(MASKED, value) if isinstance(value, str) else value


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
