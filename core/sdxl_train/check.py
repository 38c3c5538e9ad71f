"""`sdxl-train check`: the whole plan of a training and everything that is wrong with it, from files and headers alone.

No weights are loaded, torch is not imported (except to measure memory), and nothing is created or claimed. What only the libraries
know, such as whether an optimizer takes an argument, is found when the training starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxl_train.base_marks import contradicted_marks
from sdxl_train.check_files import SavePlan, equal_files, latent_bytes, planned_saves, space_warnings
from sdxl_train.check_memory import MemoryPlan, planned_memory
from sdxl_train.config import Settings, read_settings
from sdxl_train.config_rules import schedule_warnings
from sdxl_train.console import Console
from sdxl_train.data.cache_writer import unwritable_folders
from sdxl_train.data.caches import check_caches, never_stop
from sdxl_train.data.caching import missing_pictures
from sdxl_train.data.captions import TokenReport, token_report
from sdxl_train.data.encoding import check_pictures
from sdxl_train.data.epoch_plan import num_batches, steps_per_epoch
from sdxl_train.data.indexing import nothing_to_train, warn_of_silent_data
from sdxl_train.data.sharing import SharedCaches
from sdxl_train.dataset import read_dataset
from sdxl_train.errors import CheckpointError, ConfigError, DataError, Problem, SdxlTrainError
from sdxl_train.model.single_file import Checkpoint, open_checkpoint, vae_encoder_digest
from sdxl_train.model.text import check_clip_skip
from sdxl_train.model.tokenizer import PromptTokenizer, load_tokenizers
from sdxl_train.output_dir import resolve_output_dir

if TYPE_CHECKING:
    from sdxl_train.data.index import Index


@dataclass(frozen=True)
class BucketPlan:
    """What is trained in one bucket, and what becomes of its pictures. The last six are over pictures; None where it has only caches.

    Attributes:
        size: (w, h) in px.
        images, samples, batches: data, samples of an epoch, micro-batches of an epoch.
        cut_mean, cut_worst: share of a picture's area that is cut off, 0 ... 1.
        scale_mean, scale_min, scale_max: factor on a picture's sides; above 1 it is enlarged.
        enlarged: how many pictures are.
    """

    size: tuple[int, int]
    images: int
    samples: int
    batches: int
    cut_mean: float | None
    cut_worst: float | None
    scale_mean: float | None
    scale_min: float | None
    scale_max: float | None
    enlarged: int | None


@dataclass(frozen=True)
class CachePlan:
    """
    Attributes:
        usable: data whose cache is used as it is.
        to_encode: pictures without such a cache.
        invalid: path and reason of each cache that is there and will be made again.
        bytes_to_write: about what the caches still to be made need on the disk; 0 where they are kept in memory only.
        were_read: the values of caches that no earlier start has verified were read now, and not their headers alone.
    """

    usable: int
    to_encode: int
    invalid: list[str]
    bytes_to_write: int
    were_read: bool


@dataclass
class Plan:
    """What a training would do. None: it could not be found out, for a reason that `problems` gives.

    Attributes:
        images ... dropped, samples_per_epoch: as in `Summary`.
        missing_keys: the data without a file.
        bad: how many pictures and caches are bad.
        bad_pictures: what is wrong with each bad picture; with bad_images = "error" these are problems too.
        hidden: names left out because they start with a dot.
        run_folders: folders left out because they hold a training run.
        undecoded: pictures that nobody has decoded yet: only a decode finds out whether their pixels are damaged.
        effective_batch: samples of an optimizer step.
        tokens: texts longer than `max_token_length`.
        caches: None also without `cache_latents`.
        memory: None also where nothing is trained.
        duplicates: paths of pictures that are trained and have equal bytes, in groups.
    """

    images: int | None = None
    captioned: int | None = None
    described: int | None = None
    without_text: int | None = None
    missing: int | None = None
    missing_keys: list[str] | None = None
    dropped: int | None = None
    bad: int | None = None
    bad_pictures: list[Problem] | None = None
    hidden: int | None = None
    run_folders: list[str] | None = None
    undecoded: int | None = None
    samples_per_epoch: int | None = None
    buckets: list[BucketPlan] | None = None
    effective_batch: int | None = None
    batches_per_epoch: int | None = None
    steps_per_epoch: int | None = None
    num_train_steps: int | None = None
    tokens: TokenReport | None = None
    caches: CachePlan | None = None
    saves: SavePlan | None = None
    memory: MemoryPlan | None = None
    duplicates: list[list[str]] | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def run_check(file: Path, sets: list[str] | tuple[str, ...], as_json: bool, decode: bool, measure_memory: bool = False) -> int:
    """Print the plan on stdout, as text or as one JSON object.

    Args:
        sets: the `--set KEY=VALUE` arguments.
        decode: decode every picture that the training would decode, and read every cache it would read.
        measure_memory: run a step on the meta device; this loads torch.
    Returns:
        the exit code: 0; 2 where there are problems; 130 after Ctrl-C.
    Raises:
        PluginError: from `count_repeats`.
    """
    from sdxl_train.check_report import as_json_object, as_text

    console = Console()
    try:
        with _leaving_no_traces():
            plan = make_plan(file, sets, decode, console, measure_memory)
    except KeyboardInterrupt:
        return 130
    finally:
        console.end_progress()
    print((as_json_object if as_json else as_text)(plan), end="")
    if plan.problems:
        console.line(f"sdxl-train: {len(plan.problems)} problems; the training would not start")
    return 2 if plan.problems else 0


@contextmanager
def _leaving_no_traces() -> Iterator[None]:
    """What plugins print goes to stderr, and their files get no compiled copies beside them."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.dont_write_bytecode = before


