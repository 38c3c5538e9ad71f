"""The built-in caption and description processors."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from sdxl_train import ConfigError
from sdxl_train.config import load_settings
from sdxl_train.data.image_info import ImageInfo
from sdxl_train.data.metadata import complete
from sdxl_train.plugins import Choice, Plugins
from sdxl_train.randomness import FetchRandom, sample_place
from sdxl_train.testing import check_plugin
from sdxl_train_plugins.tags import (
    add_text,
    drop_named_tags,
    drop_tags,
    drop_text,
    join_tags,
    order_tags,
    shuffle_tags,
    split_tags,
    swap_left_right,
    tag_category,
)

FETCHES = 6000


def fetches(num: int = FETCHES) -> Iterator[Random]:
    """The generators of so many fetches, as a run makes them."""
    return (FetchRandom(sample_place(5, 1, f"key{i}", 0), "process_caption") for i in range(num))


def almost(count: int, share: float) -> bool:
    """Whether so many of `FETCHES` are within four standard deviations of a share."""
    return abs(count - FETCHES * share) <= 4 * (FETCHES * share * (1 - share)) ** 0.5


# ---- Tags -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "separator", "tags", "joined"),
    [
        ("1girl,solo ,  red hair", ",", ["1girl", "solo", "red hair"], "1girl, solo, red hair"),
        ("a,, b,", ", ", ["a", "b"], "a, b"),
        ("a b  c", " ", ["a", "b", "c"], "a b c"),
        ("a; b", ";", ["a", "b"], "a; b"),
        ("", ",", [], ""),
    ],
)
def test_tags_are_split_and_joined_by_the_separator_and_one_space(text: str, separator: str, tags: list[str], joined: str) -> None:
    assert split_tags(text, separator) == tags and join_tags(tags, separator) == joined


# ---- shuffle_tags -----------------------------------------------------------------------------------------------------------------


def test_every_order_of_the_tags_is_equally_likely() -> None:
    orders = Counter(shuffle_tags("a, b, c", random) for random in fetches())
    assert len(orders) == 6 and all(almost(count, 1 / 6) for count in orders.values())


def test_the_first_tags_stay_in_place() -> None:
    orders = {shuffle_tags("a, b, c, d", random, keep_first=2) for random in fetches(40)}
    assert orders == {"a, b, c, d", "a, b, d, c"}


def test_keeping_more_tags_than_there_are_changes_nothing() -> None:
    assert {shuffle_tags("a, b", random, keep_first=9) for random in fetches(20)} == {"a, b"}


def test_tags_left_of_the_keep_separator_stay_and_it_is_removed() -> None:
    orders = {shuffle_tags("a, b ||| c, d", random, keep_separator="|||") for random in fetches(40)}
    assert orders == {"a, b, c, d", "a, b, d, c"}


def test_tags_right_of_a_second_keep_separator_stay_at_the_end() -> None:
    orders = {shuffle_tags("a ||| b, c ||| d, e", random, keep_separator="|||") for random in fetches(40)}
    assert orders == {"a, b, c, d, e", "a, c, b, d, e"}


def test_the_larger_of_keep_first_and_the_keep_separator_holds() -> None:
    assert {shuffle_tags("a ||| b, c", random, 2, keep_separator="|||") for random in fetches(20)} == {"a, b, c"}
    assert {shuffle_tags("a, b ||| c", random, 1, keep_separator="|||") for random in fetches(20)} == {"a, b, c"}


def test_without_the_keep_separator_in_the_text_keep_first_alone_counts() -> None:
    assert {shuffle_tags("a, b, c", random, 1, keep_separator="|||") for random in fetches(40)} == {"a, b, c", "a, c, b"}


# ---- drop_tags, drop_caption, drop_named_tags, add_text ----------------------------------------------------------------------------


def test_each_tag_is_dropped_with_the_probability_and_by_itself() -> None:
    kept = [set(split_tags(drop_tags("a, b, c", random, 0.3))) for random in fetches()]
    assert all(almost(sum(tag not in tags for tags in kept), 0.3) for tag in "abc")
    assert almost(sum(not {"a", "b"} & tags for tags in kept), 0.3 * 0.3)  # one draw for all tags would give 0.3


def test_kept_tags_keep_their_order_and_the_first_ones_are_never_dropped() -> None:
    assert {drop_tags("d, c, b, a", random, 0.5, keep_first=2) for random in fetches(60)} == {"d, c", "d, c, b", "d, c, a", "d, c, b, a"}


@pytest.mark.parametrize(("probability", "expected"), [(0.0, "a, b"), (1.0, "")])
def test_probabilities_of_0_and_1_are_exact(probability: float, expected: str) -> None:
    assert {drop_tags("a, b", random, probability) for random in fetches(50)} == {expected}
    assert {drop_text("a, b", random, probability) for random in fetches(50)} == {expected}


def test_a_caption_is_dropped_as_a_whole_with_the_probability() -> None:
    texts = Counter(drop_text("a, b", random, 0.1) for random in fetches())
    assert set(texts) == {"a, b", ""} and almost(texts[""], 0.1)


def test_named_tags_are_dropped_whatever_their_case_underscores_and_escaped_brackets() -> None:
    text = "Red_Hair, red hair, saber (fate), saber \\(fate\\), white hat, hat"
    assert drop_named_tags(text, ["red hair", "SABER_(FATE)", "hat"]) == "white hat"


@pytest.mark.parametrize(
    ("text", "prefix", "suffix", "separator", "expected"),
    [
        ("a, b", "mystyle", "best quality", ",", "mystyle, a, b, best quality"),
        ("", "mystyle", "", ",", "mystyle"),
        ("a", "", "", ",", "a"),
        ("A cat.", "A drawing by X.", "", " ", "A drawing by X. A cat."),
        ("cat", "black ", "s", "", "blackcats"),
    ],
)
def test_added_text_is_joined_like_tags(text: str, prefix: str, suffix: str, separator: str, expected: str) -> None:
    assert add_text(text, prefix, suffix, separator) == expected


# ---- order_tags -------------------------------------------------------------------------------------------------------------------

METADATA = {"artist": "some artist", "characters": "saber (fate), Alice", "styles": "sketch", "quality": "best"}


@pytest.mark.parametrize(
    ("tag", "category"),
    [
        ("artist:anyone", "artist"),
        ("character:anyone", "character"),
        ("style:any", "style"),
        ("Some_Artist", "artist"),
        ("saber \\(fate\\)", "character"),
        ("alice", "character"),
        ("sketch", "style"),
        ("best", "quality"),
        ("worst quality", "quality"),
        ("1girl", "rest"),
        ("time:day", "rest"),
    ],
)
def test_the_category_of_a_tag_comes_from_its_form_or_from_the_metadata(tag: str, category: str) -> None:
    assert tag_category(tag, METADATA) == category


def test_without_metadata_only_the_forms_tell_the_category() -> None:
    nothing = dict.fromkeys(METADATA)
    assert [tag_category(tag, nothing) for tag in ("sketch", "style:sketch")] == ["rest", "style"]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (["artist", "character", "style", "quality", "rest"], "artist:x, some artist, alice, sketch, best quality, 1girl, hat"),
        (["rest", "quality"], "1girl, alice, sketch, artist:x, hat, some artist, best quality"),
        (["quality", "artist"], "best quality, artist:x, some artist, 1girl, alice, sketch, hat"),
        ([], "1girl, alice, best quality, sketch, artist:x, hat, some artist"),
    ],
)
def test_tags_are_sorted_by_category_and_keep_their_order_within(order: list[str], expected: str) -> None:
    assert order_tags("1girl, alice, best quality, sketch, artist:x, hat, some artist", METADATA, order) == expected


# ---- swap_left_right --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("the left hand and the right foot", "the right hand and the left foot"),
        ("Left, RIGHT, left's", "Right, LEFT, right's"),
        ("left-handed, holding_left, left_right", "right-handed, holding_right, right_left"),
        ("leftmost, rightwards, lefthanded", "rightmost, leftwards, righthanded"),
        ("bright, leftover, copyright, upright, righteous, cleft", "bright, leftover, copyright, upright, righteous, cleft"),
        ("左手拿花，右边是树", "右手拿花，左边是树"),
        ("二十岁左右，右手", "二十岁左右，左手"),
        ("on the left手", "on the right手"),
        ("", ""),
    ],
)
def test_left_and_right_are_exchanged_as_whole_words_in_one_pass(text: str, swapped: str) -> None:
    assert swap_left_right(text) == swapped
    assert swap_left_right(swapped) == text


# ---- As plugins -------------------------------------------------------------------------------------------------------------------

CAPTION_PLUGINS = {
    "shuffle_tags": {"keep_first": 1, "keep_separator": "|||"},
    "drop_tags": {"probability": 0.5},
    "drop_named_tags": {"tags": ["sketch"]},
    "order_tags": {},
    "add_text": {"prefix": "x"},
    "swap_left_right": {},
    "drop_caption": {"probability": 0.5},
}


@pytest.mark.parametrize("name", CAPTION_PLUGINS)
def test_caption_processors_keep_the_rules(name: str) -> None:
    check_plugin("caption_processor", name, **CAPTION_PLUGINS[name])


@pytest.mark.parametrize(("name", "options"), [("add_text", {"suffix": "x"}), ("swap_left_right", {}), ("drop_caption", {"probability": 0.5})])
def test_description_processors_keep_the_rules(name: str, options: dict) -> None:
    check_plugin("description_processor", name, **options)


def rewritten(choices: list[Choice], metadata: dict[str, str], epoch: int = 1, flip_aug: bool = False, hook: str = "process_caption") -> str:
    """What the hooks of these plugins make of a picture at its fetch in an epoch."""
    full = complete(metadata, "cat.png")
    info = ImageInfo("cat", full, full["caption"], full["description"], (64, 64), (64, 64), (8, 8), (64, 64), 1, None, "cat.png")
    random = FetchRandom(sample_place(7, epoch, "cat", 0), hook)
    return getattr(Plugins(choices, 7).hooks, hook)(img_info=info, counter={}, flip_aug=flip_aug, random=random)


def test_a_fetch_is_repeatable_and_the_next_epoch_draws_anew() -> None:
    shuffle = [Choice("caption_processor", "shuffle_tags")]
    texts = [rewritten(shuffle, {"caption": "a, b, c, d, e, f"}, epoch) for epoch in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_processor_draws_the_same_whatever_stands_before_it_in_the_list() -> None:
    drop, shuffle = Choice("caption_processor", "drop_caption", {"probability": 0.0}), Choice("caption_processor", "shuffle_tags")
    assert rewritten([drop, shuffle], {"caption": "a, b, c, d, e"}) == rewritten([shuffle], {"caption": "a, b, c, d, e"})


def test_swapping_acts_on_flipped_fetches_only() -> None:
    for key, hook, field in (("caption_processor", "process_caption", "caption"), ("description_processor", "process_description", "description")):
        swap = [Choice(key, "swap_left_right")]
        assert rewritten(swap, {field: "Left hand"}, flip_aug=True, hook=hook) == "Right hand"
        assert rewritten(swap, {field: "Left hand"}, flip_aug=False, hook=hook) == "Left hand"


def test_one_name_under_both_keys_has_two_instances_with_their_own_options() -> None:
    both = [Choice("caption_processor", "add_text", {"prefix": "tag"}), Choice("description_processor", "add_text", {"prefix": "A word."})]
    texts = {"caption": "a", "description": "A cat."}
    assert rewritten(both, texts) == "tag, a"
    assert rewritten(both, texts, hook="process_description") == "A word. A cat."


def test_tags_are_ordered_by_the_metadata_of_the_picture() -> None:
    metadata = {"caption": "1girl, alice, wlop", "artist": "WLOP", "characters": "Alice"}
    text = rewritten([Choice("caption_processor", "order_tags")], metadata)
    assert text == "wlop, alice, 1girl"


# ---- In a configuration -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def problems(tmp_path: Path) -> Callable[[str], str]:
    """What is said about a configuration with a mistake."""
    (tmp_path / "base.safetensors").touch()

    def checking(text: str) -> str:
        paths = f'pretrained_model_name_or_path = "{tmp_path}/base.safetensors"\nimage_dirs = ["{tmp_path}"]\noutput_dir = "out"\n'
        (tmp_path / "sdxl.toml").write_text(paths + text)
        with pytest.raises(ConfigError) as caught:
            load_settings(tmp_path / "sdxl.toml")
        return str(caught.value)

    return checking


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        ("shuffle_tags", "keep_first = -1", "keep_first must be greater than or equal to 0"),
        ("shuffle_tags", 'keep_separator = ""', "keep_separator"),
        ("drop_tags", "probability = 1.5", "probability must be less than or equal to 1"),
        ("drop_caption", "probability = -0.1", "probability must be greater than or equal to 0"),
        ("drop_named_tags", 'tags = ["a, b"]', "no tag can be 'a, b'"),
        ("order_tags", 'order = ["artist", "artist"]', "names a category twice"),
        ("add_text", 'prefx = "x"', 'did you mean "prefix"'),
        ("swap_left_right", "x = 1", 'unknown key "x"'),
    ],
)
def test_a_wrong_option_is_reported_with_its_line(problems: Callable[[str], str], name: str, option: str, said: str) -> None:
    report = problems(f'caption_processor = "{name}"\n[caption_processor_kwargs]\n{option}\n')
    assert said in report and re.search(r"sdxl\.toml:[56]: ", report), report


def test_an_unknown_category_is_answered_by_the_known_ones(problems: Callable[[str], str]) -> None:
    report = problems('caption_processor = "order_tags"\n[caption_processor_kwargs]\norder = ["artist", "size"]\n')
    assert "order" in report and "'artist', 'character', 'style', 'quality' or 'rest', got \"size\"" in report


def test_the_tags_to_drop_must_be_given(problems: Callable[[str], str]) -> None:
    assert "caption_processor_kwargs.tags is required" in problems('caption_processor = "drop_named_tags"\n')


WATCH = """
import json
from sdxl_train import hookimpl

