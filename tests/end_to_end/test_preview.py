"""The preview of an epoch shows what a real training of that epoch draws, and leaves everything else alone."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PLUGINS = """
import json
import numpy as np
from sdxl_train import hookimpl

def repeats(img_key, img_md, **kwargs): return {"square0": 3, "wide1": 2, "odd": 4, "square5": 0}.get(img_key, 1)

def shuffled(img_info, **kwargs):
    tags = img_info.caption.split(", ")
    kwargs["random"].shuffle(tags)
    return ", ".join([*tags, "flipped" if kwargs["flip_aug"] else "plain"])

def worded(img_info, **kwargs): return f"{img_info.description} ({kwargs['random'].random()})"

class Probe:
    def __init__(self): self.run, self.seen, self.pixels = None, [], {}

    @hookimpl
    def on_train_start(self, run): self.run = run

    @hookimpl(wrapper=True)
    def sample_timesteps(self, batch, min_timestep, max_timestep):
        timesteps = yield
        for row in range(len(batch) if self.run else 0):  # a preview has no run
            self.seen.append([self.run.epoch, self.run.step + 1, batch.keys[row], batch.flipped[row], batch.captions[row], batch.crops[row],
                              batch.original_sizes[row], batch.target_sizes[row], int(timesteps[row])])
            if batch.pixels is not None:
                self.pixels[str(len(self.seen))] = batch.pixels[row].permute(1, 2, 0).numpy()
        return timesteps

    @hookimpl
    def on_train_end(self, run):
        json.dump(self.seen, open(FOLDER + "/seen.json", "w"))
        np.savez(FOLDER + "/pixels.npz", **self.pixels)
"""


@pytest.fixture
def data(tmp_path: Path, pictures: Path) -> dict[str, object]:
    """Keys of a configuration with both kinds of text, processors, repeats and everything else that is drawn at random."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (8, 9, 3), np.uint8)).resize((71, 64)).save(pictures / "odd.png")  # crops 3 px left, 4 right
    entries = {path.stem: {"caption": f"{path.stem}, one, two, three, four"} for path in pictures.glob("*.png")}
    for key in ("odd", "square0", "square1", "wide0", "wide1"):
        entries[key] |= {"description": f"A picture of <{key}>, 一张图."}
    entries["square2"] = {"original_size": [640, 479]}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    (tmp_path / "drawn.py").write_text(PLUGINS.replace("FOLDER", repr(str(tmp_path))))
    return {
        "metadata_files": [str(tmp_path / "meta.json")],
        "num_repeats_getter": f"{tmp_path}/drawn.py:repeats",
        "caption_processor": f"{tmp_path}/drawn.py:shuffled",
        "description_processor": f"{tmp_path}/drawn.py:worded",
        "plugins": [f"{tmp_path}/drawn.py:Probe"],
        "timestep_sampler_type": "logit_normal",
        "min_timestep": 10,
        "batch_size": 3,
        "gradient_accumulation_steps": 2,
        "cache_latents": False,
        "save_model": False,
        "seed": 7,
    }


