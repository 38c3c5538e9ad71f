"""What training will draw: the first samples of an epoch in their order, each with everything that is decided at random for it.

The samples come out of the same epoch plan, fetcher and hooks as in training, with the same random streams. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from sdxl_train.config import Settings
from sdxl_train.console import Console
from sdxl_train.data.batches import Batch, Fetcher, assemble
from sdxl_train.data.caches import check_caches, never_stop
from sdxl_train.data.caching import settle_bad_pictures
from sdxl_train.data.captions import choose_and_process
from sdxl_train.data.encoding import check_pictures
from sdxl_train.data.epoch_plan import EpochPlan, epoch_plan, steps_per_epoch
from sdxl_train.dataset import Dataset
from sdxl_train.errors import ConfigError
from sdxl_train.hookspecs import HookSpecs
from sdxl_train.keys import Config
from sdxl_train.model.tokenizer import PromptTokenizer
from sdxl_train.plugins import Plugins
from sdxl_train.preview_pages import PreviewPages, preview_table
from sdxl_train.timesteps import draw_timesteps

if TYPE_CHECKING:
    from sdxl_train.data.image_info import ImageInfo
    from sdxl_train.data.index import Index

TextName = Literal["caption", "description", "none"]


@dataclass(frozen=True)
class PreviewSample:
    """One sample as it will be trained.

    Attributes:
        number: its place among the samples of the epoch, from 1.
        micro_batch: its batch in the epoch, from 1.
        step: the optimizer step of the run that trains it, from 1; in one process.
        datum: its row in the index.
        key: of the datum.
        occurrence: which of the datum's repeats in this epoch, from 0.
        bucket: (w, h) in px.
        original_size: (w, h) in px before any resizing, as the model is told.
        crop: (top, left) in px of what is cut off, in the resized and then flipped picture, as the model is told.
        flipped: whether it is flipped horizontally.
        timestep: of the noise schedule.
        text: which of the datum's texts was chosen; "none" where it has neither.
        caption: what is trained, after all processors.
        num_tokens: content tokens of the caption, also those that are cut.
        is_cut: whether the caption is longer than `max_token_length`.
    """

    number: int
    micro_batch: int
    step: int
    datum: int
    key: str
    occurrence: int
    bucket: tuple[int, int]
    original_size: tuple[int, int]
    crop: tuple[int, int]
    flipped: bool
    timestep: int
    text: TextName
    caption: str
    num_tokens: int
    is_cut: bool


def run_preview(settings: Settings, epoch: int, num: int, out: Path) -> None:
    """Write the pages of the first `num` samples of an epoch (counted from 1) to `out`, and print them as a table.

    Raises:
        ConfigError: there is no such epoch, or `out` cannot be written.
        DataError, PluginError: as training would raise them.
    """
    keys = settings.config
    _refuse_absent_epoch(keys, epoch, num)
    console = Console()
    for warning in settings.warnings:
        console.warn(warning)
    index = _read_data(settings, console)
    samples = list(preview_samples(index, settings.plugins, keys, epoch, num))
    pages = PreviewPages(out, index, keys.max_image_pixels)
    console.start_progress("drawing pictures", len(samples))
    try:
        for num_done, sample in enumerate(samples, 1):
            pages.draw(sample)
            console.progress(num_done)
    finally:
        console.end_progress()
    pages.write(samples, f"Epoch {epoch}: {len(samples)} of {index.summary.samples_per_epoch} samples in training order, seed {keys.seed}")
    print(preview_table(samples), end="")
    console.line(f"pages: {pages.index_page}")


def preview_samples(index: Index, plugins: Plugins, keys: Config, epoch: int, num: int) -> Iterator[PreviewSample]:
    """The first `num` samples of an epoch in training order, or all where it has fewer.

    `sample_timesteps` is asked as in training, except that the batch has no latents, since none are encoded. No event is told.

    Raises:
        ConfigError: `max_train_steps` ends the training before this epoch.
        DataError, PluginError: as training would raise them.
    """
    plan = epoch_plan(index, keys.seed, epoch, keys.batch_size)
    steps_before = (epoch - 1) * steps_per_epoch(len(plan), keys.gradient_accumulation_steps, 1)
    return _samples(index, plugins, keys, _trained_part(plan, steps_before, keys), steps_before, num)


def _samples(index: Index, plugins: Plugins, keys: Config, plan: EpochPlan, steps_before: int, num: int) -> Iterator[PreviewSample]:
    tokenizer = PromptTokenizer()
    fetcher = Fetcher(index, plugins, tokenizer, keys, keys.seed, with_pixels=False)
    number = 0
    for i, entry in enumerate(plan):
        batch = assemble(fetcher(entry), index, None)
        timesteps = draw_timesteps(batch, plugins.hooks, keys).tolist()
        for row, (datum, occurrence) in enumerate(entry.data):
            number += 1
            num_tokens = len(tokenizer.content_ids(batch.captions[row]))
            height, width = batch.original_sizes[row]
            yield PreviewSample(
                number=number,
                micro_batch=i + 1,
                step=steps_before + i // keys.gradient_accumulation_steps + 1,
                datum=datum,
                key=batch.keys[row],
                occurrence=occurrence,
                bucket=entry.bucket,
                original_size=(width, height),
                crop=batch.crops[row],
                flipped=batch.flipped[row],
                timestep=timesteps[row],
                text=_chosen_text(index, batch, row),
                caption=batch.captions[row],
                num_tokens=num_tokens,
                is_cut=num_tokens > keys.max_token_length,
            )
            if number == num:
                return


def _refuse_absent_epoch(keys: Config, epoch: int, num: int) -> None:
    if epoch < 1:
        raise ConfigError(f"--epoch {epoch}: epochs are counted from 1")
    if epoch > keys.num_train_epochs:
        raise ConfigError(f"--epoch {epoch} is never trained, since num_train_epochs = {keys.num_train_epochs}")
    if num < 1:
        raise ConfigError(f"--num {num}: at least one sample must be shown")


def _read_data(settings: Settings, console: Console) -> Index:
    """The index as training has it when it plans an epoch. Pictures are decoded only to leave out bad ones, which changes the order."""
    keys, leaves_out = settings.config, settings.config.bad_images == "skip"
    index = Dataset(settings, None, console, never_stop).index
    encoded = np.flatnonzero(index.num_repeats).tolist()

    try:
        if keys.cache_latents:  # a cache has a bucket and a crop of its own
            progress = console.watch("checking caches", len(encoded))
            encoded = check_caches(index, keys, None, [], never_stop, progress, read_values=leaves_out).missing
        if leaves_out:
            encoded = [row for row in encoded if index.image_path(row) and not index.is_decoded[row]]
            bad = check_pictures(index, encoded, keys, never_stop, console.watch("checking pictures", len(encoded)))
            settle_bad_pictures(index, keys, bad, console.warn, [])
    finally:
        console.end_progress()
    return index


def _trained_part(plan: EpochPlan, steps_before: int, keys: Config) -> EpochPlan:
    """The batches of an epoch that are trained before `max_train_steps` ends the run."""
    if keys.max_train_steps is None:
        return plan
    if steps_before >= keys.max_train_steps:
        raise ConfigError(
            f"--epoch {plan.epoch} is never trained, since max_train_steps = {keys.max_train_steps} and {steps_before} steps come before"
        )
    return plan[: (keys.max_train_steps - steps_before) * keys.gradient_accumulation_steps]


class _TextNames:
    """Caption hooks that answer with the name of the text they are asked about."""

    def process_caption(self, img_info: ImageInfo, **_: Any) -> str:
        return "caption" if img_info.caption else "none"

    def process_description(self, **_: Any) -> str:
        return "description"


def _chosen_text(index: Index, batch: Batch, row: int) -> TextName:
    info = index.info(batch.data[row])
    name = choose_and_process(info, cast(HookSpecs, _TextNames()), batch.places[row], batch.flipped[row], index.counter)
    return cast(TextName, name)
