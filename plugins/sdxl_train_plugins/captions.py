"""What rewrites the text of a picture whenever it is fetched. Every draw comes from the `random` of the fetch.

A plugin answers one of the two text hooks, so what is useful for captions and descriptions is a class for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import field_validator, model_validator

import sdxl_train
from sdxl_train import ImageInfo, hookimpl, option
from sdxl_train_plugins import tags
from sdxl_train_plugins.tags import split_tags

if TYPE_CHECKING:
    from random import Random

Category = Literal["artist", "character", "style", "quality", "rest"]


class _TagOptions(sdxl_train.Options):
    separator: str = option(
        ",",
        'what stands between two tags; spaces around it do not matter, and tags are joined with one space behind it; "," is usual',
        zh='标签之间的分隔符；其两侧的空格不影响拆分，拼接时其后加一个空格；通常为 ","',
        min_length=1,
    )


class _KeepingOptions(_TagOptions):
    keep_first: int = option(
        0, "number of tags at the beginning that stay as they are; 0 keeps none", zh="开头保持不变的标签个数；0 为不保留", ge=0
    )


class _DropOptions(sdxl_train.Options):
    probability: float = option(
        0.1,
        "share of the fetches that train the empty text instead, from 0 to 1; 0 turns it off",
        zh="改用空文本训练的概率，0 到 1；0 为关闭",
        ge=0,
        le=1,
    )


class ShuffleTags:
    """Puts the tags into a new random order at every fetch."""

    class Options(_KeepingOptions):
        keep_separator: str | None = option(
            None,
            'text such as "|||" left of which all tags stay in place (and right of a second one); it is removed; absent: not used',
            zh='分界文本，例如 "|||"：其左侧（以及第二个分界右侧）的标签保持原位，分界本身会被删除；缺省为不使用',
            min_length=1,
        )

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def process_caption(self, img_info: ImageInfo, random: Random) -> str:
        options = self._options
        return tags.shuffle_tags(img_info.caption or "", random, options.keep_first, options.separator, options.keep_separator)


class DropTags:
    """Leaves out each tag with some probability at every fetch."""

    class Options(_KeepingOptions):
        probability: float = option(
            0.1,
            "probability of each tag to be left out, from 0 to 1; 0 turns it off",
            zh="每个标签被丢弃的概率，0 到 1；0 为关闭",
            ge=0,
            le=1,
        )

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def process_caption(self, img_info: ImageInfo, random: Random) -> str:
        options = self._options
        return tags.drop_tags(img_info.caption or "", random, options.probability, options.keep_first, options.separator)


class DropNamedTags:
    """Leaves out the tags that are listed."""

    class Options(_TagOptions):
        tags: list[str] = option(
            ...,
            "the tags to leave out, whatever their letter case, with spaces or underscores; [] leaves out none",
            zh="要删除的标签，不区分大小写，空格与下划线等同；[] 为不删除",
        )

        @model_validator(mode="after")
        def _check_tags(self) -> DropNamedTags.Options:
            never = [tag for tag in self.tags if len(split_tags(tag, self.separator)) != 1]
            if never:
                raise ValueError(f"no tag can be {never[0]!r}, which is blank or holds the separator {self.separator!r}; list single tags")
            return self

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def process_caption(self, img_info: ImageInfo) -> str:
        return tags.drop_named_tags(img_info.caption or "", self._options.tags, self._options.separator)


class OrderTags:
    """Sorts the tags by what they name: artist, character, style, quality, the rest."""

    class Options(_TagOptions):
        order: list[Category] = option(
            ["artist", "character", "style", "quality", "rest"],
            "categories in their order; what is not listed counts as rest, and rest, when not listed, comes last; [] changes nothing",
            zh="类别的先后顺序；未列出的类别归入 rest，未列出 rest 时它排在最后；[] 为不排序",
        )

        @field_validator("order")
        @classmethod
        def _check_order(cls, order: list[Category]) -> list[Category]:
            if len(set(order)) < len(order):
                raise ValueError("names a category twice")
            return order

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def process_caption(self, img_info: ImageInfo) -> str:
        return tags.order_tags(img_info.caption or "", img_info.metadata, self._options.order, self._options.separator)


class DropCaption:
    """Trains the empty text instead of the caption now and then, so that classifier-free guidance works."""

    class Options(_DropOptions):
        pass

    def __init__(self, options: Options) -> None:
        self._probability = options.probability

    @hookimpl
    def process_caption(self, img_info: ImageInfo, random: Random) -> str:
        return tags.drop_text(img_info.caption or "", random, self._probability)


class DropDescription:
    """Trains the empty text instead of the description now and then, so that classifier-free guidance works."""

    class Options(_DropOptions):
        pass

    def __init__(self, options: Options) -> None:
        self._probability = options.probability

    @hookimpl
    def process_description(self, img_info: ImageInfo, random: Random) -> str:
        return tags.drop_text(img_info.description or "", random, self._probability)


class _AddedOptions(sdxl_train.Options):
    prefix: str = option("", 'text put before; "" adds none', zh='加在前面的文本；"" 为不加')
    suffix: str = option("", 'text put behind; "" adds none', zh='加在后面的文本；"" 为不加')


class AddText:
    """Puts text before and behind the caption, such as a trigger word."""

    class Options(_AddedOptions):
        separator: str = option(
            ",", 'what stands between the parts, followed by one space; "," is usual', zh='各部分之间的分隔符，其后加一个空格；通常为 ","'
        )

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def process_caption(self, img_info: ImageInfo) -> str:
        options = self._options
        return tags.add_text(img_info.caption or "", options.prefix, options.suffix, options.separator)


class AddTextToDescription:
    """Puts text before and behind the description."""

    class Options(_AddedOptions):
        separator: str = option(
            " ",
            'what stands between the parts, followed by one space unless it is one; " " is usual',
            zh='各部分之间的分隔符，非空格时其后加一个空格；通常为 " "',
        )

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def process_description(self, img_info: ImageInfo) -> str:
        options = self._options
        return tags.add_text(img_info.description or "", options.prefix, options.suffix, options.separator)


class SwapLeftRight:
    """Exchanges left and right in the caption of a fetch that is flipped."""

    @hookimpl
    def process_caption(self, img_info: ImageInfo, flip_aug: bool) -> str:
        return tags.swap_left_right(img_info.caption or "") if flip_aug else img_info.caption or ""


class SwapLeftRightInDescription:
    """Exchanges left and right in the description of a fetch that is flipped."""

    @hookimpl
    def process_description(self, img_info: ImageInfo, flip_aug: bool) -> str:
        return tags.swap_left_right(img_info.description or "") if flip_aug else img_info.description or ""
