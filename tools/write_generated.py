"""Writes the files that are generated from the declarations in the source. Run it by `make generated`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdxl_train.reference import example_toml
from sdxl_train.reference_pages import configuration_page, hooks_page, hookspecs_golden

ROOT = Path(__file__).parent.parent
# Built-in plugins only: what else is installed on the machine that runs this is nobody else's concern.
GENERATED: dict[str, Callable[[], str]] = {
    "sdxl.toml.example": lambda: example_toml(built_in_only=True),
    "docs/configuration.md": lambda: configuration_page("en"),
    "docs/configuration.zh.md": lambda: configuration_page("zh"),
    "docs/hooks.md": hooks_page,
    "tests/golden/hookspecs.txt": hookspecs_golden,
}


def write_generated() -> None:
    """Write every generated file that is out of date, and say which."""
    for name, generate in GENERATED.items():
        path, text = ROOT / name, generate()
        if not path.exists() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"wrote {name}")


if __name__ == "__main__":
    write_generated()
