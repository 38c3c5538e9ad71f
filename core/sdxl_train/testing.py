"""For tests of plugins: a check of one plugin by itself, and a small training with it through the command line."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdxl_train.data.image_info import ImageInfo
from sdxl_train.data.metadata import complete
from sdxl_train.errors import PluginError
from sdxl_train.plugin_functions import FunctionPlugin
from sdxl_train.plugin_keys import PLUGIN_KEYS
from sdxl_train.plugins import Choice, Loaded, Plugins
from sdxl_train.randomness import FetchRandom, StepRandom, sample_place
from sdxl_train.retrieval import Retrieval, retrieval_accuracy
from sdxl_train.toml_text import toml_document

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_train.data.batches import Batch

__all__ = ["Outcome", "Retrieval", "TrainingProject", "check_plugin", "retrieval_accuracy", "training_project"]

_COUNTER = {"artist": {"some_artist": 3}, "characters": {}, "styles": {"sketch": 2}, "quality": {"best": 3}, "category": {"pictures": 3}}
_SEED = 1


def check_plugin(key: str, name: str, **options: Any) -> None:
    """Load a plugin as a run would, and hold its answers to the rules of the hooks.

    Each hook that needs no run is asked twice, on two instances: the answers have the right type, shape and range; they are equal; a
    sample's answer does not depend on what else is in the batch; the arguments are left as they were. Hooks that take `run` need a
    training: see `training_project`.

    Args:
        key: the TOML key that names the plugin.
        name: as in the TOML file: an entry-point name, an import path or a file.
        options: the plugin's options, flat keys included.
    Raises:
        PluginError: a rule is broken; names plugin, hook and rule.
    """
    choices = [Choice(other.key, other.default[0]) for other in PLUGIN_KEYS.values() if other.kind == "pick" and other.key != key]
    plugins = Plugins([*choices, Choice(key, name, options)], _SEED)
    plugin = plugins.loaded[-1]
    checks: dict[str, Callable[[Plugins, Loaded], None]] = {
        "count_repeats": lambda both, it: _check_datum_hook(both, it, "count_repeats"),
        "process_caption": lambda both, it: _check_datum_hook(both, it, "process_caption"),
        "process_description": lambda both, it: _check_datum_hook(both, it, "process_description"),
        "build_optimizer": lambda both, it: _check_training_parts(both),
        "build_lr_scheduler": lambda both, it: _check_training_parts(both),
        "build_sampler": lambda both, it: _check_sampler(both),
        **{hook: lambda both, it, hook=hook: _check_step_hook(both, it, hook) for hook in _STEP_ARGUMENTS},
    }
    for hook, check in checks.items():
        if plugin.instance.hook == hook if isinstance(plugin.instance, FunctionPlugin) else hasattr(plugin.instance, hook):
            check(plugins, plugin)


def _check_datum_hook(plugins: Plugins, plugin: Loaded, hook: str) -> None:
    def arguments() -> dict[str, Any]:
        metadata = complete({"caption": "1girl, sketch, best quality", "artist": "some artist", "description": "A sketch."}, "picture.png")
        size, texts = (64, 96), (metadata["caption"], metadata["description"])
        info = ImageInfo("picture", metadata, *texts, size, size, (8, 12), size, 1, None, metadata["image_path"])
        if hook == "count_repeats":
            return {"img_key": info.key, "img_md": metadata, "counter": copy.deepcopy(_COUNTER)}
        random = FetchRandom(sample_place(_SEED, 1, info.key, 0), hook)
        return {"img_info": info, "counter": copy.deepcopy(_COUNTER), "flip_aug": False, "random": random}

    first = arguments()
    answer = getattr(plugins.hooks, hook)(**first)
    if first["counter"] != _COUNTER:
        raise PluginError(f"{plugin.target} changes the counter in {hook}; it is the same for all plugins")
    if getattr(plugins.rebuilt().hooks, hook)(**arguments()) != answer:
        raise PluginError(f"{plugin.target} answers {hook} differently for the same picture; draw from `random` only and keep no state")


def _check_step_hook(plugins: Plugins, plugin: Loaded, hook: str) -> None:
    import torch

    def ask(asked: Plugins, keys: list[str]) -> tuple[Tensor, dict[str, Any]]:
        arguments = _STEP_ARGUMENTS[hook](_batch(keys))
        before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        answer = getattr(asked.hooks, hook)(**arguments)
        changed = [name for name, value in before.items() if not torch.equal(value, arguments[name])]
        if changed:
            raise PluginError(f"{plugin.target} changes its argument {', '.join(changed)} in {hook}; answer a new tensor")
        return torch.stack(answer).prod(0) if isinstance(answer, list) else answer, arguments

    answer, _ = ask(plugins, ["a", "b"])
    if not bool(torch.isfinite(answer).all()):
        raise PluginError(f"{plugin.target} answers {hook} with numbers that are not finite")
    if not torch.equal(ask(plugins.rebuilt(), ["a", "b"])[0], answer):
        raise PluginError(f"{plugin.target} answers {hook} differently for the same batch; draw from `random` only")
    for row, key in enumerate(("a", "b")):
        if not torch.allclose(ask(plugins, [key])[0][0], answer[row], rtol=1e-4, atol=1e-5):
            raise PluginError(f"{plugin.target}: what {hook} answers for a sample depends on the others of its batch; draw from `random`")


def _batch(keys: list[str]) -> Batch:
    import torch

    from sdxl_train.data.batches import Batch

    class Rows:
        """Stands in for the index of a data set, which knows the metadata of each row."""

        def metadata(self, i: int) -> dict[str, Any]:
            return complete({"caption": f"picture {i}"}, f"{i}.png")

    places, size = [sample_place(_SEED, 1, key, 0) for key in keys], len(keys)
    drawn = StepRandom(places, "check")
    ids = torch.zeros(size, 1, 77, dtype=torch.int64)
    return Batch(
        keys=keys,
        captions=[f"picture {key}" for key in keys],
        flipped=[False] * size,
        original_sizes=[(64, 96)] * size,
        crops=[(0, 0)] * size,
        target_sizes=[(64, 96)] * size,
        data=list(range(size)),
        places=places,
        te1_ids=ids,
        te2_ids=ids,
        noise=drawn.normal(4, 8, 12),
        latents=drawn.normal(4, 8, 12),
        index=cast(Any, Rows()),
    )


def _timesteps(batch: Batch) -> Tensor:
    """The last timestep, whose SNR is 0 with zero_terminal_snr, for sample "a"; one in the middle for the others."""
    import torch

    return torch.tensor([999 if key == "a" else 500 for key in batch.keys])


def _snr(batch: Batch) -> Tensor:
    from sdxl_train.diffusion import NoiseSchedule

    return NoiseSchedule("v_prediction", zero_terminal_snr=True).snr(_timesteps(batch))


_STEP_ARGUMENTS: dict[str, Callable[[Batch], dict[str, Any]]] = {
    "sample_timesteps": lambda batch: {
        "batch_size": len(batch),
        "min_timestep": 100,
        "max_timestep": 900,
        "batch": batch,
        "random": StepRandom(batch.places, "sample_timesteps"),
    },
    "shape_noise": lambda batch: {
        "noise": batch.noise,
        "latents": batch.latents,
        "timesteps": _timesteps(batch),
        "batch": batch,
        "random": StepRandom(batch.places, "shape_noise"),
    },
    "shape_input_noise": lambda batch: {
        "noise": batch.noise,
        "timesteps": _timesteps(batch),
        "batch": batch,
        "random": StepRandom(batch.places, "shape_input_noise"),
    },
    "compute_loss": lambda batch: {
        "model_pred": batch.noise.clone().requires_grad_(),
        "target": batch.latents,
        "timesteps": _timesteps(batch),
        "batch": batch,
        "snr": _snr(batch),
    },
    "weigh_loss": lambda batch: {
        "timesteps": _timesteps(batch),
        "snr": _snr(batch),
        "prediction_type": "v_prediction",
        "batch": batch,
    },
}


def _check_training_parts(plugins: Plugins) -> None:
    """An optimizer and its schedule take two steps."""
    import torch

    weight = torch.nn.Parameter(torch.ones(4, 4))
    groups = [{"name": "unet", "params": [weight], "lr": 1e-3}]
    optimizer = plugins.hooks.build_optimizer(param_groups=groups)
    lr_scheduler = plugins.hooks.build_lr_scheduler(optimizer=optimizer, num_warmup_steps=1, num_training_steps=2)
    for _ in range(2):
        weight.square().sum().backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()


def _check_sampler(plugins: Plugins) -> None:
    from sdxl_train.diffusion import NoiseSchedule

    plugins.hooks.build_sampler(noise_scheduler=NoiseSchedule("epsilon", False)).set_timesteps(4)


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        saved: the model files of the project, by name.
        metrics: the lines of metrics.jsonl, in order of steps.
    """

    exit_code: int
    stdout: str
    stderr: str
    saved: tuple[Path, ...]
    metrics: tuple[dict[str, Any], ...]

    def assert_success(self) -> Outcome:
        """This outcome itself, if the command succeeded; else an AssertionError with what it said."""
        assert self.exit_code == 0, f"exit code {self.exit_code}\n{self.stderr}"
        return self


