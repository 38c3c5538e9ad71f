"""Functions written by the documented contract, pasted into a file of the working directory and named `./file.py:function`, just work.

The contract: `f(img_key, img_md, **kwargs)` for num_repeats_getter; `f(img_info, **kwargs)` for caption_processor and description_processor.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PASTED = '''
import json
import random


def num_repeats(img_key, img_md, **kwargs):
    counter = kwargs['counter']
    record('num_repeats', img_key, {'img_md': img_md, 'counter': {name: dict(counts) for name, counts in counter.items()}, 'kwargs': sorted(kwargs)})
    if img_md['quality'] == 'worst':
        return 0
    num_repeats = 1
    artist = img_md['artist']
    if artist:
        artist = artist.replace(' ', '_').replace('\\\\(', '(').replace('\\\\)', ')')
        if kwargs['counter']['artist'][artist] == 1:
            num_repeats *= 2
    if img_md['aesthetic_score'] is not None and img_md['aesthetic_score'] > 6:
        num_repeats += 1
    return num_repeats


def process_caption(img_info, **kwargs):
    record('process_caption', img_info.key, {'img_info': vars_of(img_info), 'kwargs': sorted(kwargs), 'flip_aug': kwargs['flip_aug']})
    tags = img_info.caption.split(', ')
    random.shuffle(tags)
    if img_info.metadata['artist']:
        tags.insert(0, 'by ' + img_info.metadata['artist'])
    if kwargs['flip_aug']:
        tags = [tag.replace('left', 'RIGHT') for tag in tags]
    return ', '.join(tags)


def process_description(img_info, **kwargs):
    record('process_description', img_info.key, {'img_info': vars_of(img_info), 'kwargs': sorted(kwargs), 'flip_aug': kwargs['flip_aug']})
    description = img_info.description
    if kwargs['flip_aug']:
        description = description.replace('left', 'RIGHT')
    return description + ' ' + str(img_info.num_repeats)


def vars_of(img_info):
    names = ['key', 'metadata', 'caption', 'description', 'image_size', 'original_size', 'latent_size', 'bucket_size', 'num_repeats', 'npz_path']
    return {name: getattr(img_info, name) for name in names}


def record(function, key, seen):
    with open('seen.jsonl', 'a') as file:
        file.write(json.dumps([function, key, seen]) + '\\n')


from sdxl_train import hookimpl


class Watch:
    @hookimpl(wrapper=True)
    def compute_loss(self, batch):
        for key, caption, flipped in zip(batch.keys, batch.captions, batch.flipped):
            record('trained', key, [caption, flipped])
        return (yield)
'''
METADATA = {
    "square0": {
        "caption": "1girl, left hand",
        "artist": "rare (artist)",
        "characters": "saber \\(fate\\), alice",
        "styles": "sketch",
        "quality": "best",
        "aesthetic_score": 6.5,
        "perceptual_hash": "ff00",
        "safe_rating": 0.9,
        "safe_level": "g",
        "original_size": [640, 640],
    },
    "square1": {"caption": "1boy, left foot, hat", "artist": "often", "quality": "worst"},
    "wide0": {"caption": "scenery, left", "artist": "often", "description": "A left turn."},
    "wide1": {"description": "A road on the left."},
}
FIELDS = {
    "image_path": str, "caption": str, "description": str, "artist": str, "characters": str, "styles": str, "quality": str,
    "aesthetic_score": float, "perceptual_hash": str, "safe_rating": float, "safe_level": str,
}  # fmt: skip


@pytest.fixture
def seen(config, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[tuple[str, Any]]]:
    """What each function saw in one training with all three, in the order of the calls: (key, what)."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PASTED)
    Path("metadata.json").write_text(json.dumps(METADATA))
    functions = {
        "num_repeats_getter": "./mine.py:num_repeats",
        "caption_processor": "./mine.py:process_caption",
        "description_processor": "./mine.py:process_description",
    }
    ended = cli(config(metadata_files=["metadata.json"], plugins=["./mine.py:Watch"], num_train_epochs=6, **functions))
    assert ended.code == 0, ended.err
    calls = [json.loads(line) for line in Path("seen.jsonl").read_text().splitlines()]
    return lambda function: [(key, what) for name, key, what in calls if name == function]