def cards(folder: Path) -> list[dict[str, str]]:
    """The figures and the caption of every card, in training order."""
    found = []
    for page in folder.glob("bucket-*.html"):
        for card in re.findall(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.DOTALL):
            figures = {name: unescape(value) for name, value in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", card)}
            caption = re.search(r'<p class="caption">(.*?)</p>', card, re.DOTALL)
            assert caption is not None
            pictures = dict(zip(("trained", "whole"), re.findall(r'src="(.*?)"', card), strict=False))
            found.append({**figures, "caption": unescape(caption[1]), **pictures})
    return sorted(found, key=lambda card: int(card["number"]))


def as_seen(card: dict[str, str]) -> list[object]:
    """A card in the form in which the probe writes down a sample."""
    sizes = [[int(side) for side in reversed(card[name].split("x"))] for name in ("original", "bucket")]
    crop = [int(side) for side in card["crop"].split(",")]
    return [int(card["step"]), card["key"], card["flip"] == "yes", card["caption"], crop, *sizes, int(card["timestep"])]


def test_the_preview_of_an_epoch_is_what_its_training_draws(cli, config, data, tmp_path: Path) -> None:
    file = config("drawn.toml", "[timestep_sampler_kwargs]\nmu = 0.5\n", **data)
    shown = cli("preview", file, "--epoch", 2, "--num", 1000, "--out", tmp_path / "sheet")
    assert shown.code == 0, shown.err
    assert not (tmp_path / "out").exists()
    trained = cli(file)
    assert trained.code == 0, trained.err

    seen = json.loads((tmp_path / "seen.json").read_text())
    previewed = cards(tmp_path / "sheet")
    first = next(i for i, sample in enumerate(seen) if sample[0] == 2)
    assert [as_seen(card) for card in previewed] == [sample[1:] for sample in seen[first:]]
    assert len({card["text"] for card in previewed}) == 3 and len({card["flip"] for card in previewed}) == 2
    assert sorted({card["crop"].split(",")[1] for card in previewed if card["key"] == "odd"}) == ["3", "4"]
    assert sorted(card["occurrence"] for card in previewed if card["key"] == "odd") == ["0", "1", "2", "3"]
    for card in previewed:
        is_description = card["caption"].startswith("A picture of")
        assert card["text"] == ("description" if is_description else "none" if card["key"] == "square2" else "caption")

    with np.load(tmp_path / "pixels.npz") as pixels:
        for number, card in enumerate(previewed, first + 1):
            with Image.open(tmp_path / "sheet" / card["trained"]) as picture:
                assert np.abs(np.asarray(picture).astype(int) - pixels[str(number)]).mean() < 4, card  # JPEG


def test_crops_and_buckets_of_caches_made_elsewhere_are_shown_as_they_are_trained(cli, config, data, pictures: Path, tmp_path: Path) -> None:
    latents = {name: np.zeros((4, 4, 12), np.float32) for name in ("latents", "latents_flipped")}
    np.savez(pictures / "wide0.npz", **latents, original_size=np.array([128, 48]), crop_ltrb=np.array([1, 3, 90, 30]))
    latents = {name: np.zeros((4, 5, 7), np.float32) for name in ("latents", "latents_flipped")}
    np.savez(pictures / "alone.npz", **latents, original_size=np.array([560, 401]), crop_ltrb=np.array([2, 0, 52, 40]))
    entries = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**entries, "alone": {"caption": "alone, without a picture"}}))
    file = config(**(data | {"cache_latents": True, "cache_latents_to_disk": False}))
    shown = cli("preview", file, "--num", 1000, "--out", tmp_path / "sheet")
    trained = cli(file, "--set", "num_train_epochs=1")
    assert shown.code == trained.code == 0, shown.err + trained.err
    previewed = cards(tmp_path / "sheet")
    assert [as_seen(card) for card in previewed] == [sample[1:] for sample in json.loads((tmp_path / "seen.json").read_text())]
    of_key = {card["key"]: card for card in previewed}
    assert of_key["wide0"]["crop"] == ("3,6" if of_key["wide0"]["flip"] == "yes" else "3,1")
    assert of_key["alone"]["bucket"] == "56x40" and "trained" not in of_key["alone"] and "trained" in of_key["wide0"]
    assert (tmp_path / "sheet" / "bucket-96x32.html").read_text(encoding="utf-8").count("cache made elsewhere") == 1


def test_the_table_holds_the_same_figures_as_the_cards(cli, config, data, tmp_path: Path) -> None:
    shown = cli("preview", config(**data), "--num", 5, "--out", tmp_path / "sheet")
    head, *lines = shown.out.splitlines()
    names = head.split()
    assert len(lines) == 5 and names[-1] == "caption"
    for line, card in zip(lines, cards(tmp_path / "sheet"), strict=True):
        assert line.split(maxsplit=len(names) - 1) == [card[name] for name in names[:-1]] + [card["caption"]]


def test_the_preview_writes_into_its_folder_only_and_needs_neither_model_nor_output_dir(cli, config, pictures: Path, tmp_path, monkeypatch) -> None:
    file = config(pretrained_model_name_or_path=None, output_dir=None, image_dirs=["."], tokenizer_cache_dir=None)
    monkeypatch.chdir(pictures)
    (pictures / "preview").mkdir()
    (pictures / "preview" / "notes.txt").write_text("mine")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    first = cli("preview", file)
    assert first.code == 0, first.err
    assert len(first.out.splitlines()) == 11 and (pictures / "preview" / "index.html").is_file()
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - set(before)
    assert new and all(path.is_relative_to(pictures / "preview") for path in new)
    assert all((path.stat().st_mtime_ns, path.read_bytes()) == old for path, old in before.items())
    assert cli("preview", file).out == first.out  # the pictures of the pages are no data, though they lie below image_dirs


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epoch", "3"], "num_train_epochs = 2"),
        (["--epoch", "0"], "--epoch"),
        (["--num", "0"], "--num"),
        (["--epoch", "2", "--set", "max_train_steps=3"], "max_train_steps = 3"),
        (["--out", "a-file"], "--out: a-file"),
        (["--set", "batch_sise=2"], "batch_size"),
    ],
)
def test_what_cannot_be_shown_is_an_error_that_names_the_key(cli, config, tmp_path, monkeypatch, arguments, said) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("")
    ended = cli("preview", config(), *arguments)
    assert ended.code == 2 and said in ended.err and not ended.out
    assert not Path("preview").exists()
