"""Who may import whom, what loads when, and what is promised."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdxl_train

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "core" / "sdxl_train").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins" / "sdxl_train_plugins").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The modules a file imports at run time (imports for annotations only are left out)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.add(child.module or "")
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "sdxl_train"}


def test_the_core_never_imports_the_plugins() -> None:
    assert [path.name for path in CORE if any(name.startswith("sdxl_train_plugins") for name in imports(path))] == []


def test_the_built_in_plugins_import_only_the_public_api() -> None:
    for path in PLUGINS:
        assert ours(path) <= {"sdxl_train"}, path


@pytest.mark.parametrize("name", ["hookspecs", "errors", "options"])
def test_the_declarations_import_nothing_of_ours(name: str) -> None:
    assert ours(ROOT / "core" / "sdxl_train" / f"{name}.py") == set()


def test_the_public_api_is_this() -> None:
    assert sorted(sdxl_train.__all__) == [
        "CheckpointError", "ConfigError", "DataError", "ImageInfo", "Options", "PluginError", "Run", "SdxlTrainError", "hookimpl", "option",
    ]  # fmt: skip


def test_the_command_line_loads_no_torch() -> None:
    code = "import sys, sdxl_train, sdxl_train.cli, sdxl_train.config; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_files_stay_readable() -> None:
    long = {path.name: n for path in [*CORE, *PLUGINS] if (n := len(path.read_text(encoding="utf-8").splitlines())) > 420}
    assert long == {}


def test_the_source_names_no_machine() -> None:
    for path in [*CORE, *PLUGINS]:
        assert "/work/" not in path.read_text(encoding="utf-8"), path