class Watch:
    def __init__(self): self.seen = []

    @hookimpl(wrapper=True)
    def compute_loss(self, batch):
        self.seen += zip(batch.keys, batch.captions, batch.flipped)
        return (yield)

    @hookimpl
    def on_train_end(self, run): json.dump(self.seen, open(run.output_dir / "seen.json", "w"))
"""


def test_a_list_of_processors_with_a_table_each_works_in_a_training(config, cli, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "watch.py").write_text(WATCH)
    for file in pictures.glob("*.txt"):
        file.write_text("1girl, left hand, smile, hat, tree")
    tables = """
[caption_processor_kwargs.shuffle_tags]
keep_first = 1
[caption_processor_kwargs.drop_tags]
probability = 0.3
keep_first = 1
[caption_processor_kwargs.add_text]
prefix = "mystyle"
"""
    names = ["swap_left_right", "shuffle_tags", "drop_tags", "add_text"]
    ended = cli(config(tables=tables, caption_processor=names, plugins=[f"{tmp_path}/watch.py:Watch"], num_train_epochs=3))
    assert ended.code == 0, ended.err
    seen = json.loads((tmp_path / "out" / "seen.json").read_text())
    assert len(seen) == 30 and len({caption for _, caption, _ in seen}) > 15
    for _, caption, is_flipped in seen:
        tags = caption.split(", ")
        assert tags[:2] == ["mystyle", "1girl"]
        assert set(tags) <= {"mystyle", "1girl", "right hand" if is_flipped else "left hand", "smile", "hat", "tree"}
    assert {is_flipped for _, _, is_flipped in seen} == {True, False}
    num_kept = sum(len(caption.split(", ")) - 2 for _, caption, _ in seen)
    assert abs(num_kept - 120 * 0.7) <= 4 * (120 * 0.3 * 0.7) ** 0.5
