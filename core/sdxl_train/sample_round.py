"""A round of samples: every entry of the benchmark rendered and written, whatever happens to one of them."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdxl_train.output_dir import TIMESTAMP
from sdxl_train.sample_benchmark import SampleEntry
from sdxl_train.sample_files import (
    evaluation_picture_name,
    latents_picture_name,
    parameters_text,
    round_directory,
    training_picture_name,
    write_png,
)
from sdxl_train.sample_sheets import SHEETS_FOLDER, update_sheets
from sdxl_train.sampling import Picture, SampleModels, render_batch

if TYPE_CHECKING:
    from sdxl_train.model.tokenizer import PromptTokenizer
    from sdxl_train.run import Run

logger = logging.getLogger(__name__)


@dataclass
class SampleRound:
    """What came of a round.

    Attributes:
        paths: the pictures written, in the order of the benchmark; without those of `save_latents`.
        num_failed: pictures that could not be rendered or written; the log says why.
        was_stopped: `check_stop` ended it early.
    """

    paths: list[Path] = field(default_factory=list)
    num_failed: int = 0
    was_stopped: bool = False


def render_round(
    entries: Sequence[SampleEntry],
    directory: Path,
    models: SampleModels,
    build_sampler: Callable[[], Any],
    *,
    name_of: Callable[[int, int], str],
    text_of: Callable[[SampleEntry, int], str],
    check_stop: Callable[[], bool] = lambda: False,
    report: Callable[[SampleRound], None] = lambda _: None,
    rank: int = 0,
    num_ranks: int = 1,
) -> SampleRound:
    """Render entries into a folder. An exception is logged with its traceback and costs the rest of its entry; nothing is raised.

    Args:
        build_sampler: makes a fresh diffusers scheduler for each batch.
        name_of: (entry index i, picture b) -> file name.
        text_of: (entry, seed of the picture) -> the text in the PNG.
        check_stop: asked before each denoising step.
        report: told what has come of the round so far, after each picture and each entry that failed.
        rank, num_ranks: this process renders entries rank, rank + num_ranks, ...
    """
    done = SampleRound()
    for i in range(rank, len(entries), num_ranks):
        entry = with_seed(entries[i])
        finished = 0
        try:
            for first in range(0, entry.num_pictures, entry.batch_size):
                pictures = render_batch(
                    entry,
                    first,
                    models,
                    build_sampler(),
                    on_step=_step_writer(i, entry, directory, text_of) if entry.save_latents else None,
                    check_stop=check_stop,
                )
                if pictures is None:
                    done.was_stopped = True
                    return done
                for picture in pictures:
                    path = directory / name_of(i, picture.b)
                    if _write(picture, path, i, text_of(entry, picture.seed)):
                        done.paths.append(path)
                    else:
                        done.num_failed += 1
                    finished += 1
                    report(done)
        except Exception:  # sampling is a side job: whatever it meets, the training goes on
            missing = entry.num_pictures - finished
            logger.exception("sample entry %d failed; %d of its %d pictures are missing", i, missing, entry.num_pictures)
            done.num_failed += missing
            report(done)
    if models.device.type == "cuda":
        torch.cuda.empty_cache()  # blocks of the pictures' sizes, of no use to the training
    return done


def render_training_round(
    run: Run,
    entries: Sequence[SampleEntry],
    tokenizer: PromptTokenizer,
    build_sampler: Callable[[], Any],
    moment: str,
    now: datetime,
    *,
    check_stop: Callable[[], bool] = lambda: False,
) -> SampleRound:
    """Render the benchmark into `samples/epoch_{E}/` ("epoch") or `samples/step_{S}/` (any other moment); see `render_round`.

    The contact sheets are brought up to date; if they cannot be, the log says so.
    """
    stamp, samples = now.strftime(TIMESTAMP), run.output_dir / "samples"
    done = render_round(
        entries,
        samples / round_directory(moment, run.epoch, run.step),
        SampleModels.of_run(run, tokenizer),
        build_sampler,
        name_of=lambda i, b: training_picture_name(moment, run.epoch, run.step, stamp, i, b),
        text_of=lambda entry, seed: parameters_text(entry, seed, run.config["sample_sampler"], epoch=run.epoch, step=run.step),
        check_stop=check_stop,
    )
    if done.paths:
        try:
            update_sheets(samples, done.paths, entries, run.config["sample_sampler"])
        except Exception:  # as in a round: the training goes on
            logger.exception("the contact sheets in %s could not be made", samples / SHEETS_FOLDER)
    return done


def render_evaluation_round(
    entries: Sequence[SampleEntry],
    directory: Path,
    models: SampleModels,
    build_sampler: Callable[[], Any],
    sampler_name: str,
    *,
    check_stop: Callable[[], bool] = lambda: False,
    report: Callable[[SampleRound], None] = lambda _: None,
) -> SampleRound:
    """Render the benchmark outside of a training into `directory`; see `render_round`."""
    return render_round(
        entries,
        directory,
        models,
        build_sampler,
        name_of=evaluation_picture_name,
        text_of=lambda entry, seed: parameters_text(entry, seed, sampler_name),
        check_stop=check_stop,
        report=report,
    )


def with_seed(entry: SampleEntry) -> SampleEntry:
    """The entry with a seed, drawn from the system's randomness where it has none, so that no generator of the training moves."""
    return entry if entry.seed is not None else dataclasses.replace(entry, seed=secrets.randbelow(2**32))


def _step_writer(
    i: int, entry: SampleEntry, directory: Path, text_of: Callable[[SampleEntry, int], str]
) -> Callable[[int, float, list[Picture]], None]:
    def write(step: int, timestep: float, pictures: list[Picture]) -> None:
        for picture in pictures:
            _write(picture, directory / latents_picture_name(i, picture.b, timestep, step), i, text_of(entry, picture.seed))

    return write


def _write(picture: Picture, path: Path, i: int, parameters: str) -> bool:
    if picture.image is None:
        logger.error("sample entry %d, picture %d (seed %d): %s is not written: %s", i, picture.b, picture.seed, path.name, picture.problem)
        return False
    write_png(path, picture.image, parameters)
    return True
