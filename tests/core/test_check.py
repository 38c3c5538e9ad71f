"""What `check` finds out without loading anything: the numbers of a training, every problem at once, and what is to be written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_index import made_index
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_train import PluginError
from sdxl_train.check import Plan, run_check
from sdxl_train.check_files import equal_files, model_bytes, save_steps, space_warnings
from sdxl_train.check_report import as_json_object, as_text
from sdxl_train.data.buckets import cover
from sdxl_train.model.saving import save_checkpoint
from sdxl_train.model.single_file import load_unet, open_checkpoint

COUNTS = [
    "images", "captioned", "described", "without_text", "missing", "dropped", "bad", "samples_per_epoch", "buckets",
    "batches_per_epoch", "steps_per_epoch", "num_train_steps", "tokens", "caches", "saves", "duplicates",
]  # fmt: skip


@pytest.fixture
def check(config, capsys):
    """Runs a check with these keys, asserts its exit code, and gives back the JSON object."""

    def checking(*sets: str, code: int = 0, decode: bool = False, **keys: Any) -> dict[str, Any]:
        found = run_check(config(**keys), sets, as_json=True, decode=decode)
        told = capsys.readouterr()
        assert found == code, told
        return json.loads(told.out)

    return checking


@pytest.fixture
def plugin(tmp_path: Path):
    """Writes a plugin file and gives back what names a function of it."""

    def writing(text: str, name: str = "f") -> str:
        (tmp_path / "own.py").write_text(text)
        return f"{tmp_path}/own.py:{name}"

    return writing


def damage_pixels(path: Path) -> None:
    """Flips a bit that only a decode finds: header and end of the file stay as they are."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_base(path: Path, like: Path, dtype: torch.dtype, **more: torch.Tensor) -> None:
    """The model of another file in another dtype, with more tensors."""
    with safe_open(like, "pt") as file:
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in load_file(like).items()}
        save_file({**tensors, **more}, path, file.metadata())


def kinds(plan: dict[str, Any]) -> list[str]:
    return [problem["kind"] for problem in plan["problems"]]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


# The numbers


def test_steps_and_batches_are_those_of_the_buckets(check) -> None:
    plan = check(batch_size=4, gradient_accumulation_steps=2, num_train_epochs=5)
    assert {tuple(one["size"]): (one["images"], one["samples"], one["batches"]) for one in plan["buckets"]} == {
        (64, 64): (6, 6, 2),
        (96, 32): (4, 4, 1),
    }
    assert (plan["images"], plan["captioned"], plan["samples_per_epoch"]) == (10, 10, 10)
    assert (plan["batches_per_epoch"], plan["steps_per_epoch"], plan["num_train_steps"], plan["effective_batch"]) == (3, 2, 10, 8)
    assert check("max_train_steps=7", gradient_accumulation_steps=2, num_train_epochs=5)["num_train_steps"] == 7


def test_repeats_count_as_samples_and_not_as_pictures(check, plugin) -> None:
    getter = plugin("def f(img_key, img_md, **kwargs): return {'square0': 9, 'wide0': 0}.get(img_key, 1)")
    plan = check(num_repeats_getter=getter)
    square = next(one for one in plan["buckets"] if one["size"] == [64, 64])
    assert (square["images"], square["samples"], square["batches"]) == (6, 14, 4)
    assert (plan["images"], plan["dropped"], plan["samples_per_epoch"]) == (9, 1, 17)


def test_cuts_and_scales_are_those_of_the_placement(check, pictures: Path) -> None:
    shutil.rmtree(pictures)
    pictures.mkdir()
    sizes = [(200, 64), (960, 320), (333, 100), (97, 33)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number, 0, 0)).save(pictures / f"{number}.png")
    (bucket,) = check()["buckets"]
    assert bucket["size"] == [96, 32]
    placements = [cover(size, (96, 32)) for size in sizes]
    cuts = [1 - 96 * 32 / (placement.resized[0] * placement.resized[1]) for placement in placements]
    scales = [max(96 / width, 32 / height) for width, height in sizes]
    assert bucket["cut_mean"] == pytest.approx(np.mean(cuts), abs=0.02)  # a placement is in whole px
    assert bucket["cut_worst"] == pytest.approx(max(cuts), abs=0.02)
    assert (bucket["scale_min"], bucket["scale_max"]) == pytest.approx((min(scales), max(scales)))
    assert bucket["scale_mean"] == pytest.approx(np.mean(scales))
    assert bucket["enlarged"] == 0