def make_plan(file: Path, sets: list[str] | tuple[str, ...], decode: bool, console: Console, measure_memory: bool = False) -> Plan:
    """See `run_check`. Progress is shown on the console.

    Raises:
        PluginError: from `count_repeats`.
    """
    plan = Plan()
    settings = read_settings(file, sets, ("data", "training"), plan.problems)
    if settings is None:
        return plan
    plan.warnings += settings.warnings
    base = _open_base(settings, plan.problems)
    tokenizer = _open_tokenizer(settings, base, plan.problems)
    index = _read_index(settings, plan)
    to_encode = _look_at_caches(index, settings, base, decode, plan, console)
    _look_at_pictures(index, settings, to_encode, decode, plan, console)
    _count(index, settings, plan)
    plan.duplicates = equal_files(index, plan.warnings)
    try:
        plan.tokens = token_report(index, settings.config.max_token_length, tokenizer.count)
    except DataError as error:
        plan.problems.append(Problem("caption", str(error)))
    _look_at_disk(index, settings, base, to_encode, plan)
    if base is not None:
        try:
            plan.memory = planned_memory(settings, base, index, measure_memory, console)
        except SdxlTrainError as error:
            plan.problems.append(Problem("config", str(error)))
    return plan


def _open_base(settings: Settings, problems: list[Problem]) -> Checkpoint | None:
    """The model that is trained, its headers read; None where it, or its VAE, cannot be used."""
    keys = settings.config
    if {"pretrained_model_name_or_path", "vae"} & {problem.key for problem in problems}:
        return None
    base, key = None, "pretrained_model_name_or_path"
    try:
        base = open_checkpoint(keys.pretrained_model_name_or_path)
        if keys.vae:
            key = "vae"
            base = open_checkpoint(keys.pretrained_model_name_or_path, keys.vae)
    except CheckpointError as error:
        problems.append(Problem("checkpoint", str(error), key=key))
        return None
    problems += contradicted_marks(base, settings)
    try:
        check_clip_skip(keys.clip_skip, base.architecture)
    except ConfigError as error:
        problems.append(Problem("config", str(error), key="clip_skip"))
    return base


def _open_tokenizer(settings: Settings, base: Checkpoint | None, problems: list[Problem]) -> PromptTokenizer:
    """The tokenizer, after a look at what is in `tokenizer_cache_dir` and beside the base."""
    folder = base.path if base is not None and Path(base.path).is_dir() else None
    try:
        return load_tokenizers(settings.config.tokenizer_cache_dir, folder, store=False)
    except CheckpointError as error:
        problems.append(Problem("checkpoint", str(error), key="tokenizer_cache_dir"))
        return PromptTokenizer()


def _read_index(settings: Settings, plan: Plan) -> Index:
    """The data, as a training would index them; bad pictures are kept apart from other problems until it is known what is to become of
    them."""
    strict = replace(settings, config=settings.config.model_copy(update={"bad_images": "error"}))
    found: list[Problem] = []
    index = read_dataset(strict, plan.warnings.append, found).index
    plan.bad_pictures = [problem for problem in found if problem.kind == "image"]
    plan.problems += [problem for problem in found if problem.kind != "image"]
    return index


def _look_at_caches(
    index: Index, settings: Settings, base: Checkpoint | None, decode: bool, plan: Plan, console: Console
) -> list[int] | None:
    """Note which caches can be used. Returns the pictures that must be encoded before training, by row; None without `cache_latents`,
    or where that depends on a VAE that cannot be read."""
    keys = settings.config
    if not keys.cache_latents:
        plan.problems += missing_pictures(index)
        return None
    if base is None:
        return None
    progress = console.watch("checking caches", int((index.num_repeats > 0).sum()))
    check = check_caches(index, keys, vae_encoder_digest(base), plan.problems, never_stop, progress, read_values=decode)
    usable = check.num_unchanged + check.num_checked
    plan.caches = CachePlan(usable, len(check.missing), check.invalid, 0, decode and keys.check_cache_validity)
    return check.missing


