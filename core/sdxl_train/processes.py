"""Training and sampling in several processes, which a launcher starts."""

from __future__ import annotations

import os

from sdxl_train.errors import ConfigError


def refuse_several_processes(doing: str) -> None:
    """
    Args:
        doing: what was asked for: "training", "sampling".
    Raises:
        ConfigError: this process is one of several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{doing} in several processes is not built yet in this version; start sdxl-train alone")
