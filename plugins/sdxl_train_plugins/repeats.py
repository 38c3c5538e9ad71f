"""How often a picture is trained per epoch."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

import sdxl_train
from sdxl_train import DataError, hookimpl, option
from sdxl_train_plugins.tags import CATEGORY_FIELDS, counted_name

log = logging.getLogger("sdxl_train.num_repeats_getter")  # a child of the logger whose warnings the run shows

Counter = Mapping[str, Mapping[str, int]]


def balanced_repeats(occurrences: Iterable[int], target: int, max_repeats: int) -> int:
    """The repeats of a picture whose names occur so often in the data set: target / that of its rarest name.

    Rounded (a half upwards), at least 1 and at most `max_repeats`; 1 for a picture without names.
    """
    rarest = min(occurrences, default=target)
    return min(max((2 * target + rarest) // (2 * rarest), 1), max_repeats)


def names_of(img_md: Mapping[str, Any], by: str) -> list[str]:
    """What a picture is counted under in `counter`: the formatted names of its artist, characters or styles, or its quality."""
    text: str = img_md[CATEGORY_FIELDS[by]] or ""
    if by == "quality":
        names = [text.strip()]
    else:
        names = [counted_name(name) for name in (text.split(",") if by in ("character", "style") else [text])]
    return [name for name in names if name]


def folder_number(folder: str) -> int | None:
    """The number in front of a folder name such as `10_name`; None without one."""
    found = re.match(r"([0-9]{1,18})_", folder)
    return int(found[1]) if found else None


class One:
    """Every picture once per epoch."""

    @hookimpl
    def count_repeats(self) -> int:
        return 1


class Balanced:
    """The rarer a picture's artist, character, style or quality, the more often it is trained."""

    class Options(sdxl_train.Options):
        by: Literal["artist", "character", "style", "quality"] = option(
            "artist",
            "whose names are balanced; a picture with several takes the rarest, one without any is trained once",
            zh="按何种名称平衡；一张图有多个名称时取最少见的，没有名称时重复 1 次",
        )
        target: int | None = option(
            None,
            "trainings per epoch that each name should come to; absent: the pictures of the most frequent name",
            zh="每个名称每轮应达到的训练次数；缺省为最常见名称的图片数",
            ge=1,
        )
        max_repeats: int = option(
            10, "most repeats of one picture per epoch; 1 turns it off", zh="单张图每轮重复次数的上限；1 为关闭", ge=1
        )

    def __init__(self, options: Options) -> None:
        self._options = options
        self._counts: Mapping[str, int] | None = None
        self._target = 1

    @hookimpl
    def count_repeats(self, img_md: dict[str, Any], counter: Counter) -> int:
        counts = counter[CATEGORY_FIELDS[self._options.by]]
        if counts is not self._counts:  # the first picture: a look at all names for each one would take too long
            self._counts, self._target = counts, self._options.target or max(counts.values(), default=1)
            if not counts:
                log.warning('num_repeats_getter = "balanced" has no effect: the metadata of no picture names its %s', self._options.by)
        occurrences = [counts[name] for name in names_of(img_md, self._options.by)]
        return balanced_repeats(occurrences, self._target, self._options.max_repeats)


class ByQuality:
    """As often as a table says for the picture's quality."""

    class Options(sdxl_train.Options):
        repeats: dict[str, Annotated[int, Field(ge=0)]] = option(
            ...,
            'trainings per epoch for each quality, as the metadata names it ("best quality" in a .txt file is "best"); 0 leaves it out',
            zh='各质量每轮的重复次数，名称与元数据一致（.txt 中的 "best quality" 为 "best"）；0 表示不参与训练',
        )
        default: int = option(
            1,
            "trainings per epoch for any other quality, and without one; 0 leaves them out",
            zh="其他质量及没有质量时的重复次数；0 表示不参与训练",
            ge=0,
        )

        @field_validator("repeats", mode="before")
        @classmethod
        def _check_repeats(cls, repeats: Any) -> Any:
            for quality, count in repeats.items() if isinstance(repeats, dict) else ():
                if type(count) is not int or count < 0:
                    raise ValueError(f"must hold whole numbers of at least 0, but {quality} is {count!r}")
            return repeats

    def __init__(self, options: Options) -> None:
        self._options = options
        self._counts: Mapping[str, int] | None = None

    @hookimpl
    def count_repeats(self, img_md: dict[str, Any], counter: Counter) -> int:
        if counter["quality"] is not self._counts:
            self._counts = counter["quality"]
            missing = [quality for quality in self._options.repeats if quality not in self._counts]
            if missing:
                found = ", ".join(sorted(self._counts)) or "none"
                log.warning("num_repeats_getter_kwargs.repeats names %s, which no picture has; there are: %s", ", ".join(missing), found)
        return self._options.repeats.get((img_md["quality"] or "").strip(), self._options.default)


class FolderNumber:
    """As often as the picture's folder says: 10 times in `10_name`."""

    class Options(sdxl_train.Options):
        default: int = option(
            1,
            "trainings per epoch in a folder without a number, and of a picture known by its cache only; 0 leaves them out",
            zh="文件夹名没有数字或只有缓存文件时的重复次数；0 表示不参与训练",
            ge=0,
        )
        max_repeats: int = option(
            1000,
            "a folder number above it, a year or date perhaps, is an error",
            zh="文件夹数字的上限；超过时（可能是年份或日期）报错",
            ge=1,
        )

    def __init__(self, options: Options) -> None:
        self._options = options
        self._folders: Mapping[str, int] | None = None

    @hookimpl
    def count_repeats(self, img_md: dict[str, Any], counter: Counter) -> int:
        if counter["category"] is not self._folders:
            self._folders = counter["category"]
            if all(folder_number(folder) is None for folder in self._folders):
                log.warning('num_repeats_getter = "folder" finds no folder named like 10_name; all repeat %d times', self._options.default)
        path: str | None = img_md["image_path"]
        folder = os.path.basename(os.path.dirname(os.path.abspath(path))) if path else ""
        number = folder_number(folder)
        if number is None:
            return self._options.default
        if number > self._options.max_repeats:
            raise DataError(
                f"the folder {folder!r} asks for {number} repeats, more than num_repeats_getter_kwargs.max_repeats = "
                f"{self._options.max_repeats}; rename it or raise max_repeats"
            )
        return number
