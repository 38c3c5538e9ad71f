"""Requests to a training that runs: `sdxl-train ctl DIR save|sample|stop` writes them, the loop reads them at the end of a step."""

from __future__ import annotations

import os
from pathlib import Path

from sdxl_train.errors import ConfigError
from sdxl_train.output_dir import is_in_use

CONTROL_NAME = "control"
REQUESTS = ("save", "sample", "stop")


def send_request(output_dir: Path, request: str) -> None:
    """Ask the training in a project folder. It may be read twice where both sides are at the file at once, but is never lost.

    Raises:
        ConfigError: no such request, or no training runs there.
    """
    if request not in REQUESTS:
        raise ConfigError(f"ctl: {request!r} is no request; there are {', '.join(REQUESTS)}")
    if not is_in_use(output_dir):
        raise ConfigError(f"ctl: no training runs in {output_dir}; name the folder that it printed as output_dir")
    path = output_dir / CONTROL_NAME
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, f"{request}\n".encode())
            written = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        try:
            if os.path.samestat(written, os.stat(path)):
                return
        except FileNotFoundError:  # it was being read
            continue


def take_requests(output_dir: Path) -> list[str]:
    """What was asked since the last call, each once; costs one look at the folder where nothing was."""
    path = output_dir / CONTROL_NAME
    if not os.path.exists(path):  # also where the folder cannot be looked at now
        return []
    taken = path.with_name(f"{CONTROL_NAME}.taken")
    os.replace(path, taken)
    lines = taken.read_text("utf-8", "replace").split()
    taken.unlink()
    return list(dict.fromkeys(lines))


def forget_requests(output_dir: Path) -> None:
    """At the start of a run: nothing was asked of it yet."""
    for name in (CONTROL_NAME, f"{CONTROL_NAME}.taken"):
        (output_dir / name).unlink(missing_ok=True)
