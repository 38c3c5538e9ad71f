"""Train states as files: what is compared between two trainings, and states that were changed by hand."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def by_step(folder: Path) -> list[Path]:
    """What a folder of models or states holds under final names, the earliest step first."""
    found = [path for path in folder.iterdir() if ".old-" not in path.name and not path.name.startswith(".")]
    return sorted(found, key=lambda path: int(path.stem.rpartition("step")[2]))


def content_of_state(state: Path, *left_out: str) -> dict[str, bytes]:
    """Everything of a state but its time and configuration, which hold the clock and paths, and these entries of `state.json`."""
    found = {path.name: path.read_bytes() for path in state.iterdir()}
    known = json.loads(found.pop("state.json"))
    assert found.pop("manifest.json")
    return found | {name: json.dumps(value).encode() for name, value in known.items() if name not in ("time", "config", *left_out)}


def final(out: Path, *left_out: str) -> dict[str, bytes]:
    """The newest state and model of a project folder, as `content_of_state`."""
    return content_of_state(by_step(out / "train_state")[-1], *left_out) | {"model": by_step(out / "models")[-1].read_bytes()}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """What two results of `final` do not share."""
    return [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]


def change_state(state: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `state.json` of a state, which stays complete: its manifest is written anew."""
    file, manifest = state / "state.json", state / "manifest.json"
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))
    listed = json.loads(manifest.read_bytes())
    listed["state.json"] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(listed))
