"""One training from checked settings to the exit code: project folder, signals, banner, loop, summary."""

from __future__ import annotations

import sys
import traceback
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_train.banner import banner, summary
from sdxl_train.config import Settings
from sdxl_train.console import Console, showing_log
from sdxl_train.control import forget_requests
from sdxl_train.hook_watch import watching_hooks
from sdxl_train.output_dir import file_errors, locked_output_dir, prepare_output_dir, resolve_output_dir
from sdxl_train.processes import refuse_several_processes
from sdxl_train.resuming import changes, find_state, refuse_other_shapes, refuse_other_training, set_later_saves_aside
from sdxl_train.stopping import StopRequest, ending_with_its_code

if TYPE_CHECKING:
    from sdxl_train.run import Run


def run_training(settings: Settings) -> None:
    """Train, and leave the process with the code that says how it ended; returns only after a success.

    Raises:
        SdxlTrainError: found before step 1.
    """
    refuse_several_processes("training")
    console = Console()
    with showing_log(console):
        for warning in settings.warnings:
            console.warn(warning)
        with ending_with_its_code() as stop:
            _train(settings, console, stop)


def _train(settings: Settings, console: Console, stop: StopRequest) -> None:
    from sdxl_train.build import build_run
    from sdxl_train.loop import train
    from sdxl_train.run_record import write_run_record

    now, keys = datetime.now(), settings.config
    found = find_state(keys.resume_from, keys.output_dir, console.warn) if keys.resume_from else None
    state, folder = found or (None, None)
    output_dir = folder or resolve_output_dir(keys.output_dir, now)
    with locked_output_dir(output_dir, now):
        console.line(f"output_dir: {output_dir}")
        log_dir = prepare_output_dir(output_dir, fresh=folder is None, now=now, warn=console.line)
        forget_requests(output_dir)
        stop.writes_into = output_dir
        run = build_run(settings, output_dir, log_dir, console, stop)
        if state is not None and not _resume(run, state, now):
            return
        write_run_record(run, settings)
        console.line(banner(run, settings))
        console.start_progress("step", run.num_train_steps, run.step)
        try:
            with watching_hooks(run):
                train(run)
        except Exception as error:
            traceback.print_exc()
            console.line(f"the run failed after step {run.step}: {error}")
            sys.exit(1)
        console.line(summary(run))


def _resume(run: Run, state: Path, now: datetime) -> bool:
    """Put the state into the run; False if the training is at its end already."""
    from sdxl_train.networks import trained_by_name
    from sdxl_train.train_state import SavedState, environment, making_sense_of, must_match, restore

    console, saved = run.parts.console, SavedState(state)
    with making_sense_of(saved):
        refuse_other_training(must_match(run), saved)
        refuse_other_shapes(trained_by_name(run.networks), saved)
        if saved.step >= run.num_train_steps:
            console.line(f"{state} is at step {saved.step} of {run.num_train_steps}: the training is finished; more num_train_epochs go on")
            return False
        for line in changes(run, saved, environment(run)):
            console.line(line)
        restore(run, saved)
    with file_errors(run.output_dir):
        set_later_saves_aside(run.output_dir, run.parts.keys.output_name, run.step, now, console.line)
    run.parts.saves.resumed_from(run, state)
    console.line(f"resuming: {state}, after step {run.step}")
    return True
