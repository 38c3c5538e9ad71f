"""Every example of the page on captions and repeats gives the result that is shown beside it, and both languages show the same.

An example is a block of TOML, a block of JSON (the metadata file) where the pictures have one, and a block of text with the result:
`cat.txt: ...` is the caption file of the picture `cat`, `epoch 2, flipped: ...` what is trained of it, `folder/tom.png: 3` a repeat count.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sdxl_train.config import Settings, load_settings
from sdxl_train.data.captions import choose_and_process, is_flipped
from sdxl_train.data.image_info import ImageInfo
from sdxl_train.data.metadata import complete, fields_from_tags
from sdxl_train.plugin_discovery import OWN_DISTRIBUTION, Catalogue, distribution_name
from sdxl_train.plugin_keys import PLUGIN_KEYS
from sdxl_train.randomness import sample_place

DOCS = Path(__file__).parents[1] / "docs"
PAGE, CHINESE = DOCS / "captions-and-repeats.md", DOCS / "captions-and-repeats.zh.md"
KEYS = ("num_repeats_getter", "caption_processor", "description_processor")
REST = 'pretrained_model_name_or_path = "base.safetensors"\nimage_dirs = ["."]\noutput_dir = "out"\n'
Example = tuple[str, dict[str, Any] | None, list[str]]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def examples(page: Path) -> list[Example]:
    """(TOML, metadata or None, lines of the result) of each example of a page."""
    found, toml, metadata = [], "", None
    for language, text in blocks(page):
        if language == "toml":
            toml, metadata = text, None
        elif language == "json":
            metadata = json.loads(text)
        elif language == "text":
            found.append((toml, metadata, text.splitlines()))
    return found


def trained_lines(settings: Settings, fields: dict[str, Any], epochs: list[int]) -> list[str]:
    """What is trained of the picture `cat` with these fields in these epochs, as the page writes it."""
    lines = []
    for epoch in epochs:
        metadata = complete(fields, "cat.png")
        size = (1024, 1024)
        info = ImageInfo(
            "cat", metadata, metadata["caption"], metadata["description"], size, size, (128, 128), size, 1, None, metadata["image_path"]
        )
        place = sample_place(settings.config.seed, epoch, "cat", 0)
        flipped = settings.config.flip_aug and is_flipped(place)
        text = choose_and_process(info, settings.plugins.hooks, place, flipped, {})
        lines.append(f"epoch {epoch}{', flipped' if flipped else ''}: {text or '(empty)'}")
    return lines


def repeat_lines(settings: Settings, all_fields: dict[str, Any], paths: list[str]) -> list[str]:
    """The repeats of these pictures, as the page writes them; the counter is counted here, from names without spaces to format."""
    pictures = {path: complete(all_fields.get(Path(path).stem, {}), path) for path in paths}
    fields = {"artist": "artist", "characters": "characters", "styles": "styles", "quality": "quality"}
    counter: dict[str, dict[str, int]] = {
        name: Counter(word.strip() for fields in pictures.values() for word in (fields[field] or "").split(",") if word)
        for name, field in fields.items()
    }
    counter["category"] = Counter(Path(path).parent.name for path in paths)
    count = settings.plugins.hooks.count_repeats
    return [f"{path}: {count(img_key=Path(path).stem, img_md=metadata, counter=counter)}" for path, metadata in pictures.items()]


def result(folder: Path, example: Example) -> list[str]:
    """The lines that an example's result block should have."""
    toml, metadata, shown = example
    (folder / "base.safetensors").touch()
    (folder / "sdxl.toml").write_text(REST + toml, "utf-8")
    paths = [f'pretrained_model_name_or_path="{folder}/base.safetensors"', f'image_dirs=["{folder}"]']
    if metadata:
        (folder / "metadata.json").write_text(json.dumps(metadata), "utf-8")
        paths.append(f'metadata_files=["{folder}/metadata.json"]')
    settings = load_settings(folder / "sdxl.toml", paths)
    if not shown[0].startswith(("cat.txt: ", "epoch ")):
        return repeat_lines(settings, metadata or {}, [line.partition(": ")[0] for line in shown])
    text = shown[0].removeprefix("cat.txt: ") if metadata is None else ""
    epochs = [int(found[1]) for line in shown if (found := re.match(r"epoch (\d+)", line))]
    lines = trained_lines(settings, metadata["cat"] if metadata else fields_from_tags(text), epochs)
    return lines if metadata else [shown[0], *lines]


@pytest.mark.parametrize("example", examples(PAGE), ids=lambda example: example[0].splitlines()[0][:60])
def test_an_example_gives_the_result_that_is_shown(example: Example, tmp_path: Path) -> None:
    assert result(tmp_path, example) == example[2]


def test_there_is_an_example_of_every_built_in() -> None:
    catalogue = Catalogue()
    named = "\n".join(toml for toml, _, _ in examples(PAGE))
    for key in KEYS:
        for point in catalogue.entry_points(PLUGIN_KEYS[key]):
            if distribution_name(point) == OWN_DISTRIBUTION and point.name not in PLUGIN_KEYS[key].default:
                assert re.search(rf"^{key} = .*\"{point.name}\"", named, re.MULTILINE), f'{key} = "{point.name}"'


def test_both_languages_show_the_same_examples() -> None:
    assert blocks(PAGE) == blocks(CHINESE) and len(examples(PAGE)) >= 12
