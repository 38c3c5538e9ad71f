"""One report with every problem: file, line, key, what was found, and the nearest known key."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_train import ConfigError
from sdxl_train.config import Settings, load_settings, read_settings
from sdxl_train.errors import Problem

REQUIRED = """
pretrained_model_name_or_path = "{folder}/base.safetensors"
image_dirs = ["{folder}"]
output_dir = "{folder}/out"
"""


@pytest.fixture
def load(tmp_path: Path):
    """Loads a configuration that has the required keys and the given lines."""
    (tmp_path / "base.safetensors").touch()

    def loading(lines: str = "", *settings: str, required: str = REQUIRED) -> Settings:
        file = tmp_path / "sdxl.toml"
        file.write_text(required.format(folder=tmp_path).strip() + "\n" + lines, encoding="utf-8")
        return load_settings(file, settings)

    return loading


def problems(load, lines: str, *settings: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(lines, *settings)
    return str(caught.value).splitlines()


def test_absent_keys_take_the_documented_defaults(load) -> None:
    settings = load()
    assert settings.config.learning_rate == 1e-5
    assert settings.config.save_precision == "fp16"
    assert settings.config.max_token_length == 225
    assert settings.values["min_snr_gamma"] == 5.0
    assert settings.values["noise_offset"] == 0.0
    assert settings.values["save_on_train_end"] is True
    assert settings.values["save_every_n_steps"] is None
    assert settings.values["optimizer_type"] == "AdaFactor"
    assert settings.values["noise_strategies"] == ["noise_offset", "multires_noise", "ip_noise"]
    assert settings.values["optimizer_kwargs"]["relative_step"] is False


def test_tables_with_defaults_merge_entry_by_entry(load) -> None:
    settings = load("[loss_recorder_kwargs]\ngamma = 0.5\n[sample_params]\nsteps = 3\n[optimizer_kwargs]\nclip_threshold = 2.0")
    assert settings.config.loss_recorder_kwargs.gamma == 0.5
    assert settings.config.loss_recorder_kwargs.stride == 1000
    assert (settings.config.sample_params.steps, settings.config.sample_params.scale) == (3, 7.5)
    assert settings.values["optimizer_kwargs"]["scale_parameter"] is False


def test_a_misspelt_key_is_named_with_its_line_and_the_nearest_key(load) -> None:
    (problem,) = problems(load, "batch_size = 2\n\nlearning_rte = 1e-4")
    assert ":6: " in problem and '"learning_rte"' in problem and '"learning_rate"' in problem


def test_a_misspelt_plugin_key_is_named_too(load) -> None:
    (problem,) = problems(load, "noise_ofset = 0.1")
    assert ":4: " in problem and '"noise_offset"' in problem


def test_a_misspelt_entry_of_a_table_is_named_with_its_line(load) -> None:
    (problem,) = problems(load, "[loss_recorder_kwargs]\ngamma = 0.1\nstrid = 3")
    assert ":6: " in problem and '"strid"' in problem and '"stride"' in problem


def test_a_top_level_key_inside_a_table_says_where_it_belongs(load) -> None:
    (problem,) = problems(load, "[timestep_sampler_kwargs]\nbatch_size = 2")
    assert ":5: " in problem and "top-level key" in problem
    (problem,) = problems(load, "[loss_recorder_kwargs]\nmin_snr_gamma = 2.0")
    assert "top-level key" in problem


def test_attention_by_a_package_that_is_missing_is_an_error_that_names_sdpa(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    for key in ("xformers", "diffusers_xformers"):
        found = [line for line in problems(load, f"{key} = true") if "not installed" in line]
        assert len(found) == 1 and "sdxl.toml:4: " in found[0] and f"use sdpa = true without {key}" in found[0]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('batch_size = "4"', '"4"'),
        ("batch_size = 4.0", "4.0"),
        ("batch_size = true", "true"),
        ("batch_size = 0", "0"),
        ("batch_size = -1", "-1"),
        ("batch_size = 123456789012345678901234567890", "123456789012345678901234567890"),
        ('learning_rate = "1e-4"', '"1e-4"'),
        ("learning_rate = nan", "nan"),
        ("learning_rate = inf", "inf"),
        ("learning_rate = -1.0", "-1.0"),
        ("flip_aug = 1", "1"),
        ("max_token_length = 100", "100"),
        ('save_precision = "fp8"', '"fp8"'),
        ("bucket_reso_step = 12", "12"),
        ("image_dirs = 3", "3"),
        ("noise_offset = -0.1", "-0.1"),
        ("min_timestep = 1000", "1000"),
        ("max_timestep = 1001", "1001"),
        ("max_timestep = 0", "0"),
        ("seed = 2024-01-01", "2024-01-01"),
        ('output_name = "a/b"', '"a/b"'),
        ("lr_scheduler = 3", "3"),
        ('loss_weightings = "min_snr"', '"min_snr"'),
        ("[optimizer_kwargs]\nclip_threshold = true", "true"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_found(load, line: str, found: str) -> None:
    required = "\n".join(kept for kept in REQUIRED.strip().splitlines() if kept.split(" =")[0] not in line)
    with pytest.raises(ConfigError) as caught:
        load(line, required=required)
    (problem,) = str(caught.value).splitlines()
    key = line.split("\n")[-1].split(" =")[0]
    assert key in problem and found in problem and "sdxl.toml:" in problem


def test_every_problem_is_given_with_its_key_too(load, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        load(f'batch_sise = 2\nsample_benchmark = "{tmp_path}/bench.json"\n[loss_recorder_kwargs]\ngamma = 2.0', "seed=-1")
    found = {problem.key: problem for problem in caught.value.problems}
    assert set(found) == {"batch_sise", "loss_recorder_kwargs.gamma", "seed", "sample_benchmark"}
    assert [problem.message for problem in caught.value.problems] == str(caught.value).splitlines()
    assert found["seed"].kind == "config" and found["seed"].message.startswith("--set seed=-1: ")


def test_settings_are_read_also_where_only_files_beside_the_data_are_wrong(load, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("[3]")
    load()
    problems: list[Problem] = []
    sets = ("pretrained_model_name_or_path=gone", f"sample_benchmark={tmp_path}/bench.json", "batch_size=3")
    settings = read_settings(tmp_path / "sdxl.toml", sets, ("data", "training"), problems)
    assert settings is not None and (settings.config.batch_size, settings.samples) == (3, ())
    assert [problem.key for problem in problems] == ["pretrained_model_name_or_path", "sample_benchmark"]
    assert read_settings(tmp_path / "sdxl.toml", ("resolution=0",), ("data", "training"), problems) is None
    assert problems[-1].key == "resolution"
    assert read_settings(tmp_path / "gone.toml", (), ("data", "training"), problems) is None
    assert "no such file" in problems[-1].message


def test_an_integer_is_accepted_for_a_float(load) -> None:
    assert load("learning_rate = 1").config.learning_rate == 1.0


def test_all_problems_come_in_one_report(load) -> None:
    found = problems(
        load,
        'batch_size = "4"\nlearning_rte = 1e-4\nresolution = -3\nfull_bf16 = true\nmin_timestep = 900\nmax_timestep = 100\n'
        'timestep_sampler_type = "bell"\n[loss_recorder_kwargs]\ngama = 0.1',
    )
    assert len(found) >= 7
    for part in ("batch_size", "learning_rte", "resolution", "full_bf16", "min_timestep", "bell", "gama"):
        assert any(part in problem for problem in found), part


@pytest.mark.parametrize(
    ("lines", "keys"),
    [
        ("full_bf16 = true\nfull_fp16 = true", ("full_bf16", "full_fp16")),
        ("full_bf16 = true", ("full_bf16", "mixed_precision")),
        ('full_fp16 = true\nmixed_precision = "bf16"', ("full_fp16", "mixed_precision")),
        ('cpu = true\nmixed_precision = "fp16"', ("cpu", "mixed_precision")),
        ("min_timestep = 5\nmax_timestep = 5", ("min_timestep", "max_timestep")),
        ("resolution = 24\nbucket_reso_step = 32", ("resolution", "bucket_reso_step")),
        ("learning_rate = 0", ("learning_rate",)),
        ("sample_every_n_steps = 3", ("sample_every_n_steps", "sample_benchmark")),
        ("sample_every_n_epochs = 3", ("sample_every_n_epochs", "sample_benchmark")),
    ],
)
def test_contradicting_keys_are_both_named(load, lines: str, keys: tuple[str, ...]) -> None:
    found = problems(load, lines)
    assert any(all(key in problem for key in keys) for problem in found)


def test_missing_files_and_folders_are_found_before_anything_is_loaded(load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load('metadata_files = ["gone.json"]', required='pretrained_model_name_or_path = "nope"\nimage_dirs = ["away"]\noutput_dir = "o"')
    text = str(caught.value)
    assert "gone.json" in text and "nope" in text and "away" in text


def test_required_keys_are_required(load) -> None:
    with pytest.raises(ConfigError) as caught:
        load(required="")
    for key in ("pretrained_model_name_or_path", "image_dirs", "output_dir"):
        assert f"{key} is required" in str(caught.value)


def test_set_arguments_override_the_file_before_validation(load) -> None:
    settings = load(
        "batch_size = 2", "batch_size=3", "sample_params.steps=7", "timestep_sampler_type=logit_normal", "timestep_sampler_kwargs.mu=1"
    )
    assert settings.config.batch_size == 3
    assert settings.config.sample_params.steps == 7
    assert settings.values["timestep_sampler_type"] == "logit_normal"
    assert settings.values["timestep_sampler_kwargs"]["mu"] == 1.0


def test_a_bad_set_argument_is_named_instead_of_a_line(load) -> None:
    (problem,) = problems(load, "", "batch_sise=3")
    assert problem.startswith("--set batch_sise=3: ")
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load("", "batch_size")


def test_options_of_a_list_of_plugins_are_one_table_each(load) -> None:
    settings = load('plugins = []\nloss_weightings = ["min_snr"]\nmin_snr_gamma = 2.0')
    assert settings.values["loss_weightings"] == ["min_snr"]
    (problem,) = problems(load, "[loss_weightings_kwargs.min_snrr]\nx = 1")
    assert "min_snrr" in problem


def test_two_spellings_of_one_option_are_an_error(load) -> None:
    lines = 'timestep_sampler_type = "logit_normal"\n[timestep_sampler_kwargs]\n'
    assert load(lines + "loc = 0\nstd = 2").values["timestep_sampler_kwargs"] == {"mu": 0.0, "sigma": 2.0}
    (problem,) = problems(load, lines + "mu = 0\nmean = 1")
    assert "mu and mean" in problem


def test_options_that_contradict_other_keys_are_found_with_all_other_problems(load) -> None:
    lines = 'max_timestep = 500\nbatch_size = 0\ntimestep_sampler_type = "density"\n[timestep_sampler_kwargs]\ndensity = [0, 2]'
    found = problems(load, lines.replace("batch_size = 0", "batch_size = 1"))
    assert len(found) == 1 and all(part in found[0] for part in ("sdxl.toml", "density is 0", "min_timestep = 0", "max_timestep = 500"))
    assert len(problems(load, lines.replace("batch_size = 0", 'output_name = "a/b"\nfull_bf16 = true'))) >= 2
    assert load(lines.replace("max_timestep = 500\nbatch_size = 0", "max_timestep = 501")).values["timestep_sampler_kwargs"] == {"density": (0.0, 2.0)}
    assert len(problems(load, lines.replace("batch_size = 0", "min_timestep = 500"))) == 1  # an empty range is one problem, not two


def test_the_table_of_a_density_is_checked(load) -> None:
    lines = 'timestep_sampler_type = "density"\n'
    for table, said in (("", "density is required"), ("density = []", "at least 1"), ("density = [0, 0.0]", "above 0"), ("density = [1, -1]", "greater")):  # fmt: skip
        (problem,) = problems(load, f"{lines}[timestep_sampler_kwargs]\n{table}")
        assert said in problem, problem


def test_a_plugin_named_twice_is_an_error(load) -> None:
    (problem,) = problems(load, 'loss_weightings = ["min_snr", "min_snr"]')
    assert "min_snr twice" in problem


def test_optimizer_names_ignore_case(load) -> None:
    assert load('optimizer_type = "adamw"').values["optimizer_type"] == "AdamW"


def test_the_key_of_a_built_in_that_a_list_leaves_out_is_an_error_unless_it_is_neutral(load) -> None:
    (problem,) = problems(load, "noise_strategies = []\nnoise_offset = 0.1")
    assert "noise_offset" in problem and "noise_strategies" in problem
    assert load("noise_strategies = []\nnoise_offset = 0.0").values["noise_strategies"] == []


def test_the_key_of_another_schedule_is_a_warning(load) -> None:
    settings = load('lr_scheduler = "cosine"\nlr_scheduler_power = 2.0')
    assert any("lr_scheduler_power has no effect" in warning for warning in settings.warnings)


@pytest.mark.parametrize(
    ("lines", "warned"),
    [
        ("scale_v_pred_loss_like_noise_pred = true", "scale_v_pred_loss_like_noise_pred"),
        ('prediction_type = "v_prediction"\nv_pred_like_loss = 0.5', "v_pred_like_loss"),
        ("zero_terminal_snr = true", "zero_terminal_snr"),
        ("adaptive_noise_scale = 0.1", "adaptive_noise_scale"),
        ("save_model = false", "save"),
        ("save_on_train_end = false\nsave_on_exception = false\nsave_on_keyboard_interrupt = false", "save"),
        ('lr_scheduler = "constant"\nlr_warmup_steps = 5', "lr_warmup_steps"),
        ("max_grad_norm = 1.0", "max_grad_norm"),
        ("bucket_reso_step = 24", "bucket_reso_step"),
    ],
)
def test_a_setting_without_effect_is_warned_about(load, lines: str, warned: str) -> None:
    assert any(warned in warning for warning in load(lines).warnings)
    assert not any(warned in warning for warning in load().warnings)


def test_relative_paths_and_a_byte_order_mark_are_accepted(load, tmp_path: Path) -> None:
    file = tmp_path / "bom.toml"
    (tmp_path / "base.safetensors").touch()
    file.write_bytes(b"\xef\xbb\xbf" + REQUIRED.format(folder=tmp_path).encode())
    assert load_settings(file).config.batch_size == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"batch_size = 1\nx = \xff\n", ":2: "),
        (b"batch_size = 1\nbatch_size = 2\n", ":2: "),
        (b"batch_size = \n", ":1: "),
        (b"x = " + b"[" * 20_000 + b"]" * 20_000, "nested"),
        (b"x = " + b"9" * 5000, "x.toml"),
        (b"#" * 1_000_001, "too many"),
    ],
)
def test_a_file_that_is_not_toml_is_refused_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="x.toml") as caught:
        load_settings(file)
    assert said in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_settings(tmp_path / "gone.toml")


def test_a_configuration_error_exits_2_without_importing_torch(tmp_path: Path) -> None:
    file = tmp_path / "sdxl.toml"
    file.write_text("batch_size = 0\n")
    code = (
        "import sys\nsys.argv = ['sdxl-train', sys.argv[1]]\nfrom sdxl_train.cli import main\n"
        "try:\n    main()\nfinally:\n    print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (2, "[]")
    assert "sdxl.toml:1: batch_size" in done.stderr and "Traceback" not in done.stderr


def test_a_broken_sample_benchmark_is_in_the_same_report(load, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text('[{"prompt": 3}, {"steps": 5}]')
    found = problems(load, f'batch_size = 0\nsample_benchmark = "{tmp_path}/bench.json"')
    assert any("batch_size" in problem for problem in found) and any("bench.json" in problem for problem in found)
