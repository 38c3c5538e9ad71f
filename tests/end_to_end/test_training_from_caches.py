"""Training from caches: those of other programs, those without pictures, and the same training wherever the latents are."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_files import cache_arrays, write_cache
from cache_runs import PLACED, SIZES, identities, rewritten
from command_runs import read_seen, watched_run


@pytest.fixture
def foreign(data: Path) -> dict[str, dict[str, Any]]:
    """Caches as other programs write them, in place of our own: their plain latents by key."""
    made = {key: cache_arrays(*PLACED[key][0], seed=number) for number, key in enumerate(PLACED)}
    sizes = {key: np.array(size) for key, size in SIZES.items()}
    # euge-trainer: plain keys.
    write_cache(data / "square0.npz", **made["square0"] | {"original_size": sizes["square0"], "crop_ltrb": np.array([0, 0, 64, 64])})
    # sd-scripts: keys with the size of the latents, floats, a further array, its own file name.
    suffixed = {f"{name}_8x8": array for name, array in made["square1"].items()} | {"alpha_mask_8x8": np.ones((64, 64))}
    suffixed |= {"original_size_8x8": sizes["square1"].astype(np.float64) + 0.5, "crop_ltrb_8x8": np.array([4.0, 0.0, 59.0, 64.0])}
    write_cache(data / "square1_0080x0070_sdxl.npz", **suffixed)
    # Only latents, of half precision, packed.
    np.savez_compressed(
        data / "wide0.npz",
        latents=made["wide0"]["latents"].astype(np.float16),
        latents_flipped=made["wide0"]["latents_flipped"].astype(np.float16),
    )
    # A size that is an object.
    write_cache(data / "wide1.npz", **made["wide1"] | {"original_size": np.array({"w": 1}, object), "crop_ltrb": np.array([0, 0, 0, 0])})
    made["wide0"]["latents"] = made["wide0"]["latents"].astype(np.float16).astype(np.float32)
    made["wide0"]["latents_flipped"] = made["wide0"]["latents_flipped"].astype(np.float16).astype(np.float32)
    for path in data.glob("square2.*"):
        path.unlink()
    return made


KEEPS_LATENTS = """
import json
from pathlib import Path
from sdxl_train import hookimpl

class Latents:
    @hookimpl(wrapper=True)
    def shape_noise(self, latents, batch):
        with open(Path(__file__).with_name('latents.jsonl'), 'a') as file:
            for key, flipped, one in zip(batch.keys, batch.flipped, latents.tolist()):
                file.write(json.dumps([key, flipped, one]) + '\\n')
        return (yield)
"""


def trained_latents(folder: Path, trained: Callable[..., Any], **keys: Any) -> list[tuple[str, bool, np.ndarray]]:
    """(key, flipped, scaled latents) of each sample of a training."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latents.py").write_text(KEEPS_LATENTS)
    trained(folder.name, plugins=[f"{folder}/latents.py:Latents"], **keys)
    lines = (folder / "latents.jsonl").read_text().splitlines()
    return [(key, flipped, np.array(one, np.float32)) for key, flipped, one in map(json.loads, lines)]


def assert_trained_as_stored(samples: list[tuple[str, bool, np.ndarray]], stored: dict[str, Any]) -> None:
    assert {key for key, _, _ in samples} == set(stored)
    assert {flipped for _, flipped, _ in samples} == {True, False}
    for key, flipped, latents in samples:
        np.testing.assert_allclose(latents, stored[key]["latents_flipped" if flipped else "latents"] * np.float32(0.13025), rtol=1e-6)


def test_caches_of_other_programs_train_as_they_are(foreign, trained, data: Path, tmp_path: Path, encodes: list[int]) -> None:
    before = identities(data)
    samples = trained_latents(tmp_path / "run", trained, num_train_epochs=3)
    assert not encodes and not rewritten(before, data)
    assert_trained_as_stored(samples, foreign)
    crops = {(sample["key"], sample["flipped"]): sample["crop"] for sample in read_seen(tmp_path / "run")}
    for (key, flipped), crop in crops.items():
        expected = [0, 4 if not flipped else 5] if key == "square1" else [0, 0]
        assert crop == expected, (key, flipped)


