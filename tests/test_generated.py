"""Generated pages say what the declarations say, and the installed entry points are those of pyproject.toml."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from sdxl_train.config import load_settings
from sdxl_train.plugin_keys import PLUGIN_KEYS
from sdxl_train.plugins import HOOK_NAMES

ROOT = Path(__file__).parents[1]
PAGES = ["sdxl.toml.example", "docs/configuration.md", "docs/configuration.zh.md", "docs/hooks.md", "tests/golden/hookspecs.txt"]


def test_the_generated_files_are_current(tmp_path: Path) -> None:
    before = {page: (ROOT / page).read_bytes() for page in PAGES}
    try:
        subprocess.run([sys.executable, str(ROOT / "tools" / "write_generated.py")], check=True, capture_output=True, cwd=ROOT)
        stale = [page for page in PAGES if (ROOT / page).read_bytes() != before[page]]
    finally:
        for page, content in before.items():
            (ROOT / page).write_bytes(content)
    assert not stale, "refresh them with: python tools/write_generated.py"


def test_the_example_configuration_validates(tmp_path: Path) -> None:
    (tmp_path / "base.safetensors").touch()
    settings = [f'pretrained_model_name_or_path="{tmp_path}/base.safetensors"', f'image_dirs=["{tmp_path}"]', "metadata_files=[]"]
    assert load_settings(ROOT / "sdxl.toml.example", settings).config.batch_size == 1


def test_the_example_names_every_options_table() -> None:
    example = (ROOT / "sdxl.toml.example").read_text(encoding="utf-8")
    assert [key.options_key for key in PLUGIN_KEYS.values() if f"[{key.options_key}" not in example] == []


def test_entry_points_are_those_of_pyproject() -> None:
    declared = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    installed = {(point.group, point.name, point.value) for point in importlib.metadata.distribution("sdxl-train").entry_points}
    for group, points in declared.items():
        for name, value in points.items():
            assert (group, name, value) in installed, 'install again: pip install -c constraints.txt -e ".[test]"'


def test_every_hook_is_documented() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert [hook for hook in HOOK_NAMES if hook not in page] == []


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]))
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
