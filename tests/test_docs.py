"""What the pages show works: their code runs, their configurations validate, and the status names the commands that are not built."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli

from sdxl_train.config import load_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "example-plugin" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a block of a guide may leave to the rest of the file.
REST = {"pretrained_model_name_or_path": "base.safetensors", "image_dirs": ["pictures"], "output_dir": "out", "sample_benchmark": "benchmark.json"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def file_name(block: str) -> str:
    """The name in the first line of a block, `# name`; empty without one."""
    found = re.match(r"# (\S+\.\w+)\n", block)
    return found[1] if found else ""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what configurations in the pages name."""
    for folder in ("pictures", "models"):
        (tmp_path / folder).mkdir()
    for name in ("base.safetensors", "models/sd_xl_base_1.0.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "benchmark.json").write_text('[{"prompt": "a cat"}]')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def validate(place: Path) -> Callable[[str], None]:
    """Checks a configuration as a run would, with what it leaves out filled in."""

    def validating(text: str) -> None:
        missing = [f"{key} = {json.dumps(value)}" for key, value in REST.items() if key not in tomli.loads(text)]
        (place / "sdxl.toml").write_text("\n".join(missing) + "\n" + text, "utf-8")
        assert not load_settings(place / "sdxl.toml").warnings

    return validating


def test_the_python_and_toml_of_the_plugin_guide_work_together(place: Path, validate: Callable[[str], None]) -> None:
    page = ROOT / "docs" / "writing-plugins.md"
    for block in blocks(page, "python"):
        assert file_name(block), f"a block without a file name in its first line:\n{block}"
        (place / file_name(block)).write_text(block, "utf-8")
    configurations = [block for block in blocks(page, "toml") if file_name(block) == "sdxl.toml"]
    assert len(configurations) >= 4
    for configuration in configurations:
        validate(configuration)


def test_the_tests_of_the_plugin_guide_pass(place: Path) -> None:
    codes = blocks(ROOT / "docs" / "writing-plugins.md", "python")
    for block in codes:
        (place / file_name(block)).write_text(block, "utf-8")
    names: dict[str, Callable[..., None]] = {}
    exec(next(block for block in codes if file_name(block) == "test_my_plugins.py"), names)
    tests = [name for name in names if name.startswith("test_")]
    assert len(tests) == 3
    for name in tests:
        (place / name).mkdir()
        names[name](*([place / name] if "training" in name else []))


def test_the_packaging_of_the_plugin_guide_declares_entry_points() -> None:
    block = next(block for block in blocks(ROOT / "docs" / "writing-plugins.md", "toml") if file_name(block) == "pyproject.toml")
    assert list(tomli.loads(block)["project"]["entry-points"]) == ["sdxl_train.loss_weightings"]


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/quickstart.zh.md"])
def test_the_configurations_for_beginners_validate(page: str, validate: Callable[[str], None]) -> None:
    found = blocks(ROOT / page, "toml")
    assert found
    for block in found:
        validate(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_of_toml_json_and_python_can_be_parsed(page: Path) -> None:
    for block in blocks(page, "toml"):
        tomli.loads(block)
    for block in blocks(page, "json"):
        json.loads(block)
    if page.name != "hooks.md":  # its blocks are signatures
        for block in blocks(page, "python"):
            compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_fence_has_a_language_or_closes_a_block(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text("utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0 and not any(fences[1::2])


def test_the_two_quick_starts_show_the_same_files() -> None:
    for language in ("toml", "json", "text"):
        assert blocks(ROOT / "docs" / "quickstart.md", language) == blocks(ROOT / "docs" / "quickstart.zh.md", language)