def test_pasted_functions_get_what_is_documented_and_decide_what_is_trained(seen: Callable[[str], list[tuple[str, Any]]], tmp_path: Path) -> None:
    asked = dict(seen("num_repeats"))
    assert len(seen("num_repeats")) == len(METADATA) and set(asked) == set(METADATA)
    for key, what in asked.items():
        assert {name: what["img_md"][name] for name in METADATA[key]} == METADATA[key]
        assert what["img_md"]["image_path"].endswith(f"{key}.png")
        assert all(value is None or isinstance(value, FIELDS[name]) for name in FIELDS for value in [what["img_md"][name]])
        assert what["kwargs"] == ["counter"]
    counter = asked["wide1"]["counter"]
    assert counter == asked["square0"]["counter"]
    assert counter["artist"] == {"rare_(artist)": 1, "often": 2}
    assert counter["characters"] == {"saber_(fate)": 1, "alice": 1}
    assert counter["styles"] == {"sketch": 1} and counter["quality"] == {"best": 1, "worst": 1}

    trained = Counter(key for key, _ in seen("trained"))
    assert trained == {"square0": 6 * 3, "wide0": 6, "wide1": 6}, "2 + 1 repeats, 1, 1, and 0 for the worst"
    captions, descriptions = seen("process_caption"), seen("process_description")
    assert len(captions) + len(descriptions) == 30
    assert {key for key, _ in captions} == {"square0", "wide0"} and {key for key, _ in descriptions} == {"wide0", "wide1"}
    for key, what in captions + descriptions:
        info = what["img_info"]
        assert what["kwargs"] == ["counter", "flip_aug", "random"]
        assert info["key"] == key and info["caption"] == METADATA[key].get("caption") and info["description"] == METADATA[key].get("description")
        assert info["metadata"] == asked[key]["img_md"] and info["num_repeats"] == trained[key] // 6
        is_square = key == "square0"
        assert info["image_size"] == ([64, 64] if is_square else [128, 48])
        assert info["original_size"] == ([640, 640] if is_square else [128, 48])
        assert info["bucket_size"] == ([64, 64] if is_square else [96, 32]) and info["latent_size"] == ([8, 8] if is_square else [12, 4])
        assert info["npz_path"] is None or info["npz_path"].endswith(".npz")


def test_what_pasted_functions_answer_is_trained_as_it_is(seen: Callable[[str], list[tuple[str, Any]]]) -> None:
    texts = seen("trained")
    for key, (text, is_flipped) in texts:
        side = "RIGHT" if is_flipped else "left"
        if key == "square0":
            assert re.fullmatch(rf"by rare \(artist\), (1girl, {side} hand|{side} hand, 1girl)", text)
        elif key == "wide1":
            assert text == f"A road on the {side}. 1"
        else:
            assert text in {f"A {side} turn. 1", f"by often, scenery, {side}", f"by often, {side}, scenery"}
    assert {is_flipped for _, (_, is_flipped) in texts} == {True, False}
    assert len({text for key, (text, is_flipped) in texts if key == "square0" and not is_flipped}) == 2, "random.shuffle differs by fetch"


def test_a_function_with_the_global_generator_draws_the_same_in_every_run(config, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PASTED)
    runs = []
    for out in ("first", "second"):
        Path("seen.jsonl").unlink(missing_ok=True)
        keys = {"caption_processor": "./mine.py:process_caption", "plugins": ["./mine.py:Watch"], "max_train_steps": 3}
        ended = cli(config(f"{out}.toml", output_dir=str(tmp_path / out), **keys))
        assert ended.code == 0, ended.err
        runs.append(Path("seen.jsonl").read_text())
    assert '"trained"' in runs[0] and runs[0] == runs[1]
