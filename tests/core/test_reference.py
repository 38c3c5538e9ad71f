"""The example file, the JSON schema and the listings come from the declarations, and survive broken packages."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli

from sdxl_train import ConfigError
from sdxl_train.config import load_settings
from sdxl_train.installed_plugins import installed_plugins
from sdxl_train.key_rows import SECTIONS_ZH, banners, key_rows
from sdxl_train.keys import Config
from sdxl_train.plugin_keys import PLUGIN_KEYS
from sdxl_train.plugin_listing import list_plugins, plugin_info
from sdxl_train.reference import example_toml, json_schema
from sdxl_train.reference_pages import hookspecs_golden
from sdxl_train.toml_text import toml_document, toml_value


@pytest.fixture
def check(tmp_path: Path) -> Callable[[str], dict]:
    """Checks a configuration text against real paths and gives back the effective keys."""
    (tmp_path / "base.safetensors").touch()
    (tmp_path / "benchmark.json").write_text('[{"prompt": "a cat"}]')
    (tmp_path / "mine.py").write_text("def f(img_info, **kwargs):\n    return ''\n")

    def checking(text: str) -> dict:
        (tmp_path / "sdxl.toml").write_text(text, "utf-8")
        paths = {"pretrained_model_name_or_path": f'"{tmp_path}/base.safetensors"', "image_dirs": f'["{tmp_path}"]'}
        return dict(load_settings(tmp_path / "sdxl.toml", [f"{key}={value}" for key, value in paths.items()]).values)

    return checking


@pytest.fixture
def broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two distributions on the path: one that cannot be imported, one that is sound."""
    for name, code in (("broken", "import nothing_of_this_name\n"), ("sound", 'class P:\n    """Does a thing."""\n')):
        info = tmp_path / name / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (tmp_path / name / f"{name}_module.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[sdxl_train.plugins]\n{name} = {name}_module:P\n")
        monkeypatch.syspath_prepend(str(tmp_path / name))


def test_every_key_of_the_core_is_in_the_example_once() -> None:
    lines = example_toml(built_in_only=True).splitlines()
    for name, field in Config.model_fields.items():
        if name in ("loss_recorder_kwargs", "sample_params"):
            assert lines.count(f"[{name}]") == 1
        else:
            assert sum(bool(re.match(rf"(# )?{name} = ", line)) for line in lines) >= 1, name
            assert field.description


def test_the_example_sets_every_key_to_its_default(check: Callable[[str], dict]) -> None:
    from_example = check(example_toml(built_in_only=True))
    defaults = check("output_dir = 'output/%date%-%index%'")
    assert from_example.pop("pretrained_model_name_or_path") == defaults.pop("pretrained_model_name_or_path")
    assert from_example == defaults


def test_a_commented_key_of_the_example_is_valid_when_uncommented(check: Callable[[str], dict], tmp_path: Path) -> None:
    rows = [row for row in key_rows(installed_plugins(built_in_only=True)) if row.is_used and row.default is None]
    needs_more = {"sample_benchmark", "vae", "caption_processor", "description_processor"}  # they name files that do not exist here
    refused = {"records_cache_dir"}
    example = example_toml(built_in_only=True)
    tried = 0
    for row in rows:
        name = row.path[-1]
        if name in needs_more | refused:
            continue
        text, count = re.subn(rf"^# ({name} = )", r"\1", example, count=1, flags=re.MULTILINE)
        assert count == 1
        check(text)
        tried += 1
    assert tried >= 8


def test_the_example_names_broken_packages_and_stays_valid(broken_package: None, check: Callable[[str], dict]) -> None:
    text = example_toml()
    assert '# "broken" in plugins of broken 1.2 is broken:' in text and "nothing_of_this_name" in text
    check(text)


def test_sections_are_those_of_the_source() -> None:
    import sdxl_train.keys

    found = banners(sdxl_train.keys)
    assert {*found} <= {*SECTIONS_ZH}
    assert [name for names in found.values() for name in names if name in Config.model_fields] == list(Config.model_fields)


def test_every_option_of_a_plugin_has_a_row_with_its_owner() -> None:
    rows = {row.path: row for row in key_rows(installed_plugins(built_in_only=True)) if row.owners}
    assert [owner.name for owner in rows["min_snr_gamma",].owners] == ["min_snr"]
    sigma = rows["timestep_sampler_kwargs", "sigma"]
    assert (sigma.type, sigma.allowed, sigma.default, sigma.is_used) == ("float", "> 0", 1.0, False)
    assert "std" in sigma.aliases


