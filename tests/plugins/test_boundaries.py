"""What the built-in plugins may import, and what importing them may load."""

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import sdxl_train
from sdxl_train.options import option_help
from sdxl_train.plugin_keys import PLUGIN_KEYS

PACKAGE = Path(__file__).parents[2] / "plugins" / "sdxl_train_plugins"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
# What optimizers are made of: torch cannot be imported later where a class derives from one of its own. They are imported when built.
OF_TORCH = {"adafactor", "adamw", "fused_adamw", "masked_step", "shape_stacks", "stacked_optimizer", "stacked_update", "stochastic_rounding"}
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "tensorboard", "scipy")


def test_importing_every_built_in_plugin_loads_no_heavy_library() -> None:
    imports = "; ".join(f"import sdxl_train_plugins.{module}" for module in MODULES if module not in OF_TORCH)
    code = f"import sys; {imports}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("module", MODULES)
def test_built_in_plugins_use_only_the_public_api(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not [name.name for name in node.names if name.name.startswith("sdxl_train.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sdxl_train":
            assert node.module == "sdxl_train"
            assert {name.name for name in node.names} <= set(sdxl_train.__all__)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sdxl_train":
            assert node.attr in sdxl_train.__all__


def test_every_option_is_described_in_both_languages() -> None:
    entries = [entry for row in PLUGIN_KEYS.values() for entry in entry_points(group=row.group)]
    plugins = [entry.load() for entry in entries if entry.module.startswith("sdxl_train_plugins.")]
    described = 0
    for plugin in plugins:
        for name in plugin.Options.model_fields if hasattr(plugin, "Options") else ():
            english, chinese = option_help(plugin.Options, name), option_help(plugin.Options, name, "zh")
            assert english and chinese != english, f"{plugin.__name__}.{name}"
            described += 1
    assert described > 30
