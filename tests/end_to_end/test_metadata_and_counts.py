"""What plugin functions are told about the data, by .txt files and by metadata files, and that no number of workers changes it."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bad_files import noise, write_good
from command_runs import run_command, watched_run, write_config
from PIL import Image

SEES = """
import json
from pathlib import Path


def note(function, key, seen):
    with open(Path(__file__).with_name('calls.jsonl'), 'a') as file:
        file.write(json.dumps([function, key, seen]) + '\\n')


def repeats(img_key, img_md, **kwargs):
    note('repeats', img_key, {'img_md': img_md, 'counter': {name: dict(counts) for name, counts in kwargs['counter'].items()}})
    return {'dropped': 0, 'twice': 2}.get(img_key, 1)


def caption(img_info, **kwargs):
    names = ['key', 'metadata', 'caption', 'description', 'image_size', 'original_size', 'latent_size', 'bucket_size', 'num_repeats', 'npz_path', 'image_path']
    seen = {name: getattr(img_info, name) for name in names}
    note('caption', img_info.key, {**seen, 'flip_aug': kwargs['flip_aug'], 'counter': {name: dict(counts) for name, counts in kwargs['counter'].items()}})
    return img_info.caption + f" #{kwargs['random'].random():.6f}" + (' flipped' if kwargs['flip_aug'] else '')
