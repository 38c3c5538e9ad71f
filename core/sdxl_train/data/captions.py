"""Which text a fetch trains, and how many captions are longer than what is trained."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdxl_train.data.image_info import ImageInfo
from sdxl_train.hookspecs import Counter, HookSpecs
from sdxl_train.randomness import FetchRandom

if TYPE_CHECKING:
    from sdxl_train.data.index import Index

NUM_WORST = 5


def is_flipped(place: bytes) -> bool:
    """Whether a fetch with `flip_aug` is flipped horizontally: half of them are."""
    return FetchRandom(place, "flip").random() < 0.5


def has_text(text: str | None) -> bool:
    """Whether a caption or description says anything; an empty or blank one counts as absent."""
    return bool(text and text.strip())


def choose_and_process(info: ImageInfo, hooks: HookSpecs, place: bytes, flipped: bool, counter: Counter) -> str:
    """The text that one fetch trains: caption or description, after its own processors.

    Where a picture has both, each is taken at half of its fetches. Where it has neither, the caption processors run on ''.

    Args:
        info: a view of the picture that belongs to this fetch; its caption is set to '' where there is no text at all.
        hooks: `Plugins.hooks`; a chain without processors answers the text unchanged.
        place: the sample's place in the run (`sample_place`), from which the choice and the processors draw.
        flipped: this fetch is flipped horizontally.
        counter: as in `count_repeats`.
    Raises:
        PluginError: a processor raised or answered no str.
    """
    takes_description = has_text(info.description)
    if takes_description and has_text(info.caption):
        takes_description = FetchRandom(place, "caption_choice").random() < 0.5
    elif not takes_description and not has_text(info.caption):
        info.caption = ""
    if takes_description:
        random = FetchRandom(place, "process_description")
        return hooks.process_description(img_info=info, counter=counter, flip_aug=flipped, random=random)
    return hooks.process_caption(img_info=info, counter=counter, flip_aug=flipped, random=FetchRandom(place, "process_caption"))


@dataclass(frozen=True)
class TokenReport:
    """Pictures whose caption or description is longer than `max_token_length`, before any processor.

    Attributes:
        num_over: how many pictures; the end of their text is not trained.
        worst: (key, tokens of the longer text) of the five longest, longest first.
    """

    num_over: int
    worst: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        named = ", ".join(f"{key} ({tokens})" for key, tokens in self.worst)
        return f"{self.num_over} pictures with a text over max_token_length; the longest (tokens): {named}" if self.worst else "none"


def token_report(index: Index, max_token_length: int, count_tokens: Callable[[str], int]) -> TokenReport:
    """Which trained pictures have a text that will be cut. Only texts that can be too long are tokenised, and each only once:
    `index.num_tokens` keeps the count.

    Args:
        count_tokens: the content tokens of a text, uncut.
    """
    trained = index.num_repeats > 0
    for row in np.flatnonzero(trained & (index.max_tokens > max_token_length) & (index.num_tokens < 0)).tolist():
        metadata = index.metadata(row)
        index.num_tokens[row] = max(count_tokens(text) for text in (metadata["caption"], metadata["description"]) if has_text(text))
    over = np.flatnonzero(trained & (index.num_tokens > max_token_length)).tolist()
    worst = heapq.nsmallest(NUM_WORST, over, key=lambda row: (-index.num_tokens[row], index.keys[row]))
    return TokenReport(len(over), tuple((index.keys[row], int(index.num_tokens[row])) for row in worst))