def test_the_schema_has_every_key_and_the_names_of_the_plugins() -> None:
    schema = json_schema(built_in_only=True)
    properties = schema["properties"]
    tables = {key.options_key for key in PLUGIN_KEYS.values()}
    assert {*Config.model_fields, *PLUGIN_KEYS, *tables, "min_snr_gamma", "lr_scheduler_power"} <= set(properties)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["pretrained_model_name_or_path", "image_dirs", "output_dir"]
    assert {"uniform", "logit_normal"} <= set(properties["timestep_sampler_type"]["anyOf"][0]["enum"])
    assert properties["clip_skip"]["maximum"] == 12 and properties["mixed_precision"]["enum"] == ["no", "fp16", "bf16"]


def test_the_schema_allows_no_null_and_leaks_no_words_of_ours() -> None:
    def walk(value: object) -> None:
        if isinstance(value, dict):
            assert value.get("type") != "null" and not {"zh", "flat", "aliases"} & set(value)
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(json_schema(built_in_only=True))


def test_the_schema_ties_an_options_table_to_the_plugin_that_is_named() -> None:
    def table_of(name: str) -> set[str]:
        chosen = {"properties": {"timestep_sampler_type": {"const": name}}, "required": ["timestep_sampler_type"]}
        conditions = [one for one in json_schema(built_in_only=True)["allOf"] if chosen in (one["if"], *one["if"].get("anyOf", ()))]
        (condition,) = conditions
        return set(condition["then"]["properties"]["timestep_sampler_kwargs"].get("properties", ()))

    assert table_of("logit_normal") == {"mu", "loc", "mean", "m", "sigma", "scale", "std", "s"}
    assert table_of("uniform") == set()


def test_the_listing_names_a_broken_package_with_its_cause_and_goes_on(broken_package: None) -> None:
    lines = list_plugins().splitlines()
    (broken,) = [line for line in lines if " broken " in line and "plugins" in line]
    assert "broken 1.2" in broken and "nothing_of_this_name" in broken
    assert [line for line in lines if "sound 1.2" in line and line.endswith("Does a thing.")]
    assert [line for line in lines if line.startswith("timestep_sampler_type") and " uniform* " in line]


def test_plugin_info_shows_options_with_type_default_bounds_and_help() -> None:
    text = plugin_info("timestep_sampler_type", "logit_normal")
    assert "timestep_sampler_kwargs.sigma (float, > 0), default 1.0" in text
    assert "standard deviation" in text and "also: scale, std, s" in text
    assert "timesteps.py:" in text and re.search(r"from: sdxl-train \d", text)


def test_plugin_info_of_a_file_shows_what_its_function_takes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text('def f(img_info, *, share: float = 0.5, **kwargs):\n    """Halve it."""\n    return ""\n')
    text = plugin_info("caption_processor", f"{tmp_path}/mine.py:f")
    assert "Halve it." in text and "caption_processor_kwargs.share (float), default 0.5" in text


@pytest.mark.parametrize(
    ("key", "name", "said"),
    [("timestep_sampler", "uniform", 'did you mean "timestep_sampler_type"'), ("loss_type", "msee", 'did you mean "mse"')],
)
def test_plugin_info_of_an_unknown_name_is_a_config_error(key: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        plugin_info(key, name)


def test_signatures_name_every_argument_with_its_type() -> None:
    lines = hookspecs_golden().splitlines()
    assert "count_repeats(img_key: str, img_md: dict[str, Any], counter: Counter) -> int" in lines
    assert all("self" not in line and " = " not in line for line in lines)


@pytest.mark.parametrize("value", [True, False, 0, -3, 1e-5, 1e-30, 2.5e20, 1.0, 'a "b" \\ \n é', "\x7f", [], [1, [2.5, "x"]], {"a b": 1}])
def test_toml_values_are_read_back_as_they_were(value: object) -> None:
    read = tomli.loads(f"value = {toml_value(value)}")["value"]
    assert read == value and type(read) is type(value)


def test_a_document_puts_its_tables_last() -> None:
    assert tomli.loads(toml_document({"table": {"x.y": 1}, "plain": [1]})) == {"plain": [1], "table": {"x.y": 1}}


def test_none_of_this_loads_torch() -> None:
    code = (
        "import sys; from sdxl_train import plugin_listing, reference; reference.example_toml(); reference.json_schema();"
        "plugin_listing.list_plugins(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