def test_a_picture_smaller_than_the_smallest_bucket_counts_as_enlarged(check, pictures: Path) -> None:
    Image.new("RGB", (40, 16)).save(pictures / "small.png")
    plan = check()
    (bucket,) = [one for one in plan["buckets"] if one["enlarged"]]
    assert (bucket["size"], bucket["enlarged"], bucket["scale_max"]) == ([32, 32], 1, 2.0)
    assert bucket["cut_worst"] == pytest.approx(1 - 32 / 80)


def test_texts_that_will_be_cut_are_counted_and_the_worst_five_named(check, pictures: Path) -> None:
    for number in range(6):
        (pictures / f"square{number}.txt").write_text("cat " * (76 + number))
    assert check()["tokens"] == {
        "over": 6,
        "worst": [{"key": f"square{number}", "tokens": 76 + number} for number in (5, 4, 3, 2, 1)],
    }
    assert check(max_token_length=150)["tokens"] == {"over": 0, "worst": []}


def test_what_is_left_out_is_counted_and_named(check, tmp_path: Path, pictures: Path) -> None:
    entries = {path.stem: {"caption": "a"} for path in pictures.glob("*.png")}
    entries["square0"] = {"description": "a picture"}
    entries["square1"] = {}
    entries |= {f"gone{number}": {"caption": "b"} for number in range(3)}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    (pictures / ".hidden.png").touch()
    (pictures / "run" / "logs").mkdir(parents=True)
    (pictures / "run" / ".lock").touch()
    plan = check(metadata_files=[str(tmp_path / "meta.json")])
    assert [plan[name] for name in ("images", "captioned", "described", "without_text", "missing")] == [10, 8, 1, 1, 3]
    assert plan["missing_keys"] == ["gone0", "gone1", "gone2"]
    assert (plan["hidden"], plan["run_folders"]) == (1, [str(pictures / "run")])
    assert any("gone0" in warning for warning in plan["warnings"])


def test_warnings_of_the_configuration_are_in_the_report(check) -> None:
    assert any("adaptive_noise_scale" in warning for warning in check(adaptive_noise_scale=0.1)["warnings"])


# What is written


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"save_on_train_end": True}, [10]),
        ({"save_every_n_steps": 3}, [3, 6, 9]),
        ({"save_every_n_steps": 5, "save_on_train_end": True}, [5, 10]),
        ({"save_every_n_epochs": 2}, [8]),  # the third epoch is cut off
        ({"save_every_n_epochs": 1, "save_every_n_steps": 4}, [4, 8]),
        ({"save_every_n_steps": 0, "save_every_n_epochs": None, "save_on_train_end": False}, []),
    ],
)
def test_models_are_saved_at_these_of_ten_steps_with_four_an_epoch(values: dict[str, Any], expected: list[int]) -> None:
    assert save_steps(values, 4, 10) == expected
    assert save_steps({"save_on_train_end": True, "save_every_n_epochs": 1}, 0, 0) == []


