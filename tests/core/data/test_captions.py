"""Which text a fetch trains, and the count of texts that are too long."""

from collections import Counter as Tally
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_index import made_index

from sdxl_train.data.captions import choose_and_process, is_flipped, token_report
from sdxl_train.data.image_info import ImageInfo
from sdxl_train.data.index import Index
from sdxl_train.errors import PluginError
from sdxl_train.model.tokenizer import PromptTokenizer
from sdxl_train.plugins import Choice, Plugins
from sdxl_train.randomness import sample_place

PROCESSORS = """
import random as global_random

def mark(img_info, **kwargs):
    return f"<{img_info.caption}|{img_info.description}|{kwargs['flip_aug']}|{kwargs['counter']['artist']}>"

def upper(img_info, **kwargs):
    return img_info.description.upper()

def shuffle(img_info, **kwargs):
    tags = img_info.caption.split(", ")
    kwargs["random"].shuffle(tags)
    return ", ".join(tags)

def tamper(img_info, **kwargs):
    img_info.caption = img_info.description = "changed"
    img_info.metadata["caption"] = "changed"
    return "answer"

def nothing(img_info, **kwargs):
    return None
"""


@pytest.fixture
def processors(tmp_path: Path):
    file = tmp_path / "processors.py"
    file.write_text(PROCESSORS)

    def plugins(caption: tuple[str, ...] = (), description: tuple[str, ...] = ()) -> Plugins:
        chosen = [Choice("caption_processor", f"{file}:{name}") for name in caption]
        return Plugins(chosen + [Choice("description_processor", f"{file}:{name}") for name in description], seed=0)

    return plugins


def info_of(caption: str | None, description: str | None) -> ImageInfo:
    metadata: dict[str, Any] = {"caption": caption, "description": description}
    return ImageInfo("a", metadata, caption, description, (64, 64), (64, 64), (8, 8), (64, 64), 1, None, "a.png")


def text(plugins: Plugins, caption: str | None, description: str | None, place: bytes = b"place", flipped: bool = False) -> str:
    return choose_and_process(info_of(caption, description), plugins.hooks, place, flipped, {"artist": {"x": 2}})


def index_of(texts: dict[str, tuple[str | None, str | None]]) -> Index:
    rows = {key: {"caption": caption, "description": description} for key, (caption, description) in texts.items()}
    sizes = np.full((len(texts), 2), 64)
    return made_index(rows, [f"{key}.png" for key in texts], sizes, sizes)


def test_each_text_is_chosen_at_half_of_the_fetches(processors):
    places = [sample_place(0, epoch, "a", 0) for epoch in range(1, 2001)]
    plugins = processors()
    counts = Tally(text(plugins, "tags", "prose", place) for place in places)
    assert set(counts) == {"tags", "prose"}
    assert abs(counts["tags"] - 1000) < 4 * 22.4  # four standard deviations of Binomial(2000, 1/2)


@pytest.mark.parametrize("absent", [None, "", "  \n"])
def test_an_empty_or_blank_text_counts_as_absent(processors, absent):
    places = [sample_place(0, epoch, "a", 0) for epoch in range(1, 21)]
    plugins = processors()
    assert {text(plugins, "tags", absent, place) for place in places} == {"tags"}
    assert {text(plugins, absent, "prose", place) for place in places} == {"prose"}


def test_each_text_goes_through_its_own_processors_only(processors):
    plugins = processors(caption=("mark",), description=("upper",))
    assert text(plugins, None, "prose") == "PROSE"
    assert text(plugins, "tags", None, flipped=True) == "<tags|None|True|{'x': 2}>"


def test_without_any_text_the_caption_processors_run_on_the_empty_text(processors):
    assert text(processors(caption=("mark",)), None, None) == "<|None|False|{'x': 2}>"
    assert text(processors(description=("upper",)), None, "") == ""
    assert text(processors(), None, None) == ""


def test_a_processor_that_changes_its_view_changes_nothing_of_the_data_set(processors):
    index = index_of({"a": ("tags", None)})
    plugins = processors(caption=("tamper",))
    assert choose_and_process(index.info(0), plugins.hooks, b"place", False, index.counter) == "answer"
    assert (index.info(0).caption, index.info(0).description, index.metadata(0)["caption"]) == ("tags", None, "tags")


def test_draws_of_a_processor_depend_on_the_place_alone(processors):
    plugins, tags = processors(caption=("shuffle",)), ", ".join("abcdefgh")
    first, again = (text(plugins, tags, None, sample_place(0, 1, "a", 0)) for _ in range(2))
    others = {text(plugins, tags, None, sample_place(*place)) for place in ((0, 2, "a", 0), (0, 1, "b", 0), (0, 1, "a", 1), (1, 1, "a", 0))}
    assert first == again
    assert len(others | {first}) == 5


def test_a_processor_that_answers_no_text_is_named_with_key_and_datum(processors):
    with pytest.raises(PluginError, match=r"nothing.*caption_processor.*'a'.*expected a str, got None"):
        text(processors(caption=("nothing",)), "tags", None)


def test_half_of_the_fetches_are_flipped_independent_of_the_choice_of_text(processors):
    places = [sample_place(0, epoch, "a", 0) for epoch in range(1, 2001)]
    plugins = processors()
    counts = Tally((is_flipped(place), text(plugins, "tags", "prose", place)) for place in places)
    assert all(abs(count - 500) < 4 * 19.4 for count in counts.values())  # Binomial(2000, 1/4)
    assert len(counts) == 4


def test_texts_over_the_token_limit_are_counted_and_the_longest_five_named():
    lengths = {f"k{count}": count for count in (74, 75, 76, 80, 150, 151, 225, 300)}
    index = index_of({key: ("cat " * count, None) for key, count in lengths.items()} | {"prose": ("cat", "dog " * 90), "none": (None, "")})
    report = token_report(index, 75, lambda content: len(PROMPT.content_ids(content)))
    assert report.num_over == 7  # all above 75, and the description
    assert report.worst == (("k300", 300), ("k225", 225), ("k151", 151), ("k150", 150), ("prose", 90))
    assert "k300 (300)" in str(report) and "7 pictures" in str(report)


def test_short_texts_are_not_tokenised_for_the_report():
    asked = []
    index = index_of({"short": ("x" * 225, None), "long": ("x" * 226, None)})
    assert token_report(index, 225, lambda content: asked.append(content) or 1).num_over == 0
    assert asked == ["x" * 226]


def test_a_text_whose_characters_take_several_tokens_is_found_too():
    index = index_of({"emoji": ("\U0001f9ff" * 60, None)})
    tokens = len(PROMPT.content_ids("\U0001f9ff" * 60))
    assert tokens > 75  # 60 characters: fewer characters than the limit, more tokens
    assert token_report(index, 75, lambda content: len(PROMPT.content_ids(content))).worst == (("emoji", tokens),)


PROMPT = PromptTokenizer()
