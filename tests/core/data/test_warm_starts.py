"""A start that knows what earlier ones found out gives what one without any knowledge gives, whatever happened to the files between."""

import json
import os
import random
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_train.data import caches, encoding, indexing, sources
from sdxl_train.data.caching import VaeInUse
from sdxl_train.data.file_stamps import file_stamp
from sdxl_train.dataset import Dataset
from sdxl_train.errors import DataError
from sdxl_train.keys import Config

SIZES = [(16, 16), (32, 16), (16, 32), (24, 24), (48, 16)]
HOUR_NS = 3600 * 10**9


class Vae:
    """The mean of each 8x8 px, plus a constant that tells one VAE from another."""

    dtype = torch.float32

    def __init__(self, constant: float) -> None:
        self._constant = constant

    def encode(self, pixels: torch.Tensor) -> Any:
        colours = torch.nn.functional.avg_pool2d(pixels, 8)
        mean = torch.cat([colours, colours.mean(1, keepdim=True)], 1) + self._constant
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.full_like(mean, -8)))


VAES = {name: VaeInUse(Vae(constant), torch.device("cpu"), name.encode() * 16, "float32") for name, constant in (("A", 0), ("B", 5))}  # type: ignore[arg-type]


class Repeats:
    """Stands for the plugins: one repeat, or some that depend on the key and `salt`."""

    def __init__(self, salt: int) -> None:
        self.hooks, self._salt = self, salt

    def only_default_answers(self, key, hook):
        return not self._salt

    def many_calls(self, key):
        return nullcontext()

    def count_repeats(self, img_key, img_md, counter):
        return crc32(f"{img_key}{self._salt}".encode()) % 4


class Silent:
    """Stands for the console."""

    def warn(self, text): ...
    def watch(self, label, total):
        return lambda done, total: None

    def end_progress(self): ...


class World:
    """A folder of data, the records of the starts on it, and the configuration of the next one."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.data, self.records, self._top, self._aged = folder / "data", folder / "records", folder, 0
        for name in ("in/sub", "out"):
            (self.data / name).mkdir(parents=True)
        self.vae, self.salt, self.rows = "A", 0, dict[str, dict[str, Any]]()
        self.keys = {"resolution": 32, "bucket_reso_step": 8, "bad_images": "skip", "flip_aug": False, "image_dirs": ["in"]} | keys

    def picture(self, name: str, size: tuple[int, int] = (32, 16), seed: int = 0) -> Path:
        """Write a picture, uncompressed: those of one size have one length."""
        pixels = np.random.default_rng((seed, *size)).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(self.data / name, compress_level=0)
        return self.data / name

    def cache(self, name: str, value: float = 100, size: tuple[int, int] = (32, 16), flipped: float | None = None, **further: Any) -> Path:
        """Write a cache of another program."""
        arrays = {"latents": value, "latents_flipped": flipped}
        shape = (4, size[1] // 8, size[0] // 8)
        np.savez(self.data / name, **{key: np.full(shape, one, np.float32) for key, one in arrays.items() if one is not None}, **further)
        return self.data / name

    def metadata(self, **rows: dict[str, Any]) -> None:
        self.keys["metadata_files"] = ["m.json"]
        self.rows = rows
        (self.data / "m.json").write_text(json.dumps(rows))

    def start(self, data: Path | None = None, records: Path | None = None) -> dict[str, Any]:
        """One start of a run that trains: all that it found out about the data, with their latents."""
        records = records or self.records
        config = Config(pretrained_model_name_or_path="base", output_dir="out", records_cache_dir=str(records), **self.keys)
        os.chdir(data or self.data)
        try:
            return _found(config, Repeats(self.salt), records, VAES[self.vae])
        except DataError as error:
            # Beside other problems, a picture that has a valid cache is looked at only by those who do not know of the cache.
            return {"problems": sorted(problem.message for problem in error.problems if problem.kind != "image") or "bad pictures"}

    def age(self) -> None:
        """As if all that changed since the last time had changed an hour ago: then the folders' times are relied on."""
        for folder, _, _ in os.walk(self.data):
            if os.stat(folder).st_mtime_ns > time.time_ns() - HOUR_NS // 2:
                self._aged += 1
                os.utime(folder, ns=(time.time_ns() - HOUR_NS + self._aged,) * 2)

    def settle(self) -> None:
        """Starts until one can rely on the records for all that they hold."""
        for _ in range(3):  # the first writes caches, which changes the folders; the second searches them again
            self.age()
            self.start()

    def starts_agree(self) -> dict[str, Any]:
        """What a start with the records finds, which is what one without them finds on a copy of the data."""
        self.age()
        for copy in ("copy", "no records"):
            shutil.rmtree(self._top / copy, ignore_errors=True)
        shutil.copytree(self.data, self._top / "copy", symlinks=True)
        cold = self.start(self._top / "copy", self._top / "no records")
        before = self.files()
        warm = self.start()
        assert warm == cold
        changed = {name for name, stamp in (before.items() ^ self.files().items())}
        to_disk = self.keys.get("cache_latents", True) and self.keys.get("cache_latents_to_disk", True)
        assert all(to_disk and name.endswith(".npz") and (self.data / name).with_suffix(".png").exists() for name in changed)
        return warm

    def files(self) -> dict[str, Any]:
        """The stamp of each file."""
        return {str(path.relative_to(self.data)): file_stamp(str(path)) for path in self.data.rglob("*") if path.is_file()}