def test_saves_and_the_space_they_need_follow_the_keys(check, tmp_path: Path) -> None:
    saves = check(save_every_n_steps=2, save_on_train_end=False, num_train_epochs=3)["saves"]
    assert saves["steps"] == [2, 4, 6, 8]
    assert saves["first"] == str(tmp_path / "out" / "models" / "model_ep1_step2.safetensors")
    assert saves["last"] == str(tmp_path / "out" / "models" / "model_ep3_step8.safetensors")
    assert saves["bytes"] == 4 * saves["model_bytes"]
    assert saves["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    assert check(save_model=False)["saves"]["steps"] == []


def test_a_save_trigger_of_others_is_named(check, plugin) -> None:
    trigger = plugin("def f(run, moment, **kwargs): return 'always'")
    saves = check(save_triggers=[trigger])["saves"]
    assert (saves["further_triggers"], saves["steps"]) == ([trigger], [])


@pytest.mark.parametrize("precision", ["fp16", "bf16", "float", "fp32", "keep"])
def test_the_size_of_a_model_is_that_of_the_file(tiny_base: Path, tmp_path: Path, precision: str) -> None:
    write_base(tmp_path / "half.safetensors", tiny_base, torch.float16)  # so that "keep" keeps two dtypes
    base = open_checkpoint(str(tmp_path / "half.safetensors"))
    path = tmp_path / "saved.safetensors"
    save_checkpoint(path, base, {"unet": load_unet(base, torch.float32).state_dict()}, precision, {})
    assert model_bytes(base, precision) == pytest.approx(path.stat().st_size, rel=0.01)


def test_a_disk_that_is_too_small_is_warned_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    (tmp_path / "inner").mkdir()
    assert space_warnings({str(tmp_path): 600, str(tmp_path / "inner"): 400}) == []
    (warning,) = space_warnings({str(tmp_path): 600, str(tmp_path / "inner"): 401})  # both are on one disk
    assert "1000 bytes" in warning and "1001" in warning



# Equal pictures


def test_pictures_of_equal_bytes_are_listed_in_groups_and_are_no_problem(check, pictures: Path) -> None:
    for path in pictures.glob("*[4-9].png"):  # the fixture draws them as those before them
        path.unlink()
    for name in ("copy0", "copy1"):
        shutil.copy(pictures / "square0.png", pictures / f"{name}.png")
    shutil.copy(pictures / "wide0.png", pictures / "again.png")
    for name in ("a", "b"):  # of one length, but different
        Image.new("RGB", (64, 64), (len(name), ord(name), 0)).save(pictures / f"{name}.bmp")
    expected = [["again", "wide0"], ["copy0", "copy1", "square0"]]
    assert check()["duplicates"] == [[str(pictures / f"{name}.png") for name in group] for group in expected]


def test_only_files_of_one_length_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"a": b"1" * 70_000, "b": b"1" * 70_000, "c": b"2" * 70_000, "d": b"2" + b"1" * 69_999, "e": b"1"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in contents]
    index = made_index({name: {} for name in contents}, paths, [(64, 64)] * 5, [(64, 64)] * 5)
    index.stamps[:, 0] = [len(content) for content in contents.values()]
    read_whole: list[str] = []
    monkeypatch.setattr("sdxl_train.check_files.file_digest", lambda path: read_whole.append(Path(path).name) or Path(path).read_bytes())
    warnings: list[str] = []
    assert equal_files(index, warnings) == [paths[:2]]
    assert (sorted(read_whole), warnings) == (["a", "b", "d"], [])  # c differs in its end already


