import json
from dataclasses import asdict
from pathlib import Path

import pytest

from sdxl_train.errors import ConfigError
from sdxl_train.keys import SampleParams
from sdxl_train.sample_benchmark import SampleEntry, read_benchmark

ORACLE = json.loads((Path(__file__).parents[1] / "oracles.json").read_text("utf-8"))["sample_merge"]


def read(tmp_path, listed, warn=None, **params) -> list[SampleEntry]:
    file = tmp_path / "benchmark.json"
    file.write_text(listed if isinstance(listed, str) else json.dumps(listed), "utf-8")
    return read_benchmark(file, SampleParams(**params), warn or pytest.fail)


def read_one(tmp_path, fields, **params) -> SampleEntry:
    (entry,) = read(tmp_path, [{"prompt": "x", **fields}], **params)
    return entry


@pytest.mark.parametrize(("given", "expected"), list(zip(ORACLE["inputs"], ORACLE["expected"], strict=True)))
def test_an_entry_merges_as_the_oracle_says(tmp_path, given, expected):
    (entry,) = read(tmp_path, [given["entry"]], **given["sample_params"])
    assert asdict(entry) == expected


def test_a_missing_field_comes_from_sample_params_and_a_given_one_wins(tmp_path):
    first, second = read(tmp_path, [{"steps": 5}, {"prompt": "own", "scale": 2}], prompt="shared", steps=9, scale=3.0)
    assert (first.prompt, first.steps, first.scale) == ("shared", 5, 3.0)
    assert (second.prompt, second.steps, second.scale) == ("own", 9, 2.0)


@pytest.mark.parametrize(
    ("fields", "params", "seed"),
    [({}, {}, 42), ({}, {"seed": 7}, 7), ({"seed": None}, {"seed": 7}, None), ({}, {"seed": -1}, None), ({"seed": 0}, {}, 0)],
)
def test_a_seed_of_null_or_minus_one_is_random(tmp_path, fields, params, seed):
    assert read_one(tmp_path, fields, **params).seed == seed


@pytest.mark.parametrize(("given_px", "px"), [(1000, 992), (64, 64), (95, 64), (40, 64), (1, 64), (96, 96)])
def test_sides_are_floored_to_32_and_at_least_64(tmp_path, given_px, px):
    entry = read_one(tmp_path, {"width": given_px, "height": given_px})
    assert (entry.width, entry.height) == (px, px)


def test_sides_of_sample_params_are_floored_too(tmp_path):
    assert read_one(tmp_path, {}, width=100).width == 96


def test_an_original_side_of_null_is_absent_whatever_sample_params_say(tmp_path):
    sides = {"original_width": 1500, "original_height": 2000}
    assert read_one(tmp_path, {}, **sides).original_size == (1500, 2000)
    assert read_one(tmp_path, {"original_width": None}, width=128, height=256, **sides).original_size == (128, 256)


def test_the_original_size_is_the_floored_size_times_the_factor(tmp_path):
    assert read_one(tmp_path, {"width": 100, "height": 64, "original_scale_factor": 1.5}).original_size == (144, 96)


@pytest.mark.parametrize("name", sorted(set(SampleParams.model_fields) - {"seed", "original_width", "original_height"}))
def test_other_nulls_are_errors(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"entry 0: {name} may not be null"):
        read(tmp_path, [{"prompt": "x", name: None}])


def test_unknown_fields_warn_and_are_ignored(tmp_path):
    said: list[str] = []
    (entry,) = read(tmp_path, [{"prompt": "x", "step": 3, "\x1b[31m": 1}], said.append)
    assert entry.steps == 28
    assert len(said) == 1 and "entry 0" in said[0] and '"step"' in said[0] and "\x1b" not in said[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 3), ("steps", 0), ("steps", 2.0), ("steps", True), ("steps", "20"), ("batch_size", 0), ("batch_count", 0), ("scale", -1),
        ("scale", "7"), ("scale", True), ("seed", -2), ("seed", 1.0), ("seed", 2**63), ("width", 0), ("height", -64), ("width", 64.0),
        ("original_width", 0), ("original_scale_factor", 0), ("save_latents", 1), ("negative_prompt", ["x"]), ("prompt", "\ud800"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_an_error_naming_entry_and_field(tmp_path, name, value):
    with pytest.raises(ConfigError, match=rf"benchmark\.json: entry 1: {name}"):
        read(tmp_path, [{"prompt": "x"}, {"prompt": "x", name: value}])


def test_all_wrong_entries_are_in_one_message(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, [{"steps": 0}, "x", {"prompt": "x", "width": "a"}])
    lines = str(caught.value).splitlines()
    assert [line.split("json: ")[1][:8] for line in lines] == ["entry 0:", "entry 0:", "entry 1 ", "entry 2:"]


def test_an_entry_without_a_prompt_after_merging_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="entry 0: no prompt"):
        read(tmp_path, [{"steps": 3}])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "must hold a list"), ("[{", "line 1 column 3"), ('[{"prompt": "x",\n}]', "line 2"), ("[" * 100_000, "nested too deeply"),
        ('[{"scale": NaN}]', "NaN"),
        ('[{"steps": 1, "steps": 2}]', '"steps" is given twice'), ('[{"steps": ' + "9" * 5000 + "}]", "digits"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_json_list_is_an_error_saying_where(tmp_path, text, said):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value) and "benchmark.json" in str(caught.value)


def test_a_byte_order_mark_is_accepted_and_other_encodings_are_not(tmp_path):
    file = tmp_path / "benchmark.json"
    file.write_bytes(b"\xef\xbb\xbf" + b'[{"prompt": "\xe7\x8c\xab"}]')
    assert read_benchmark(file, SampleParams(), pytest.fail)[0].prompt == "猫"
    file.write_text('[{"prompt": "x"}]', "utf-16")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_benchmark(file, SampleParams(), pytest.fail)


def test_a_missing_file_or_a_directory_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="missing"):
        read_benchmark(tmp_path / "none.json", SampleParams(), pytest.fail)
    with pytest.raises(ConfigError, match="no regular file"):
        read_benchmark(tmp_path, SampleParams(), pytest.fail)