@pytest.mark.parametrize("mode", ["txt", "json"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_caches_train_without_their_pictures(foreign, trained, data: Path, tmp_path: Path, mode: str, in_memory: bool) -> None:
    for path in data.glob("*.png"):
        path.unlink()
    keys: dict[str, Any] = {"keep_cached_latents_in_memory": in_memory}
    if mode == "json":
        rows: dict[str, dict[str, Any]] = {key: {"caption": f"picture {key}", "image_path": f"/gone/{key}.png"} for key in foreign}
        rows["square0"]["original_size"] = [640, 480]
        (tmp_path / "m.json").write_text(json.dumps(rows))
        for path in data.glob("*.txt"):
            path.unlink()
        keys["metadata_files"] = [str(tmp_path / "m.json")]
    samples = trained_latents(tmp_path / "run", trained, num_train_epochs=3, **keys)
    assert_trained_as_stored(samples, foreign)
    seen = {sample["key"]: sample for sample in read_seen(tmp_path / "run")}
    assert all(sample["caption"] == f"picture {key}" for key, sample in seen.items())
    sizes = {key: sample["original_size"][::-1] for key, sample in seen.items()}
    square0 = [640, 480] if mode == "json" else [64, 64]
    assert sizes == {"square0": square0, "square1": [80, 70], "wide0": [96, 32], "wide1": [96, 32]}, "stored, else the bucket"


def test_a_cache_alone_of_a_bucket_that_is_no_multiple_of_the_step_is_accepted(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_cache(tmp_path / "data" / "odd.npz", **cache_arrays(72, 56))
    ended, seen = watched_run(tmp_path, tiny_base, [tmp_path / "data"])
    assert ended.code == 0, ended.err[-3000:]
    assert [sample["target_size"] for sample in seen] == [[56, 72]]


def test_of_two_names_of_a_cache_the_plain_one_is_read(data: Path, trained, tmp_path: Path, encodes: list[int]) -> None:
    for path in [*data.glob("*.png"), *data.glob("*.txt")]:
        if path.stem != "square1":
            path.unlink()
    plain, sized = cache_arrays(64, 64, seed=1), cache_arrays(64, 64, seed=2)
    for arrays, name in ((plain, "square1.npz"), (sized, "square1_0080x0070_sdxl.npz")):
        write_cache(data / name, **arrays | {"original_size": np.array([80, 70])})
    samples = trained_latents(tmp_path / "run", trained, num_train_epochs=8)
    assert not encodes
    assert_trained_as_stored(samples, {"square1": plain})


# ---- the same training ----


def test_latents_from_the_disk_from_memory_and_never_written_train_the_same(trained, data: Path) -> None:
    _, never_written = trained("a", cache_latents_to_disk=False)
    _, written = trained("b")
    _, at_each_fetch = trained("b", keep_cached_latents_in_memory=False)
    _, after_reading = trained("c", cache_latents_to_disk=False)
    assert len(written) == len(SIZES)
    assert never_written == written == at_each_fetch == after_reading


@pytest.mark.parametrize("mode", ["txt", "json"])
def test_a_start_that_finds_its_folder_changed_trains_the_same_on_the_pictures_that_have_not(
    trained, data: Path, tmp_path: Path, mode: str
) -> None:
    keys: dict[str, Any] = {}
    if mode == "json":
        rows = {key: {"caption": f"a {key}", "artist": "one"} for key in SIZES} | {"square0": {"original_size": [640, 480]}}
        (tmp_path / "m.json").write_text(json.dumps(rows))
        keys["metadata_files"] = [str(tmp_path / "m.json")]
    _, first = trained(**keys)  # which writes caches into the folder
    _, second = trained(**keys)
    assert len(first) == len(SIZES) and {tuple(sample["original_size"]) for sample in first} >= {(48, 128), (75, 200)}
    assert second == first


def test_a_cache_that_vanishes_during_training_ends_the_run_by_name(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "breaks.py").write_text(
        "import os\nfrom pathlib import Path\nfrom sdxl_train import hookimpl\nclass Breaks:\n    @hookimpl\n    def on_epoch_end(self, run):\n"
        f"        if run.epoch == 1: os.unlink({str(data / 'wide1.npz')!r})\n"
    )
    keys = {"plugins": [f"{tmp_path}/run/breaks.py:Breaks"], "keep_cached_latents_in_memory": False, "num_train_epochs": 4}
    ended, seen = watched_run(tmp_path / "run", tiny_base, [data], **keys)
    assert ended.code == 1 and "wide1.npz" in ended.err, ended.err[-2000:]
    assert len(seen) < 10 and re.search(r"step \d", ended.err.splitlines()[-1])