@dataclass(frozen=True)
class TrainingProject:
    """A folder with a tiny base model, four pictures and a configuration."""

    folder: Path
    config: Path

    def run(self, *arguments: str, timeout_s: float = 300, **environment: str) -> Outcome:
        """Train in a process of its own, with `folder` as the working directory.

        Args:
            arguments: further ones of `sdxl-train FILE.toml`, such as "--set", "seed=7".
            environment: variables added to those of this process.
        """
        command = [sys.executable, "-m", "sdxl_train.cli", str(self.config), *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        ended = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
        lines = [line for file in sorted(self.folder.glob("out/logs/*/metrics.jsonl")) for line in file.read_text().splitlines()]
        saved = tuple(sorted(self.folder.glob("out/models/*.safetensors")))
        return Outcome(ended.returncode, ended.stdout, ended.stderr, saved, tuple(json.loads(line) for line in lines))


def training_project(folder: Path, **keys: Any) -> TrainingProject:
    """Write what a short training on the CPU needs: two epochs of two steps, half a minute at most.

    Args:
        folder: where everything goes; paths in `keys` are relative to it.
        keys: TOML keys that replace or add to those of the project; a mapping becomes a table.
    """
    from PIL import Image

    from sdxl_train.model.tiny import write_tiny_sdxl

    write_tiny_sdxl(folder / "base.safetensors")
    (folder / "pictures").mkdir()
    for number in range(4):
        gradient = Image.linear_gradient("L").rotate(90 * number).resize((64, 64))
        Image.merge("RGB", [gradient, gradient.rotate(90), gradient.rotate(180)]).save(folder / "pictures" / f"picture{number}.png")
        (folder / "pictures" / f"picture{number}.txt").write_text(f"picture {number}, gradient, square", "utf-8")
    values: Mapping[str, Any] = {
        "pretrained_model_name_or_path": "base.safetensors",
        "image_dirs": ["pictures"],
        "output_dir": "out",
        "resolution": 64,
        "cpu": True,
        "num_train_epochs": 2,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "max_dataloader_n_workers": 0,
        "max_token_length": 75,
        "trackers": ["jsonl"],
        **keys,
    }
    config = folder / "sdxl.toml"
    config.write_text(toml_document(values), "utf-8")
    return TrainingProject(folder, config)
