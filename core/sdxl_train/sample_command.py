"""`sdxl-train sample`: renders the benchmark with a model as it is. Nothing is trained, and no data set is read."""

from __future__ import annotations

import itertools
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_train.config import Settings
from sdxl_train.console import Console, showing_log
from sdxl_train.errors import ConfigError
from sdxl_train.output_dir import TIMESTAMP, file_errors, matching_output_dirs, resolve_output_dir
from sdxl_train.processes import refuse_several_processes
from sdxl_train.stopping import StopRequest, ending_with_its_code

if TYPE_CHECKING:
    from sdxl_train.model.single_file import Checkpoint
    from sdxl_train.model.tokenizer import PromptTokenizer
    from sdxl_train.sample_round import SampleRound
    from sdxl_train.sampling import SampleModels


def run_sample(settings: Settings, out: Path | None) -> None:
    """Render every entry of the benchmark, and leave the process with the code that says how it ended: 1 if any picture is missing.

    The path of each picture is printed on stdout once it is written.

    Args:
        out: the folder of the pictures; None: see `evaluation_dir`.
    Raises:
        SdxlTrainError: found before the first picture.
    """
    refuse_several_processes("sampling")
    console = Console()
    with showing_log(console):
        for warning in settings.warnings:
            console.warn(warning)
        with ending_with_its_code() as stop:
            _sample(settings, out, console, stop)


def evaluation_dir(pattern: str, now: datetime) -> Path:
    """Make a new folder `samples/eval_{YYYYmmddHHMMSS}` in a project folder, and return it.

    Args:
        pattern: the key `output_dir`. With placeholders it stands for the run that was started last, whose models one wants to see; where
            there is none yet, for the folder that a training would take. Nothing is claimed or locked.
        now: local time. A name that is taken counts on by seconds until it is free.
    Raises:
        ConfigError: it cannot be made.
    """
    with file_errors(pattern):
        runs = [path for path in matching_output_dirs(pattern) if (path / "logs").is_dir()]
        newest = max(runs, key=lambda path: (path / "logs").stat().st_mtime, default=None)
        samples = (newest or resolve_output_dir(pattern, now, claim=False)) / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        for seconds in itertools.count():
            directory = samples / f"eval_{(now + timedelta(seconds=seconds)).strftime(TIMESTAMP)}"
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            return directory
    raise AssertionError("itertools.count ended")


def _sample(settings: Settings, out: Path | None, console: Console, stop: StopRequest) -> None:
    from sdxl_train.build import open_base
    from sdxl_train.diffusion import NoiseSchedule
    from sdxl_train.model.tokenizer import load_tokenizers
    from sdxl_train.sample_round import render_evaluation_round

    keys, entries = settings.config, settings.samples
    if not entries:
        raise ConfigError(f"sample_benchmark: {keys.sample_benchmark} lists nothing to render")
    base = open_base(settings)
    schedule = NoiseSchedule(keys.prediction_type, keys.zero_terminal_snr)
    settings.plugins.hooks.build_sampler(noise_scheduler=schedule)  # one that cannot do what is asked says so now
    tokenizer = load_tokenizers(keys.tokenizer_cache_dir, base.path if Path(base.path).is_dir() else None)
    directory = evaluation_dir(keys.output_dir, datetime.now()) if out is None else _made(out)
    stop.writes_into = directory
    total, sampler_name = sum(entry.num_pictures for entry in entries), settings.values["sample_sampler"]
    console.line(f"model: {base.path}" + (f", VAE {keys.vae}" if keys.vae else ""))
    console.line(f"samples: {total} pictures of {keys.sample_benchmark} with {sampler_name}, into {directory}")
    try:
        done = render_evaluation_round(
            entries,
            directory,
            _load(settings, base, tokenizer, stop),
            lambda: settings.plugins.hooks.build_sampler(noise_scheduler=schedule),
            sampler_name,
            check_stop=lambda: stop.signum is not None,
            report=_Report(console, total),
        )
        _end(done, total, directory, console, stop)
    finally:
        console.end_progress()
        if out is None and not any(directory.iterdir()):
            directory.rmdir()


def _end(done: SampleRound, total: int, directory: Path, console: Console, stop: StopRequest) -> None:
    console.end_progress()
    console.line(f"sampled {len(done.paths)} of {total} pictures into {directory}")
    stop.check()
    if done.num_failed:
        console.line(f"{done.num_failed} pictures failed; the warnings above say why")
        sys.exit(1)


def _load(settings: Settings, base: Checkpoint, tokenizer: PromptTokenizer, stop: StopRequest) -> SampleModels:
    """The networks as a training has those that it does not train: on its device, in the dtype it computes in, with its attention."""
    from sdxl_train.build import load_vae_in_use, pick_device
    from sdxl_train.model.attention import active_backend, set_attention, set_text_attention
    from sdxl_train.model.memory_format import to_channels_last
    from sdxl_train.model.single_file import load_text_encoders, load_unet
    from sdxl_train.precision import Precision
    from sdxl_train.sampling import SampleModels

    keys = settings.config
    device, dtype = pick_device(keys), Precision.of(keys).compute
    vae = load_vae_in_use(base, keys, device).module
    stop.check()
    unet = load_unet(base, dtype)
    stop.check()
    text_encoders = load_text_encoders(base, dtype)
    stop.check()
    backend = active_backend(settings.values)
    set_attention(unet, vae, backend)
    for encoder in text_encoders:
        set_text_attention(encoder, backend)
    models = SampleModels(
        unet=unet,
        text_encoders=text_encoders,
        vae=vae,
        tokenizer=tokenizer,
        device=device,
        max_token_length=keys.max_token_length,
        clip_skip=keys.clip_skip,
        dtype=dtype,
        no_half_vae=keys.no_half_vae,
    )
    for network in models.networks:
        network.requires_grad_(False).eval().to(device)
    if device.type == "cuda":
        to_channels_last(unet)
    return models


class _Report:
    """Prints the path of each picture on stdout as soon as it is written, and shows on the console how far the round is."""

    def __init__(self, console: Console, total: int) -> None:
        self._progress = console.watch("sampling", total)
        self._total = total
        self._num_printed = 0

    def __call__(self, done: SampleRound) -> None:
        for path in done.paths[self._num_printed :]:
            print(path, flush=True)
        self._num_printed = len(done.paths)
        self._progress(self._num_printed + done.num_failed, self._total)


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out: {str(directory)!r} cannot be made: {error}") from error
    return directory