"""
FIELDS = {
    "image_path", "caption", "description", "artist", "characters", "styles", "quality", "aesthetic_score", "perceptual_hash", "safe_rating",
    "safe_level", "original_size",
}  # fmt: skip


def calls(folder: Path, function: str) -> list[tuple[str, dict[str, Any]]]:
    """(key, what it saw) of each call of a function of `SEES`, in order."""
    lines = (folder / "calls.jsonl").read_text().splitlines()
    return [(key, seen) for name, key, seen in map(json.loads, lines) if name == function]


def test_txt_mode_fills_the_metadata_and_the_counter_from_the_tags(tiny_base: Path, tmp_path: Path) -> None:
    texts = {
        "full": "1girl, artist:some one, character:saber \\(fate\\), character:Alice, style:sketch, style:ink wash, best quality, worst quality",
        "twice": "artist:some one, high quality, style:sketch",
        "dropped": "artist:other, character:Alice, quality",
        "bare": "",
    }
    for number, (key, text) in enumerate(texts.items()):
        place = tmp_path / "data" / ("people" if number < 2 else "places")
        place.mkdir(parents=True, exist_ok=True)
        noise(number, (80, 64)).save(place / f"{key}.png")
        if text:
            (place / f"{key}.txt").write_text(f"\n  {text} \n")
    (tmp_path / "sees.py").write_text(SEES)
    functions = {"num_repeats_getter": f"{tmp_path}/sees.py:repeats", "caption_processor": f"{tmp_path}/sees.py:caption"}
    ended, seen = watched_run(tmp_path, tiny_base, [tmp_path / "data"], num_train_epochs=2, **functions)
    assert ended.code == 0, ended.err[-3000:]

    asked = dict(calls(tmp_path, "repeats"))
    assert set(asked) == set(texts) and len(calls(tmp_path, "repeats")) == len(texts), "called once for each, before training"
    for key, what in asked.items():
        assert set(what["img_md"]) >= FIELDS and what["img_md"]["caption"] == (texts[key] or None)
        assert Path(what["img_md"]["image_path"]).name == f"{key}.png"
    full = asked["full"]["img_md"]
    assert (full["artist"], full["characters"], full["styles"], full["quality"]) == (
        "some one",
        "saber \\(fate\\), Alice",
        "sketch, ink wash",
        "worst",
    )
    assert {name for name in FIELDS if full[name] is None} == {
        "description", "aesthetic_score", "perceptual_hash", "safe_rating", "safe_level", "original_size",
    }  # fmt: skip
    counter = asked["bare"]["counter"]
    assert counter["artist"] == {"some_one": 2, "other": 1}
    assert counter["characters"] == counter["character"] == {"saber_(fate)": 1, "Alice": 2}
    assert counter["styles"] == counter["style"] == {"sketch": 2, "ink_wash": 1}
    assert {name: count for name, count in counter["quality"].items() if name} == {"worst": 1, "high": 1}
    assert counter["category"] == {"people": 2, "places": 2}
    assert all(what["counter"] == counter for what in asked.values())

    assert Counter(sample["key"] for sample in seen) == {"full": 2, "twice": 4, "bare": 2}
    processed = calls(tmp_path, "caption")
    assert len(processed) == len(seen)
    for key, what in processed:
        assert what["counter"] == counter and what["metadata"]["artist"] == asked[key]["img_md"]["artist"]
        assert what["image_size"] == what["original_size"] == [80, 64]
        assert what["bucket_size"] == [64, 64] and what["latent_size"] == [8, 8] and what["num_repeats"] == (2 if key == "twice" else 1)
        assert Path(what["npz_path"]).name == f"{key}.npz" and Path(what["image_path"]).name == f"{key}.png"
    assert Counter((key, what["flip_aug"]) for key, what in processed) == Counter((sample["key"], sample["flipped"]) for sample in seen)
    assert all(sample["caption"].endswith(" flipped") == sample["flipped"] for sample in seen)
    assert all(sample["caption"].startswith(texts[sample["key"]] + " #") for sample in seen), "tags stay in the caption"
    assert len({sample["caption"] for sample in seen}) == len(seen), "every fetch has draws of its own"


def test_metadata_files_merge_field_by_field_and_moved_pictures_are_found_by_name(tiny_base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    for place in ("a", "b"):
        (data / place).mkdir(parents=True)
    noise(1).save(data / "a" / "here.png")
    noise(2).save(data / "a" / "moved.png")
    noise(3).save(data / "b" / "moved.jpg")
    noise(4).save(data / "b" / "other_kind.webp")
    noise(5).save(data / "b" / "backslash.png")
    noise(6).save(data / "b" / "not_in_the_metadata.png")
    first = {
        "here": {"caption": "first", "artist": "one", "original_size": [640, 480], "my_own": {"deep": [1, None]}, "aesthetic_score": 5},
        "moved": {"image_path": "D:\\pictures\\moved.png", "caption": "moved"},
        "other_kind": {"image_path": "/gone/other_kind.png", "tags": "from tags"},
        "gone1": {"image_path": "/gone/gone1.png", "caption": "x"},
        "gone2": {"caption": "x"},
    }
    second = [
        {"key": "here", "caption": "second", "description": None, "quality": "best"},
        {"image_path": "data\\b\\backslash.png", "nl_caption": "A picture behind a backslash."},
        {"key": "moved", "artist": "two"},
    ]
    Path("first.json").write_text(json.dumps(first))
    Path("second.jsonl").write_text("\n".join(map(json.dumps, second)) + "\n\n")
    Path("sees.py").write_text(SEES)
    keys = {"metadata_files": ["first.json", "second.jsonl"], "num_repeats_getter": "./sees.py:repeats"}
    ended, seen = watched_run(tmp_path, tiny_base, [data], **keys)
    assert ended.code == 0, ended.err[-3000:]
    captions = {sample["key"]: sample["caption"] for sample in seen}
    assert captions == {"here": "second", "moved": "moved", "other_kind": "from tags", "backslash": "A picture behind a backslash."}
    told = {key: what["img_md"] for key, what in calls(tmp_path, "repeats")}
    assert told["here"]["artist"] == "one" and told["here"]["quality"] == "best" and told["here"]["my_own"] == {"deep": [1, None]}
    assert told["here"]["original_size"] == [640, 480] and told["here"]["aesthetic_score"] == 5
    assert told["moved"]["artist"] == "two" and told["moved"]["image_path"] == str(data / "a" / "moved.png"), (
        "the same extension is preferred"
    )
    assert told["other_kind"]["image_path"] == str(data / "b" / "other_kind.webp") and told["other_kind"]["caption"] == "from tags"
    assert told["backslash"]["image_path"] in ("data/b/backslash.png", str(data / "b" / "backslash.png"))
    assert told["backslash"]["description"] == "A picture behind a backslash."
    (size,) = [sample["original_size"] for sample in seen if sample["key"] == "here"]
    assert size == [480, 640]
    missing = [line for line in ended.err.splitlines() if "gone1" in line]
    assert len(missing) == 1 and "gone2" in missing[0] and re.search(r"\b2\b", missing[0]), "one warning counts the missing"
    assert re.search(r"\b2 missing", ended.err) and "2 pictures missing" in ended.err, "banner and summary count them"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 small pictures of three shapes with captions: more than one piece of work for a thread."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(300):
        Image.new("RGB", ((64, 64), (96, 48), (48, 96))[i % 3], (i % 256, i * 7 % 256, 90)).save(folder / f"p{i:03}.png")
        (folder / f"p{i:03}.txt").write_text(f"artist:a{i % 7}, number {i}")
    (folder / "sees.py").write_text(SEES)
    return folder


def test_the_number_of_dataset_threads_changes_nothing(many: Path, tiny_base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    results = []
    for threads in (1, 4):
        (tmp_path / str(threads)).mkdir()
        (tmp_path / str(threads) / "sees.py").write_text(SEES)
        getter = f"{tmp_path}/{threads}/sees.py:repeats"
        keys = {"max_train_steps": 2, "cache_latents": False, "max_dataset_n_workers": threads, "num_repeats_getter": getter}
        ended, seen = watched_run(tmp_path / str(threads), tiny_base, [many], **keys)
        assert ended.code == 0, ended.err[-3000:]
        records = {
            name: json.loads((tmp_path / str(threads) / "out" / "records" / name).read_text())
            for name in ("num_repeats.json", "counter.json")
        }
        results.append((seen, records, calls(tmp_path / str(threads), "repeats")))
    assert results[0] == results[1]
    assert len(results[0][2]) == 300 and results[0][1]["counter.json"]["artist"]["a0"] == 43


def test_an_error_of_the_repeats_getter_surfaces_with_plugin_and_key(many: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "getter.py").write_text(
        "def half(img_key, img_md, **kwargs):\n    return 0.5 if img_key == 'p123' else 1\n"
        "def broken(img_key, img_md, **kwargs):\n    return {}[img_key]\n"
    )
    for function, said in (("half", "0.5"), ("broken", "KeyError")):
        keys = {"max_dataset_n_workers": 4, "num_repeats_getter": f"{tmp_path}/getter.py:{function}"}
        ended = run_command(write_config(tmp_path / function, tiny_base, [many], **keys))
        assert ended.code == 1, ended.err[-3000:]
        assert said in ended.err and function in ended.err and ("p123" if function == "half" else "p000") in ended.err


@pytest.mark.slow
def test_the_number_of_loader_processes_changes_no_draw(tiny_base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    data = tmp_path / "data"
    write_good(data, 10)
    for i in range(4):
        noise(i, (96, 48)).save(data / f"wide{i}.png")
    tables = "[timestep_sampler_kwargs]\nmu = 0.5\n"
    keys = {"timestep_sampler_type": "logit_normal", "noise_offset": 0.1, "multires_noise_iterations": 2, "ip_noise_gamma": 0.05}
    runs = {}
    (tmp_path / "sees.py").write_text(SEES)
    for workers in (0, 1, 4):
        processor = f"{tmp_path}/sees.py:caption"  # its draws belong to its name
        folder = tmp_path / str(workers)
        ended, runs[workers] = watched_run(
            folder, tiny_base, [data], tables, max_dataloader_n_workers=workers, caption_processor=processor, **keys
        )
        assert ended.code == 0, ended.err[-3000:]
    assert len(runs[0]) == 14 and {sample["flipped"] for sample in runs[0]} == {True, False}
    assert len({sample["caption"] for sample in runs[0]}) == 14
    assert runs[1] == runs[0] and runs[4] == runs[0]