def _look_at_pictures(index: Index, settings: Settings, to_encode: list[int] | None, decode: bool, plan: Plan, console: Console) -> None:
    """Find the pictures that the training would be the first to decode, decode them if that is wanted, and leave out the bad ones."""
    wanted = np.flatnonzero((index.num_repeats > 0) & (index.image_paths.lengths > 0)).tolist() if to_encode is None else to_encode
    waiting = [row for row in wanted if not index.is_decoded[row]]
    bad: dict[int, Problem] = {}
    if decode:
        bad = check_pictures(index, waiting, settings.config, never_stop, console.watch("checking pictures", len(waiting)))
    plan.undecoded = 0 if decode else len(waiting)
    assert plan.bad_pictures is not None
    plan.bad_pictures += bad.values()
    index.num_repeats[list(bad)] = 0
    index.is_bad[list(bad)] = True
    warn_of_silent_data(index, plan.warnings.append)
    if settings.config.bad_images == "error":
        plan.problems += plan.bad_pictures
    if not plan.problems and not index.num_repeats.any():
        plan.problems.append(nothing_to_train(settings.config, index))


def _count(index: Index, settings: Settings, plan: Plan) -> None:
    keys, counts = settings.config, index.summary
    for name in ("images", "captioned", "described", "without_text", "missing", "dropped", "bad", "hidden", "samples_per_epoch"):
        setattr(plan, name, getattr(counts, name))
    plan.missing_keys, plan.run_folders = list(index.missing), list(index.run_folders)
    plan.buckets = [_bucket(index, size, keys.batch_size) for size in counts.buckets]
    plan.effective_batch = keys.batch_size * keys.gradient_accumulation_steps
    plan.batches_per_epoch = num_batches(index, keys.batch_size) if counts.images else 0
    plan.steps_per_epoch = steps_per_epoch(plan.batches_per_epoch, keys.gradient_accumulation_steps, 1)
    by_epochs = plan.steps_per_epoch * keys.num_train_epochs
    plan.num_train_steps = min(by_epochs, keys.max_train_steps or by_epochs)
    if plan.num_train_steps:
        plan.warnings += schedule_warnings(settings.values, plan.num_train_steps)


def _bucket(index: Index, size: tuple[int, int], batch_size: int) -> BucketPlan:
    trained = (index.num_repeats > 0) & (index.bucket_sizes == size).all(axis=1)
    samples = int(index.num_repeats[trained].sum(dtype=np.int64))
    counts = (size, int(trained.sum()), samples, -(-samples // batch_size))
    sides = index.image_sizes[trained & (index.image_paths.lengths > 0)].astype(np.float64)  # [N, 2] of (w, h) in px
    if not len(sides):
        return BucketPlan(*counts, None, None, None, None, None, None)
    scales = (np.array(size) / sides).max(axis=1)  # that of the side that needs it most: the picture covers its bucket
    cuts = np.maximum(0, 1 - size[0] * size[1] / (sides.prod(axis=1) * scales**2))
    return BucketPlan(
        *counts,
        cut_mean=float(cuts.mean()),
        cut_worst=float(cuts.max()),
        scale_mean=float(scales.mean()),
        scale_min=float(scales.min()),
        scale_max=float(scales.max()),
        enlarged=int((scales > 1).sum()),
    )


def _look_at_disk(index: Index, settings: Settings, base: Checkpoint | None, to_encode: list[int] | None, plan: Plan) -> None:
    """What will be written, where, and whether it fits."""
    keys, wanted = settings.config, dict[str, int]()
    if plan.caches is not None and to_encode is not None:
        rows = SharedCaches(index, [row for row in to_encode if index.num_repeats[row] > 0], keys.cache_latents_to_disk).to_encode
        if keys.cache_latents_to_disk:
            for row in rows:
                folder = os.path.dirname(index.image_paths[row]) or "."
                wanted[folder] = wanted.get(folder, 0) + latent_bytes(index, row, keys.flip_aug)
            plan.problems += unwritable_folders(wanted)
        plan.caches = replace(plan.caches, to_encode=len(rows), bytes_to_write=sum(wanted.values()))
    if base is None or plan.steps_per_epoch is None or plan.num_train_steps is None:
        return
    try:
        output_dir = resolve_output_dir(keys.output_dir, datetime.now(), claim=False)
        plan.saves = planned_saves(settings, base, output_dir, plan.steps_per_epoch, plan.num_train_steps)
    except ConfigError as error:
        plan.problems.append(Problem("config", str(error), key="output_dir"))
        return
    wanted[plan.saves.disk_of] = wanted.get(plan.saves.disk_of, 0) + plan.saves.bytes + plan.saves.states_bytes
    plan.warnings += space_warnings(wanted)
