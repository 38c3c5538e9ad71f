"""Data that cannot be trained on: found before step 1, all in one report by file name, and nothing of the user's is touched."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_files import (
    cache_arrays,
    encoded,
    noise,
    overwritten,
    poison_captions,
    write_good,
    write_metadata_problems,
    write_poison,
    write_poison_caches,
)
from command_runs import Ended, contents, memory_growth, read_seen, run_command, watched_run, write_config

LIMIT_PX = 50_000_000


@dataclass(frozen=True)
class Refused:
    """A command that was refused, what the folder of the data was before and after it, and how many bytes of memory it took."""

    ended: Ended
    before: dict[bytes, tuple[str, int]]
    after: dict[bytes, tuple[str, int]]
    growth: int | None = None

    @property
    def report(self) -> str:
        """The last message: the one that says why the command ends."""
        return self.ended.err.rpartition("\nsdxl-train: ")[2] if "\nsdxl-train: " in self.ended.err else self.ended.err

    def lines_about(self, name: str) -> list[str]:
        return [line for line in self.report.splitlines() if re.search(rf"(^|[/ ]){re.escape(name)}($|[:, ])", line)]


def refused(file: Path, data: Path, command: str = "train") -> Refused:
    before = contents(data)
    with memory_growth() as growth:
        ended = run_command(command, file)
    return Refused(ended, before, contents(data), growth.num_bytes)


def assert_refused(run: Refused) -> None:
    assert run.ended.code == 2, run.ended.err[-3000:]
    assert "Traceback" not in run.ended.err
    assert run.before == run.after, "nothing is written, changed or touched beside the pictures"


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, str]]:
    """A folder with good pictures among poison ones of every kind: (folder, keys of the good ones, {file name: word of the report})."""
    folder = tmp_path_factory.mktemp("poisoned") / "data"
    good = write_good(folder)
    words = write_poison(folder)
    for name, data in poison_captions().items():
        noise(50).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(data)
        words[f"{name}.txt"] = "utf-8"
    for place, kind in (("one", "png"), ("two", "jpg")):
        (folder / place).mkdir()
        noise(60).save(folder / place / f"twin.{kind}")
    return folder, good, words


@pytest.fixture(scope="module", params=["train", "cache"])
def whole_report(request, tiny_base: Path, poisoned, tmp_path_factory: pytest.TempPathFactory) -> Refused:
    file = write_config(tmp_path_factory.mktemp("refused"), tiny_base, [poisoned[0]], max_image_pixels=LIMIT_PX)
    return refused(file, poisoned[0], request.param)


def test_one_report_names_every_bad_file_and_no_good_one(whole_report: Refused, poisoned) -> None:
    folder, good, words = poisoned
    assert_refused(whole_report)
    assert len(words) >= 30
    silent = {name for name in words if len(whole_report.lines_about(name)) != 1}
    assert not silent, "each has one line"
    wordless = {name: word for name, word in words.items() if word not in whole_report.lines_about(name)[0].lower()}
    assert not wordless, "the line gives the reason"
    twins = [line for line in whole_report.report.splitlines() if "twin" in line]
    assert len(twins) == 1 and str(folder / "one" / "twin.png") in twins[0] and str(folder / "two" / "twin.jpg") in twins[0]
    assert not re.search("|".join(good), whole_report.report)
    assert not re.search(r"says_\w+\.png", whole_report.report), "a picture is not bad because its caption is"


def test_the_report_says_what_would_do(whole_report: Refused) -> None:
    assert "bad_images" in whole_report.report


@pytest.mark.parametrize("kind", ["pictures", "caches"])
def test_bad_data_are_refused_without_being_unpacked(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    write_good(data)
    run_command("cache", write_config(tmp_path / "first", tiny_base, [data]))  # what has to be imported is
    if kind == "pictures":
        write_poison(data)
    else:
        write_poison_caches(data, tmp_path / "marker")
    run = refused(write_config(tmp_path / "run", tiny_base, [data], max_image_pixels=LIMIT_PX), data, "cache")
    assert_refused(run)
    if run.growth is None:
        pytest.skip("the system does not tell how much memory the process took")
    assert run.growth < 64 << 20


def test_a_refused_run_has_trained_nothing(tiny_base: Path, poisoned, tmp_path: Path) -> None:
    run, seen = watched_run(tmp_path, tiny_base, [poisoned[0]], max_image_pixels=LIMIT_PX)
    assert run.code == 2 and not seen
    assert not list(tmp_path.glob("out/models/*")) and not list(tmp_path.glob("out/samples/*"))


@pytest.fixture(scope="module")
def skipping(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, list[dict], list[str], dict[str, str], Path]:
    """A training with bad_images = "skip" on good and poison pictures, without bad captions: (its end, samples, good keys, poison, data)."""
    folder = tmp_path_factory.mktemp("skipping")
    good, words = write_good(folder / "data"), write_poison(folder / "data")
    ended, seen = watched_run(folder, tiny_base, [folder / "data"], max_image_pixels=LIMIT_PX, bad_images="skip")
    return ended, seen, good, words, folder / "data"


def test_skip_trains_the_good_ones_and_names_and_counts_the_others(skipping) -> None:
    ended, seen, good, words, _ = skipping
    assert ended.code == 0, ended.err[-3000:]
    assert sorted(sample["key"] for sample in seen) == good
    unnamed = {name for name in words if not re.search(rf"left out[^\n]*/{re.escape(name)}", ended.err)}
    assert not unnamed
    assert len(re.findall(rf"\b{len(words)}\b[^\n;,]* bad", ended.err)) >= 2, "banner and summary give the count"


def test_skip_names_each_bad_file_once(skipping) -> None:
    ended, _, _, words, _ = skipping
    repeated = [name for name in words if len(re.findall(rf"/{re.escape(name)}\b", ended.err)) > 1]
    assert not repeated


def test_skip_writes_caches_of_the_good_ones_only(skipping) -> None:
    _, _, good, _, data = skipping
    assert sorted(path.name for path in data.rglob("*.npz")) == [f"{key}.npz" for key in good]


def test_a_second_start_leaves_the_same_pictures_out_and_says_so_again(skipping, tiny_base: Path) -> None:
    _, _, _, words, data = skipping
    again = run_command("train", data.parent / "sdxl.toml")
    assert again.code == 0, again.err[-3000:]
    unnamed = {name for name in words if f"/{name}" not in again.err}
    assert not unnamed
    assert len(re.findall(rf"\b{len(words)}\b[^\n;,]* bad", again.err)) >= 2


@pytest.mark.parametrize("command", [["train"], ["train", "--set", "cache_latents=false"], ["cache"], ["check", "--decode"], ["preview"]])
@pytest.mark.parametrize("bad_images", ["skip", "error"])
def test_data_without_text_are_counted_once_without_the_pictures_that_are_left_out(
    tiny_base: Path, tmp_path: Path, command: list[str], bad_images: str
) -> None:
    good = write_good(tmp_path / "data")
    (tmp_path / "data" / f"{good[0]}.txt").unlink(missing_ok=True)
    if bad_images == "skip":
        png = encoded(noise(9), "PNG")  # only a decode finds the sum wrong
        (tmp_path / "data" / "damaged.png").write_bytes(overwritten(png, png.index(b"IDAT") + 999, bytes([png[png.index(b"IDAT") + 999] ^ 1])))
    file = write_config(tmp_path, tiny_base, [tmp_path / "data"], bad_images=bad_images)
    out = ["--out", tmp_path / "pages"] if command == ["preview"] else []
    ended = run_command(command[0], file, *command[1:], *out)
    assert ended.code == 0, ended.err[-3000:]
    told = re.findall(r"[^\n]*pictures have neither caption nor description[^\n]*", ended.out + ended.err)
    assert len(told) == 1 and re.search(rf"\b1 pictures have.*: {good[0]}$", told[0]), told


def test_skip_does_not_skip_bad_captions(tiny_base: Path, tmp_path: Path) -> None:
    good = write_good(tmp_path / "data")
    (tmp_path / "data" / "cut.png").write_bytes(encoded(noise(9), "PNG")[:2000])
    (tmp_path / "data" / "fine1.txt").write_bytes("un café".encode("latin-1"))
    run = refused(write_config(tmp_path, tiny_base, [tmp_path / "data"], bad_images="skip"), tmp_path / "data")
    assert_refused(run)
    assert run.lines_about("fine1.txt") and good[0] not in run.report


def test_a_picture_that_only_a_full_decode_finds_bad_stops_the_run_too(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_good(data, 6)
    png = encoded(noise(10), "PNG")
    (data / "aaa_wrong_sum.png").write_bytes(overwritten(png, png.index(b"IDAT") + 999, bytes([png[png.index(b"IDAT") + 999] ^ 1])))
    jpeg = encoded(noise(11), "JPEG")
    (data / "zzz_damaged.jpg").write_bytes(overwritten(jpeg, len(jpeg) // 2, b"\xff" * 100))
    before = contents(data)
    run = refused(write_config(tmp_path, tiny_base, [data]), data)
    assert run.ended.code == 2 and "Traceback" not in run.ended.err, run.ended.err[-3000:]
    assert run.lines_about("aaa_wrong_sum.png") and run.lines_about("zzz_damaged.jpg") and "fine" not in run.report
    after = contents(data)
    assert {path: after[path] for path in before} == before
    assert all(path.endswith(b".npz") for path in after.keys() - before.keys()), "only whole caches of good pictures may be new"


def test_bad_pictures_are_found_without_latent_caching_too(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_good(data)
    png = encoded(noise(10), "PNG")
    (data / "wrong_sum.png").write_bytes(overwritten(png, png.index(b"IDAT") + 999, bytes([png[png.index(b"IDAT") + 999] ^ 1])))
    run = refused(write_config(tmp_path, tiny_base, [data], cache_latents=False), data)
    assert_refused(run)
    assert run.lines_about("wrong_sum.png") and "fine" not in run.report


def test_a_picture_that_may_not_be_read_is_in_the_report(tiny_base: Path, tmp_path: Path) -> None:
    write_good(tmp_path / "data")
    (tmp_path / "data" / "fine1.png").chmod(0)
    if os.access(tmp_path / "data" / "fine1.png", os.R_OK):
        pytest.skip("root may read everything")
    run = refused(write_config(tmp_path, tiny_base, [tmp_path / "data"]), tmp_path / "data")
    assert_refused(run)
    assert "denied" in run.lines_about("fine1.png")[0].lower()


def test_every_fault_of_the_metadata_is_reported_with_file_and_line(tiny_base: Path, tmp_path: Path) -> None:
    write_good(tmp_path / "data")
    files, faults = write_metadata_problems(tmp_path / "metadata")
    before = contents(tmp_path / "metadata")
    metadata_files = [str(path) for path in files]
    run = refused(write_config(tmp_path, tiny_base, [tmp_path / "data"], metadata_files=metadata_files), tmp_path / "data")
    assert_refused(run)
    assert contents(tmp_path / "metadata") == before
    places = {name: re.findall(rf"{re.escape(name)}:(\d+)", run.report) for name in faults}
    unplaced = {name: found for name, found in places.items() if str(faults[name]) not in found}
    assert not unplaced
    assert "with_bom.json" not in run.report
    assert max(map(len, run.report.splitlines())) < 1000


def test_a_metadata_file_that_is_missing_is_named(tiny_base: Path, tmp_path: Path) -> None:
    write_good(tmp_path / "data")
    run = refused(write_config(tmp_path, tiny_base, [tmp_path / "data"], metadata_files=[str(tmp_path / "gone.json")]), tmp_path / "data")
    assert_refused(run)
    assert "gone.json" in run.report


def test_a_name_that_stands_for_several_pictures_is_an_error_unless_the_metadata_say_which(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for place in ("one", "two"):
        (data / place).mkdir(parents=True)
        for name in ("named", "unnamed"):
            noise(1).save(data / place / f"{name}.png")
    (tmp_path / "m.json").write_text(json.dumps({"named": {"image_path": str(data / "two/named.png")}, "unnamed": {"caption": "x"}}))
    run = refused(write_config(tmp_path, tiny_base, [data], metadata_files=[str(tmp_path / "m.json")]), data)
    assert_refused(run)
    (line,) = [line for line in run.report.splitlines() if "unnamed" in line]
    assert str(data / "one/unnamed.png") in line and str(data / "two/unnamed.png") in line
    assert "/named.png" not in run.report


def test_defective_caches_without_pictures_are_named_with_the_reason_and_nothing_in_them_is_run(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    words = write_poison_caches(data, tmp_path / "marker")
    for i in range(3):
        np.savez(data / f"fine{i}.npz", **cache_arrays(seed=i))
        (data / f"fine{i}.txt").write_text("a caption")
    run = refused(write_config(tmp_path, tiny_base, [data]), data)
    assert_refused(run)
    unnamed = {name for name in words if len(run.lines_about(name)) != 1}
    assert not unnamed, "each has one line"
    wordless = {name: word for name, word in words.items() if word not in run.lines_about(name)[0].lower()}
    assert not wordless
    assert "fine" not in run.report
    assert not (tmp_path / "marker").exists()


def test_defective_caches_of_pictures_are_no_error(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    words = write_poison_caches(data, tmp_path / "marker")
    for number, name in enumerate(words):
        noise(number).save(data / name.replace(".npz", ".png"))
    ended, seen = watched_run(tmp_path, tiny_base, [data])
    assert ended.code == 0, ended.err[-3000:]
    assert len(seen) == len(words) and not (tmp_path / "marker").exists()
    assert re.search(rf"\b{len(words)}\b[^\n]*not valid", ended.err), "they are counted"
    for name in words:
        assert np.load(data / name)["latents"].shape == (4, 8, 8)


NO_REPEATS = "def none(img_key, img_md, **kwargs):\n    return 0\n"


def test_where_nothing_is_left_to_train_the_counts_say_why(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_good(tmp_path / "good", 3)
    write_good(tmp_path / "bad", 2)
    for path in (tmp_path / "bad").glob("*.png"):
        path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "none.py").write_text(NO_REPEATS)

    def report(folder: str, **keys: Any) -> str:
        run = refused(write_config(tmp_path / f"run_{folder}", tiny_base, [tmp_path / folder], **keys), tmp_path / folder)
        assert_refused(run)
        return run.report

    assert str(tmp_path / "empty") in report("empty")
    assert re.search(r"\b3\b.*(drop|repeat)", report("good", num_repeats_getter=f"{tmp_path}/none.py:none"))
    assert re.search(r"\b2\b.*bad", report("bad", bad_images="skip"))


def test_a_folder_that_is_missing_is_named(tiny_base: Path, tmp_path: Path) -> None:
    write_good(tmp_path / "data")
    run = refused(write_config(tmp_path, tiny_base, [tmp_path / "data", tmp_path / "gone"]), tmp_path / "data")
    assert_refused(run)
    assert str(tmp_path / "gone") in run.report


@pytest.mark.parametrize("command", ["train", "cache"])
def test_a_base_that_is_missing_or_no_model_is_found_before_any_work_on_the_data(tiny_base: Path, tmp_path: Path, command: str) -> None:
    data = tmp_path / "data"
    write_good(data)
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    (tmp_path / "cut.safetensors").write_bytes(tiny_base.read_bytes()[:-1000])
    for name in ("gone.safetensors", "page.safetensors", "cut.safetensors"):
        for key in ("pretrained_model_name_or_path", "vae"):
            run = refused(write_config(tmp_path / f"{name}_{key}", tiny_base, [data], **{key: str(tmp_path / name)}), data, command)
            assert_refused(run)
            assert name in run.report
            assert read_seen(tmp_path / f"{name}_{key}") == []


def test_a_vae_that_gives_nan_is_an_error_that_names_the_picture_and_both_remedies(tiny_base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    prefix = "first_stage_model."
    vae = {name.removeprefix(prefix): tensor for name, tensor in load_file(tiny_base).items() if name.startswith(prefix)}
    vae["encoder.conv_in.weight"] = torch.full_like(vae["encoder.conv_in.weight"], 1e38)
    save_file(vae, tmp_path / "vae.safetensors")
    write_good(tmp_path / "data", 1)
    for command in ("train", "cache"):
        run = refused(
            write_config(tmp_path / command, tiny_base, [tmp_path / "data"], vae=str(tmp_path / "vae.safetensors")),
            tmp_path / "data",
            command,
        )
        assert_refused(run)
        assert "fine0.png" in run.report and "no_half_vae" in run.report and re.search(r"\bvae\b", run.report)