def test_a_picture_that_cannot_be_read_for_comparing_is_named(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b")]
    index = made_index({"a": {}, "b": {}}, paths, [(64, 64)] * 2, [(64, 64)] * 2)
    index.stamps[:, 0] = 5
    warnings: list[str] = []
    assert equal_files(index, warnings) == []
    assert all(path in warning for path, warning in zip(paths, warnings, strict=True))


# Problems


def test_all_problems_of_files_are_in_one_report(check, tmp_path: Path, pictures: Path, tiny_base: Path) -> None:
    """A model, a benchmark, a picture, a caption, an ambiguous name, a cache alone and the vocabulary, in one go."""
    (tmp_path / "base.safetensors").write_bytes(tiny_base.read_bytes()[:-1])
    (tmp_path / "bench.json").write_text('[{"steps": 3}]')
    (pictures / "square0.png").write_bytes((pictures / "square0.png").read_bytes()[:60])
    (pictures / "square1.txt").write_bytes("é".encode("utf-16"))
    (pictures / "wide0.jpg").touch()
    (pictures / "alone.npz").write_bytes(b"no zip")
    vocabulary = tmp_path / "tokenizers" / "openai_clip-vit-large-patch14" / "vocab.json"
    vocabulary.parent.mkdir(parents=True)
    vocabulary.write_text("{}")
    plan = check(code=2, pretrained_model_name_or_path=str(tmp_path / "base.safetensors"), sample_benchmark=str(tmp_path / "bench.json"))
    assert sorted(kinds(plan)) == ["cache", "caption", "checkpoint", "checkpoint", "config", "image", "image", "name"]
    keys = {problem["key"] for problem in plan["problems"] if problem["kind"] in ("checkpoint", "config")}
    assert keys == {"pretrained_model_name_or_path", "sample_benchmark", "tokenizer_cache_dir"}
    assert {problem["path"] for problem in plan["problems"] if problem["kind"] in ("image", "caption")} == {
        str(pictures / "square0.png"),
        str(pictures / "wide0.jpg"),  # empty, and of the name of another
        str(pictures / "square1.txt"),
    }
    assert (plan["bad"], plan["saves"], plan["caches"]) == (2, None, None)
    assert plan["images"] is not None and plan["num_train_steps"] > 0


def test_a_missing_model_and_a_bad_picture_are_in_one_report(check, pictures: Path) -> None:
    (pictures / "square0.png").write_bytes(b"")
    plan = check(code=2, pretrained_model_name_or_path="nowhere.safetensors", vae="nowhere_else")
    assert sorted(kinds(plan)) == ["config", "config", "image"]
    assert {problem.get("key") for problem in plan["problems"]} == {"pretrained_model_name_or_path", "vae", None}


def test_a_vae_that_is_none_is_named_by_its_key(check, tmp_path: Path, pictures: Path) -> None:
    plan = check(code=2, vae=str(pictures / "square0.png"))
    (problem,) = plan["problems"]
    assert (problem["kind"], problem["key"]) == ("checkpoint", "vae") and "square0.png" in problem["message"]


def test_a_configuration_that_cannot_be_loaded_leaves_the_counts_unknown(check) -> None:
    plan = check("loss_recorder_kwargs.strid=3", code=2, batch_size=0, learning_rte=1.0)
    assert {problem["key"] for problem in plan["problems"]} == {"batch_size", "learning_rte", "loss_recorder_kwargs.strid"}
    assert all(problem["kind"] == "config" for problem in plan["problems"])
    assert {name: plan[name] for name in COUNTS} == dict.fromkeys(COUNTS)


def test_a_file_that_is_not_toml_is_reported_in_the_same_form(tmp_path: Path, capsys) -> None:
    (tmp_path / "x.toml").write_text("batch_size =")
    assert run_check(tmp_path / "x.toml", (), as_json=True, decode=False) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["kind"] == "config" and "x.toml:1" in problem["message"]


def test_a_base_that_predicts_something_else_and_a_text_encoder_too_short_are_found(check, tmp_path: Path, tiny_base: Path) -> None:
    write_base(tmp_path / "v.safetensors", tiny_base, torch.float32, v_pred=torch.empty(0))
    keys: dict[str, Any] = {"pretrained_model_name_or_path": str(tmp_path / "v.safetensors")}
    plan = check(code=2, clip_skip=12, **keys)
    assert [problem["key"] for problem in plan["problems"]] == ["prediction_type", "clip_skip"]
    check(prediction_type="epsilon", **keys)


def test_nothing_left_to_train_is_a_problem(check, plugin, pictures: Path) -> None:
    plan = check(code=2, num_repeats_getter=plugin("def f(img_key, img_md, **kwargs): return 0"))
    assert "10 dropped" in plan["problems"][0]["message"]
    for path in pictures.glob("*.png"):
        path.write_bytes(b"")
    plan = check(code=2, bad_images="skip")
    assert (plan["bad"], plan["images"], plan["num_train_steps"], kinds(plan)) == (10, 0, 0, ["data"])
    assert "10 bad" in plan["problems"][0]["message"]


def test_caches_without_pictures_need_cache_latents(check, pictures: Path) -> None:
    np.savez(pictures / "alone.npz", latents=np.zeros((4, 8, 8), np.float32), latents_flipped=np.zeros((4, 8, 8), np.float32))
    assert check()["caches"]["usable"] == 1
    plan = check(code=2, cache_latents=False)
    assert "alone" in plan["problems"][0]["message"] and plan["caches"] is None


def test_an_output_dir_that_is_a_file_is_a_problem(check, pictures: Path) -> None:
    plan = check(code=2, output_dir=str(pictures / "square0.png" / "out"))
    assert (plan["problems"][0]["key"], plan["saves"]) == ("output_dir", None)


def test_an_exception_of_a_plugin_is_not_a_problem_of_the_data(check, plugin) -> None:
    with pytest.raises(PluginError, match=r"count_repeats.*square0"):
        check(num_repeats_getter=plugin("def f(img_key, img_md, **kwargs): return {}[img_key]"))


# Pictures that only a decode judges, and bad ones that are skipped


def test_damaged_pixels_are_found_by_a_decode_only(check, pictures: Path) -> None:
    damage_pixels(pictures / "wide3.png")
    plan = check()
    assert (plan["bad"], plan["undecoded"]) == (0, 10)
    plan = check(code=2, decode=True)
    assert (plan["bad"], plan["undecoded"], plan["images"], kinds(plan)) == (1, 0, 9, ["image"])
    assert plan["problems"] == plan["bad_pictures"] and "wide3" in plan["problems"][0]["path"]


def test_skipped_pictures_are_no_problem_and_are_not_planned(check, pictures: Path) -> None:
    damage_pixels(pictures / "wide3.png")
    for number in range(3):
        (pictures / f"square{number}.png").write_bytes(b"")
    plan = check(bad_images="skip", decode=True)
    assert (plan["bad"], plan["images"], plan["batches_per_epoch"], plan["problems"]) == (4, 6, 2, [])
    assert len(plan["bad_pictures"]) == 4
    assert plan["caches"]["to_encode"] == 6
    assert check(bad_images="skip")["bad"] == 3


# The command


def test_the_command_creates_nothing_and_claims_nothing(check, plugin, tmp_path: Path, pictures: Path) -> None:
    keys = {"num_repeats_getter": plugin("def f(img_key, img_md, **kwargs): return 1"), "output_dir": str(tmp_path / "%index%" / "out")}
    check(**keys)  # writes the file itself
    before = snapshot(tmp_path)
    assert check(decode=True, **keys)["saves"]["output_dir"] == str(tmp_path / "0" / "out")
    (tmp_path / "sdxl.toml").touch()
    os.utime(tmp_path / "sdxl.toml", ns=(before[str(tmp_path / "sdxl.toml")][0],) * 2)
    os.utime(tmp_path, ns=(before[str(tmp_path)][0],) * 2)
    assert snapshot(tmp_path) == before


def test_what_a_plugin_prints_stays_out_of_the_object(check, plugin) -> None:
    assert check(num_repeats_getter=plugin("print('loaded')\ndef f(img_key, img_md, **kwargs): return print(img_key) or 1"))["images"] == 10


def test_ctrl_c_ends_it_with_its_own_code(check, plugin, config, capsys) -> None:
    getter = plugin("def f(img_key, img_md, **kwargs): raise KeyboardInterrupt")
    assert run_check(config(num_repeats_getter=getter), (), as_json=True, decode=False) == 130
    assert capsys.readouterr().out == ""


def test_names_that_are_no_utf_8_are_escaped(check, config, pictures: Path, capsys) -> None:
    shutil.copy(pictures / "square0.png", os.fsencode(pictures) + b"/caf\xe9\n.png")
    assert any(path.endswith("caf\udce9\n.png") for group in check()["duplicates"] for path in group)
    run_check(config(), (), as_json=False, decode=False)
    assert "caf\\udce9\\n.png" in capsys.readouterr().out


@pytest.mark.parametrize("decode", [False, True])
def test_torch_is_never_imported(config, tmp_path: Path, decode: bool) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom sdxl_train.check import run_check\n"
        f"code = run_check(Path(sys.argv[1]), (), False, {decode})\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(config(sample_benchmark=None))], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[] 0"], done.stderr


def test_the_text_says_what_the_object_says(config, pictures: Path, capsys) -> None:
    shutil.copy(pictures / "square0.png", pictures / "copy.png")
    (pictures / "wide0.png").write_bytes(b"")
    file = config(save_every_n_steps=2)
    assert run_check(file, (), as_json=False, decode=False) == 2
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert "pictures: 10, of which 9 captioned, 0 described, 1 without text" in lines
    assert "left out: 0 missing, 0 dropped by 0 repeats, 1 bad" in lines
    assert "steps: 6, of 3 an epoch; 3 batches an epoch; effective batch 4" in lines
    assert any(line.split()[:4] == ["64x64", "7", "7", "2"] for line in lines)
    assert any("copy.png" in line and "square0.png" in line for line in lines)
    assert any("after the steps 2, 4, 6" in line for line in lines)
    assert lines[-2] == "problems: 1" and "wide0.png" in lines[-1]
    assert "1 problems" in told.err


def test_a_plan_of_nothing_can_be_shown() -> None:
    assert as_text(Plan()) == ""
    assert {name: value for name, value in json.loads(as_json_object(Plan())).items() if value} == {}