def _found(config: Config, plugins: Any, records: Path, vae: VaeInUse) -> dict[str, Any]:
    settings: Any = SimpleNamespace(config=config, plugins=plugins)
    dataset = Dataset(settings, records, Silent(), lambda: None)  # type: ignore[arg-type]
    index, to_disk = dataset.index, config.cache_latents_to_disk
    store = None
    if config.cache_latents:
        store = dataset.prepare_latents(vae, to_disk, not to_disk or config.keep_cached_latents_in_memory).store
    else:
        dataset.prepare_pictures()
    found: dict[str, Any] = {"counter": index.counter, "summary": index.summary, "missing": index.missing, "run folders": index.run_folders}
    for i, repeats in enumerate(index.num_repeats.tolist()):
        found[index.key(i)] = [repeats, bool(index.is_bad[i]), index.source_path(i)]
        if repeats:
            orientations = (False, True) if config.flip_aug else (False,)
            latents = [store.read([i], [flipped])[0].numpy().tobytes() for flipped in orientations] if store else []
            found[index.key(i)] += [index.info(i), index.metadata(i), [index.crop(i, flipped) for flipped in orientations], latents]
    return found


def latents_of(found: dict[str, Any], key: str, flipped: bool = False) -> np.ndarray:
    return np.frombuffer(found[key][-1][flipped], np.float32)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return World(tmp_path)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pictures whose header is read or which are decoded, the caches of which anything is read, and the captions that are read."""
    names: list[str] = []
    places = [(indexing, "image_header"), (indexing, "read_header"), (caches, "read_header"), (encoding, "load_pixels_and_source"), (sources, "read_caption_file")]
    for module, name in places:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, *given, real=real: (names.append(os.path.basename(path)), real(path, *given))[1])
    return names


# ---- What a random sequence of changes found ---------------------------------------------------------------------------------------


def change(world: World, choose: random.Random) -> None:
    """One thing that a user may do between two starts."""
    pictures, found = sorted(world.data.rglob("*.png")), sorted(world.data.rglob("*.npz"))
    folder = choose.choice(["in", "in/sub", "out"] if world.rows else ["in", "in/sub"])
    name = f"{folder}/p{choose.randrange(7)}"
    path = choose.choice([*pictures, *found]) if pictures or found else None
    what = choose.choice(
        ["picture", "picture", "cache", "cache", "text", "text", "remove", "move", "touch", "damage", "key", "key", "plugins"]
    )
    if what == "picture" and (world.rows or not any(one.name == f"{os.path.basename(name)}.png" for one in pictures)):
        world.picture(f"{name}.png", choose.choice(SIZES), choose.randrange(3))
    elif what == "cache":
        flipped = choose.choice([None, 200.5, float("nan")])
        further = {"original_size": np.array(choose.choice(SIZES))} if choose.random() < 0.5 else {}
        size = "_0032x0016_sdxl" if choose.random() < 0.2 else ""
        world.cache(f"{name}{size}.npz", choose.choice([100, 101, float("nan")]), choose.choice(SIZES), flipped, **further)
    elif what == "text" and world.rows:
        row = {"caption": f"c{choose.randrange(3)}", "artist": choose.choice(["x", "y"])}
        row |= choose.choice([{}, {"original_size": list(choose.choice(SIZES))}])
        row |= choose.choice([{}, *({"image_path": path} for path in (f"{name}.png", f"out/{os.path.basename(name)}.png", "gone/a.png", "in/p1.png"))])
        world.metadata(**(world.rows | {os.path.basename(name): row}))
    elif what == "text" and path:
        path.with_suffix(".txt").write_text(choose.choice(["a, artist:x", "b, artist:y", "best quality", ""]))
    elif what == "key":
        key = choose.choice(list(RANDOM_KEYS))
        world.keys[key] = choose.choice(RANDOM_KEYS[key])
    elif what == "plugins":
        world.vae, world.salt = choose.choice("AB"), choose.randrange(3)
    elif path and what == "remove":
        path.unlink()
    elif path and what == "move":
        target = world.data / folder / choose.choice([path.name, f"p{choose.randrange(7)}{path.suffix}"])
        if not target.exists():
            path.rename(target)
    elif path and what == "touch":
        os.utime(path, ns=(HOUR_NS + choose.randrange(10**9),) * 2)
    elif path and what == "damage":
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2] + (bytes(40) + raw[len(raw) // 2 + 40 :] if choose.random() < 0.6 else b""))


RANDOM_KEYS: dict[str, list[Any]] = {
    "resolution": [16, 32, 32],
    "bucket_reso_step": [8, 16],
    "bad_images": ["error", "skip", "skip"],
    "max_image_pixels": [300, 10**6, 10**6],
    "flip_aug": [False, True],
    "check_cache_validity": [True, True, False],
    "cache_latents": [True, True, True, False],
    "cache_latents_to_disk": [True, True, False],
    "keep_cached_latents_in_memory": [True, False],
    "async_cache": [True, False],
}


@pytest.mark.parametrize("seed", [*range(30), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(30, 530))])
def test_starts_with_and_without_records_agree_after_random_changes(world, seed):
    choose = random.Random(seed)
    for number in range(4):
        world.picture(f"in/p{number}.png", choose.choice(SIZES), number)
    if seed % 2:
        world.metadata(p0={"image_path": "out/p0.png"}, p1={"image_path": "in/p1.png", "original_size": [64, 64]}, p2={}, p5={})
    for _ in range(8):
        world.starts_agree()
        for _ in range(choose.choice([1, 1, 1, 2, 3])):
            change(world, choose)
    assert not list(world.data.rglob(".*.tmp"))


# ---- One rule each -----------------------------------------------------------------------------------------------------------------


def test_flipped_latents_are_verified_once_flip_aug_needs_them(world):
    world.picture("in/a.png")
    world.cache("in/a.npz", 100, flipped=float("nan"))
    assert latents_of(world.start(), "a").tolist() == [100] * 32
    world.keys["flip_aug"] = True
    assert np.isfinite(latents_of(world.starts_agree(), "a", flipped=True)).all()


def test_what_another_vae_encoded_while_caches_were_trusted_is_not_taken_for_verified(world):
    world.picture("in/a.png")
    world.start()
    world.picture("in/b.png", seed=1)
    world.keys["check_cache_validity"], world.vae = False, "B"
    assert latents_of(world.start(), "b").mean() > 4
    world.keys["check_cache_validity"], world.vae = True, "A"
    assert latents_of(world.starts_agree(), "b").mean() < 1


def test_another_original_size_in_the_metadata_judges_the_cache_anew(world):
    world.picture("in/a.png")
    world.cache("in/a.npz", 100, original_size=np.array([64, 64]))
    world.metadata(a={"original_size": [64, 64]})
    assert latents_of(world.start(), "a")[0] == 100
    world.metadata(a={"original_size": [65, 64]})
    assert latents_of(world.starts_agree(), "a")[0] != 100


def test_folders_of_one_name_are_one_category(world):
    for name in ("in/sub/a", "out/sub/b", "out/sub/c"):
        (world.data / name).parent.mkdir(exist_ok=True)
        world.picture(f"{name}.png")
    world.keys["image_dirs"] = ["in", "out"]
    assert world.start()["counter"]["category"] == {"sub": 3}


@pytest.mark.parametrize("used_before", ["in/a.png", "in/a.npz"])
def test_a_named_picture_that_appears_outside_image_dirs_is_used(world, used_before):
    world.picture("in/b.png")
    (world.picture if used_before.endswith("png") else world.cache)(used_before)
    world.metadata(a={"image_path": "out/a.png"}, b={})
    world.settle()
    assert world.starts_agree()["a"][2] == used_before
    world.picture("out/a.png", seed=1)
    assert world.starts_agree()["a"][2] == "out/a.png"


def test_a_bad_picture_outside_image_dirs_that_goes_is_missing(world):
    world.picture("in/b.png")
    path = world.picture("out/a.png")
    path.write_bytes(path.read_bytes()[:100])
    world.metadata(a={"image_path": "out/a.png"}, b={})
    world.settle()
    assert world.starts_agree()["summary"].bad == 1
    path.unlink()
    assert world.starts_agree()["missing"] == ["a"]


def test_a_cache_elsewhere_takes_the_place_of_the_one_beside_a_picture_outside_image_dirs(world):
    world.picture("out/a.png")
    world.metadata(a={"image_path": "out/a.png"})
    beside = world.cache("out/a.npz", 100)
    world.cache("in/a.npz", 101)
    world.settle()
    assert latents_of(world.starts_agree(), "a")[0] == 100
    beside.unlink()
    assert latents_of(world.starts_agree(), "a")[0] == 101


def test_a_file_in_a_folder_whose_time_was_set_back_is_found(world):
    world.picture("in/a.png")
    world.settle()
    status = (world.data / "in").stat()
    world.picture("in/b.png")
    os.utime(world.data / "in", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "b" in world.starts_agree()


def test_a_cache_that_comes_elsewhere_costs_no_look_at_its_picture(world, opened):
    world.picture("in/a.png")
    world.keys["cache_latents_to_disk"] = False
    world.settle()
    world.cache("in/sub/a.npz")
    world.age()
    opened.clear()
    assert latents_of(world.start(), "a")[0] == 100
    assert opened == ["a.npz"]


@pytest.mark.parametrize("flip_aug", [False, True])
def test_a_second_start_reads_nothing(world, opened, flip_aug):
    world.keys["flip_aug"] = flip_aug
    for key in "abc":
        world.picture(f"in/{key}.png")
    world.cache("in/sub/b.npz", flipped=1)
    world.cache("in/alone.npz", flipped=1)
    world.start()
    opened.clear()
    world.start()
    assert opened == []
    assert world.starts_agree()["summary"].images == 4


def test_the_repeats_for_people_are_those_of_the_last_start(world):
    for key in "abc":
        world.picture(f"in/{key}.png")
    world.settle()
    world.salt = 1
    found = world.start()
    assert json.loads((world.records / "num_repeats.json").read_text()) == {key: found[key][0] for key in "abc"}


def test_an_index_of_another_program_is_as_good_as_none(world):
    from safetensors.numpy import save_file

    world.picture("in/a.png")
    world.records.mkdir()
    save_file({"weights": np.zeros(3, np.float32)}, world.records / "index.safetensors")
    assert world.starts_agree()["a"][0] == 1


# ---- Caches that several data would have -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_cache", [False, True])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_picture_under_two_keys_is_encoded_once_for_the_first_and_not_again(world, opened, async_cache, in_memory):
    world.keys |= {"async_cache": async_cache, "keep_cached_latents_in_memory": in_memory, "flip_aug": True}
    world.picture("in/a.png")
    world.metadata(b={"image_path": "in/a.png"}, a={"image_path": "in/a.png"}, c={"image_path": "in/sub/../a.png"})
    found = world.start()
    assert opened.count("a.png") == 3 + 1, "each header, and one decode"
    assert found["a"][-1] == found["b"][-1] == found["c"][-1]
    (world.data / "in/a.npz").unlink()
    world.metadata(a={"image_path": "in/a.png"})
    assert world.start()["a"][-1] == found["a"][-1], "the draw is that of the first key"
    world.metadata(b={"image_path": "in/a.png"}, a={"image_path": "in/a.png"})
    world.starts_agree()
    opened.clear()
    assert world.start()["b"][-1] == found["a"][-1]
    assert opened == []


def test_a_cache_that_only_one_of_two_keys_can_use_is_made_again_for_both(world):
    world.picture("in/a.png")
    world.cache("in/a.npz", 100, original_size=np.array([64, 64]))
    world.metadata(a={"image_path": "in/a.png"}, b={"image_path": "in/a.png", "original_size": [64, 64]})
    found = world.start()
    assert found["a"][-1] == found["b"][-1] and latents_of(found, "a")[0] != 100
    world.starts_agree()


def test_a_bad_picture_under_two_keys_is_left_out_under_both(world):
    path = world.picture("in/a.png", (48, 16))
    path.write_bytes(path.read_bytes()[:-300] + bytes(288) + path.read_bytes()[-12:])
    world.picture("in/b.png")
    world.metadata(a={"image_path": "in/a.png"}, a2={"image_path": "in/a.png"}, b={})
    assert world.starts_agree()["summary"].bad == 2


def test_two_pictures_that_would_share_a_cache_are_a_problem_where_caches_are_written(world):
    world.picture("in/a.png")
    Image.new("RGB", (32, 16)).save(world.data / "in/a.bmp")
    world.metadata(a={"image_path": "in/a.png"}, b={"image_path": "in/sub/../a.bmp"})
    problem = "in/a.png and in/sub/../a.bmp would share the cache in/a.npz; rename one"
    assert world.start()["problems"] == [problem]
    world.keys["cache_latents_to_disk"] = False
    found = world.starts_agree()
    assert found["a"][-1] != found["b"][-1] and not list(world.data.rglob("*.npz"))
    world.keys["cache_latents"] = False
    assert world.starts_agree()["summary"].images == 2
    world.keys |= {"cache_latents": True, "cache_latents_to_disk": True}
    assert world.starts_agree()["problems"] == [problem], "also where an earlier start knows these data"


def test_a_picture_under_two_keys_is_encoded_for_each_where_nothing_is_written(world):
    world.keys["cache_latents_to_disk"] = False
    world.picture("in/a.png")
    world.metadata(a={"image_path": "in/a.png"}, b={"image_path": "in/a.png"})
    found = world.start()
    assert found["a"][-1] != found["b"][-1], "each has a draw of its own"


# ---- Other names and sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_cache_validity", [False, True])
@pytest.mark.parametrize("with_picture", [False, True])
def test_of_several_sizes_that_of_the_bucket_is_trained_also_at_another_resolution(world, opened, check_cache_validity, with_picture):
    world.keys |= {"resolution": 32, "check_cache_validity": check_cache_validity}
    sizes = {"4x4": 104, "2x2": 102, "8x2": 182}
    arrays = {f"latents_{size}": np.full((4, *map(int, size.split("x"))), value, np.float32) for size, value in sizes.items()}
    np.savez(world.data / "in/a.npz", **arrays, **{f"original_size_{size}": np.array([64, 64]) for size in sizes})
    world.cache("in/other.npz")
    if with_picture:
        world.picture("in/a.png", (64, 64))
    for resolution, value in ((32, 104), (16, 102), (32, 104)):
        world.keys["resolution"] = resolution
        assert latents_of(world.starts_agree(), "a")[0] == value
        opened.clear()
        world.start()
        assert opened == []


def test_a_picture_that_is_called_like_a_cache_keeps_its_cache(world):
    world.picture("in/a.png")
    world.picture("in/a_0032x0016_sdxl.png", seed=1)
    world.cache("in/a_0032x0016_sdxl.npz", 101)
    found = world.starts_agree()
    assert latents_of(found, "a_0032x0016_sdxl")[0] == 101 and latents_of(found, "a")[0] != 101
    (world.data / "in/a.npz").unlink()
    world.metadata(a={})
    assert latents_of(world.starts_agree(), "a")[0] != 101, "also where that picture is no datum"
    (world.data / "in/a.npz").unlink()
    (world.data / "in/a_0032x0016_sdxl.png").unlink()
    assert latents_of(world.starts_agree(), "a")[0] == 101


def test_captions_are_not_read_again_because_caches_were_written(world, opened):
    for key in "ab":
        world.picture(f"in/{key}.png")
        (world.data / f"in/{key}.txt").write_text(f"cat {key}")
    world.start()
    opened.clear()
    world.start()
    assert opened == []
    (world.data / "in/b.txt").write_text("dog b")
    assert [world.starts_agree()[key][3].caption for key in "ab"] == ["cat a", "dog b"]
