"""What the caption processors do, as plain functions: tags of a caption, names as they are compared, words that turn round in a mirror."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import Any

# Category of a tag -> the metadata field that names what belongs to it.
CATEGORY_FIELDS = {"artist": "artist", "character": "characters", "style": "styles", "quality": "quality"}
REST = "rest"


def split_tags(text: str, separator: str = ",") -> list[str]:
    """The tags of a caption, stripped, without empty ones. A separator of more than spaces counts without the spaces around it."""
    return [tag for part in text.split(separator.strip() or separator) if (tag := part.strip())]


def join_tags(tags: Sequence[str], separator: str = ",") -> str:
    """Tags as a caption: between two of them the separator and one space, or the separator alone when it is nothing but space."""
    bare = separator.strip()
    return (f"{bare} " if bare else separator).join(tags)


def counted_name(name: str) -> str:
    """A name as the keys of `counter` are written: stripped, spaces as underscores, escaped brackets plain; letter case stays."""
    return name.strip().replace(" ", "_").replace("\\(", "(").replace("\\)", ")")


def comparable(name: str) -> str:
    """What is equal for names that differ in letter case, in spaces or underscores, or in escaped brackets only."""
    return counted_name(name).casefold()


def shuffle_tags(text: str, random: Random, keep_first: int = 0, separator: str = ",", keep_separator: str | None = None) -> str:
    """Put the tags into a random order, each order equally likely.

    Args:
        keep_first: so many tags at the beginning stay in place.
        keep_separator: what is left of it stays in place too, and so does, at the end, what is right of a second one; it is removed
            itself. None, or a text without it: all tags behind `keep_first` are shuffled.
    """
    parts = text.split(keep_separator) if keep_separator else [text]
    head, tags, *tails = [split_tags(part, separator) for part in (parts if len(parts) > 1 else ["", text])]
    num_kept = max(keep_first, len(head))
    tags = head + tags
    shuffled = tags[num_kept:]
    random.shuffle(shuffled)
    return join_tags(tags[:num_kept] + shuffled + [tag for tail in tails for tag in tail], separator)


def drop_tags(text: str, random: Random, probability: float, keep_first: int = 0, separator: str = ",") -> str:
    """Leave out each tag behind the first `keep_first` with a probability, independently; the others keep their order."""
    tags = split_tags(text, separator)
    kept = [tag for tag in tags[keep_first:] if random.random() >= probability]
    return join_tags(tags[:keep_first] + kept, separator)


def drop_named_tags(text: str, names: Collection[str], separator: str = ",") -> str:
    """Leave out the tags with these names, which are compared by `comparable`."""
    unwanted = {comparable(name) for name in names}
    return join_tags([tag for tag in split_tags(text, separator) if comparable(tag) not in unwanted], separator)


def drop_text(text: str, random: Random, probability: float) -> str:
    """The empty text with a probability, else the text: what classifier-free guidance subtracts has to be trained (arXiv:2207.12598)."""
    return "" if random.random() < probability else text


def add_text(text: str, prefix: str, suffix: str, separator: str) -> str:
    """Prefix, text and suffix, joined as tags are; what is blank is left out."""
    return join_tags([part.strip() for part in (prefix, text, suffix) if part.strip()], separator)


def tag_category(tag: str, metadata: Mapping[str, Any]) -> str:
    """The category of a tag of a picture: "artist", "character", "style", "quality" or "rest".

    A tag belongs where its form says (`artist:x`, `character:x`, `style:x`), else where the picture's metadata names it, else to quality
    if it contains that word.

    Args:
        metadata: the picture's; `artist`, `characters`, `styles` and `quality` are read, each a text with names between commas, or None.
    """
    kind, colon, _ = tag.partition(":")
    kind = comparable(kind)
    if colon and kind in ("artist", "character", "style"):
        return kind
    name = comparable(tag)
    for category, field in CATEGORY_FIELDS.items():
        if name in map(comparable, split_tags(metadata.get(field) or "")):
            return category
    return "quality" if "quality" in name else REST


def order_tags(text: str, metadata: Mapping[str, Any], order: Sequence[str], separator: str = ",") -> str:
    """Sort the tags by category; within one they keep their order.

    Args:
        metadata: as in `tag_category`.
        order: categories. One that is not in it counts as "rest"; without "rest" that comes last.
    """
    place = {category: number for number, category in enumerate(order)}
    rest = place.get(REST, len(order))
    tags = split_tags(text, separator)
    return join_tags(sorted(tags, key=lambda tag: place.get(tag_category(tag, metadata), rest)), separator)


# Only whole words: no letter stands before "left" or "right", and behind it none but those of leftmost, rightwards, left-handed and the
# like. "_" and "-" are no letters. Both sides together (左右) look the same in the mirror and stay.
_SIDES = re.compile(r"(?<![A-Za-z])(?:left|right)(?=(?:most|wards?|hand(?:ed(?:ness)?)?)?(?![A-Za-z]))|左右|右左|[左右]", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "right": "left", "左": "右", "右": "左"}


def swap_left_right(text: str) -> str:
    """Exchange the words left and right (also in compounds such as left-handed, left_hand and leftmost) and 左 and 右, in one pass.

    The case stays: left, Left, LEFT. Words that only contain the letters (bright, leftover) stay, and so does 左右. Whether "right" means
    the side cannot be seen from the word, so "all right" is exchanged too. Twice exchanged is the text itself.
    """

    def other(side: re.Match[str]) -> str:
        word = side[0]
        swapped = _OTHER_SIDE.get(word.lower(), word)
        if word.isupper():
            return swapped.upper()
        return swapped.capitalize() if word[0].isupper() else swapped

    return _SIDES.sub(other, text)
