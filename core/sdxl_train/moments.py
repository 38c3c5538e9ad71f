"""What happens around the steps: logging, then saving, then sampling, each when a trigger has a reason; and how a run ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import cast

from torch import Tensor

from sdxl_train.errors import ConfigError
from sdxl_train.hookspecs import Moment
from sdxl_train.model.saving import NotSavedError, file_markers, file_metadata, save_checkpoint
from sdxl_train.networks import trained_values
from sdxl_train.run import Run
from sdxl_train.sample_round import render_training_round
from sdxl_train.stopping import Interrupted


class EpochLoss:
    """The mean of an epoch's step losses, summed on the device in float64 (float32 where the device has none)."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._num = 0

    def add(self, loss: Tensor | None) -> None:
        """Count a step; a dropped one (None) does not count."""
        if loss is not None:
            loss = loss.double() if loss.device.type != "mps" else loss
            self._sum = loss if self._sum is None else self._sum + loss
            self._num += 1

    def metrics(self) -> dict[str, float]:
        """{"loss/epoch": mean}; empty when every step was dropped. Waits for the device."""
        return {} if self._sum is None else {"loss/epoch": self._sum.item() / self._num}


def before_first_step(run: Run) -> None:
    """A fresh run with an active sample trigger shows what the base model draws, in `samples/step_0/` whichever trigger it is."""
    if run.step == 0 and (_samples_are_wanted(run, "step") or _samples_are_wanted(run, "epoch")):
        _sample(run, "step")


def after_step(run: Run, loss: Tensor | None, rates: dict[str, float]) -> bool:
    """Count and log the step, then ask for saving, sampling and stopping.

    Args:
        loss: the step's loss; None when it was dropped.
        rates: the learning rates the step used, from `current_rates`.
    Returns:
        Whether a plugin wants to stop.
    """
    run.step += 1
    metrics: dict[str, float | Tensor] = dict(rates)
    if loss is not None:
        average, ema = run.parts.recorder.record(loss)
        metrics |= {"loss/step": loss, "loss_avr/step": average, "loss_ema/step": ema}
    run.parts.hooks.on_step_end(run=run, metrics=metrics)
    run.parts.metrics.push(run.step, run.epoch, metrics)
    _save_if_wanted(run, "step")
    _sample_if_wanted(run, "step")
    reasons = run.parts.hooks.should_stop(run=run)
    if reasons:
        run.stop_reason = "; ".join(reasons)
    return bool(reasons)


def after_epoch(run: Run, losses: EpochLoss) -> bool:
    """Log the epoch, then ask for saving and sampling. Returns whether the training goes on."""
    run.parts.metrics.flush()
    run.parts.hooks.on_epoch_end(run=run, metrics=losses.metrics())
    _save_if_wanted(run, "epoch")
    _sample_if_wanted(run, "epoch")
    return run.stop_reason is None


@contextmanager
def finish(run: Run) -> Iterator[None]:
    """Around all steps: however they end, read what is still to be logged, save when a trigger wants it, and tell the plugins."""
    moment: Moment = "train_end"
    try:
        yield
        run.parts.metrics.flush()
        _save_if_wanted(run, moment, is_last=True)
        _sample_if_wanted(run, moment)
    except Interrupted as stop:
        moment = "keyboard_interrupt"
        run.parts.console.line(f"stopped by {stop} after step {run.step}")
        _save_last_completed(run, moment)
        raise
    except Exception:
        moment = "exception"
        _save_last_completed(run, moment)
        raise
    finally:
        run.parts.console.end_progress()
        run.parts.loader.close()
        run.parts.hooks.on_train_end(run=run, moment=moment)


def _save_last_completed(run: Run, moment: Moment) -> None:
    """After an interrupt or an exception: the weights are those after `run.step` steps, unless the update itself broke off."""
    if run.parts.update.is_under_way:
        run.parts.console.warn(f"nothing is saved: the exception came from inside the update of step {run.step + 1}")
        return
    run.parts.metrics.flush()
    if run.step > 0:
        _save_if_wanted(run, moment, is_last=True)


def _save_if_wanted(run: Run, moment: Moment, is_last: bool = False) -> None:
    """Ask the save triggers; write each step once. A failed save before the end is tried again at the next trigger."""
    reasons = run.parts.hooks.should_save(run=run, moment=moment)
    if not reasons or not run.parts.keys.save_model or run.step in run.saved or not run.is_main_process:
        return
    reason = "; ".join(reasons)
    run.parts.metrics.flush()
    try:
        path = save_model(run)
    except NotSavedError as error:
        if is_last:
            raise
        run.parts.console.warn(f"saving at step {run.step} failed, and will be tried again at the next trigger: {error}")
        return
    run.saved[run.step] = path
    run.parts.console.line(f"saved {path} ({reason})")
    run.parts.hooks.on_save(run=run, path=path, reason=reason)


def save_model(run: Run) -> Path:
    """Write the model as it is after `run.step` steps and return its path.

    Raises:
        NotSavedError: the disk refused; nothing is left behind.
        CheckpointError: weights that are not finite.
        ConfigError: two plugins gave the same metadata entry.
    """
    keys = run.parts.keys
    epoch = math.ceil(run.step / run.steps_per_epoch)
    path = run.output_dir / "models" / f"{keys.output_name}_ep{epoch}_step{run.step}.safetensors"
    metadata = file_metadata(
        step=run.step,
        epoch=epoch,
        prediction_type=keys.prediction_type,
        zero_terminal_snr=keys.zero_terminal_snr,
        title=keys.output_name,
        resolution=keys.resolution,
    )
    answers = cast(list[dict[str, str]], run.parts.hooks.checkpoint_metadata(run=run))  # a collect: one answer a plugin
    for entries in answers:
        twice = metadata.keys() & entries.keys()
        if twice:
            raise ConfigError(f"checkpoint_metadata: two plugins, or a plugin and the trainer, give {', '.join(sorted(twice))}")
        metadata |= entries
    markers = file_markers(keys.prediction_type, keys.zero_terminal_snr)
    save_checkpoint(path, run.parts.base, trained_values(run.networks), keys.save_precision, metadata, markers)
    return path


def _sample_if_wanted(run: Run, moment: Moment) -> None:
    if _samples_are_wanted(run, moment):
        _sample(run, moment)


def _samples_are_wanted(run: Run, moment: Moment) -> bool:
    return bool(run.parts.samples and run.parts.hooks.should_sample(run=run, moment=moment))


def _sample(run: Run, moment: Moment) -> None:
    """Render a round of the benchmark. What fails in it is logged, and changes nothing in the training."""
    parts = run.parts
    parts.metrics.flush()
    done = render_training_round(
        run,
        parts.samples,
        parts.tokenizer,
        lambda: parts.hooks.build_sampler(noise_scheduler=run.noise_scheduler),
        moment,
        datetime.now(),
        check_stop=lambda: parts.stop.signum is not None,
    )
    if done.paths:
        parts.console.line(f"sampled {len(done.paths)} pictures into {done.paths[0].parent}")
        parts.hooks.on_sample(run=run, paths=done.paths)
    parts.speed.restart()


def current_rates(run: Run) -> dict[str, float]:
    """The learning rates that the next update uses, by their tags: "lr/unet" and so on."""
    return {f"lr/{group['name']}": float(group["lr"]) for group in run.optimizer.param_groups}
