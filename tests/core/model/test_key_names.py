"""The list of tensors of a full SDXL, held against three outside sources: a golden file, diffusers' modules and sd-mecha's list."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_train.model.architecture import METADATA_KEY, SDXL, architecture_from_configs, architecture_from_shapes
from sdxl_train.model.key_names import file_entries, module_name
from sdxl_train.model.tiny import tiny_architecture

GOLDEN = Path(__file__).parents[2] / "golden" / "sdxl_tensors.txt"
ENTRIES = file_entries(SDXL)


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    configs = SDXL.to_diffusers_configs()
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(**configs["unet"]),
            "vae": AutoencoderKL(**configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"])),
        }


def test_a_full_sdxl_has_2515_tensors() -> None:
    assert Counter(entry.part for entry in ENTRIES) == {"unet": 1680, "vae": 248, "text_encoder": 197, "text_encoder_2": 390}
    assert len({entry.name for entry in ENTRIES}) == 2515


def test_names_and_shapes_are_those_of_the_golden_file() -> None:
    lines = sorted(f"{entry.name} {list(entry.shape)}" for entry in ENTRIES)
    assert lines == GOLDEN.read_text(encoding="utf-8").splitlines()


def test_the_unet_has_as_many_parameters_as_published(networks: dict[str, torch.nn.Module]) -> None:
    assert sum(parameter.numel() for parameter in networks["unet"].parameters()) == 2_567_463_684


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_the_entries_cover_each_network_exactly(networks: dict[str, torch.nn.Module], part: str) -> None:
    inside = {module_name(name): tuple(tensor.shape) for name, tensor in networks[part].state_dict().items()}
    assert {module: entry.module_shape for entry in ENTRIES if entry.part == part for module in entry.modules} == inside


def test_names_and_shapes_are_those_of_sd_mecha() -> None:
    yaml = pytest.importorskip("yaml")
    spec = importlib.util.find_spec("sd_mecha")
    if spec is None or spec.origin is None:
        pytest.skip("sd-mecha is not installed")
    text = (Path(spec.origin).parent / "extensions/builtin/model_configs/sdxl-sgm.yaml").read_text(encoding="utf-8")
    components = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["components"]
    listed = {name: tuple(entry["shape"]) for component in components.values() for name, entry in component.items()}
    optional = {name for component in components.values() for name, entry in component.items() if entry.get("optional")}
    ours = {entry.name: entry.shape for entry in ENTRIES}
    assert ours.items() <= listed.items()
    assert set(listed) - set(ours) <= optional  # schedules and markers


def test_the_architecture_follows_from_the_shapes() -> None:
    assert architecture_from_shapes({entry.name: entry.shape for entry in ENTRIES}, {}) == SDXL
    assert SDXL.to_metadata() is None


def test_heads_and_groups_of_another_architecture_come_from_the_metadata() -> None:
    other = tiny_architecture()
    metadata = other.to_metadata()
    assert metadata is not None
    assert architecture_from_shapes({entry.name: entry.shape for entry in file_entries(other)}, {METADATA_KEY: metadata}) == other


@pytest.mark.parametrize("text", ["[", "[]", '{"unet_heads": [0, 1, 1]}', '{"unet_heads": 4}', '{"vae_norm_groups": 3}', '{"x": 1}'])
def test_a_damaged_metadata_entry_is_refused(text: str) -> None:
    shapes = {entry.name: entry.shape for entry in file_entries(tiny_architecture())}
    with pytest.raises(ValueError):
        architecture_from_shapes(shapes, {METADATA_KEY: text})


def test_the_architecture_follows_from_diffusers_configs() -> None:
    for architecture in (SDXL, tiny_architecture()):
        assert architecture_from_configs(architecture.to_diffusers_configs()) == architecture


def test_wrappers_and_library_versions_do_not_change_a_module_name() -> None:
    plain = "encoder.layers.0.mlp.fc1.weight"
    for name in (
        plain,
        f"text_model.{plain}",
        f"module.text_model.{plain}",
        f"module._orig_mod.{plain}",
        "encoder.layers.0._orig_mod.mlp.fc1.weight",
    ):
        assert module_name(name) == plain
