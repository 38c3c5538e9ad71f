"""What happens around the steps: logging, then saving, then sampling, each when a trigger has a reason; and how a run ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

from torch import Tensor

from sdxl_train.control import CONTROL_NAME, REQUESTS, take_requests
from sdxl_train.hookspecs import Moment
from sdxl_train.model.saving import NotSavedError
from sdxl_train.run import Run
from sdxl_train.sample_round import render_training_round
from sdxl_train.stopping import Interrupted
from sdxl_train.train_state import refuse_state_that_cannot_be_kept


def before_first_step(run: Run) -> None:
    """A fresh run with an active sample trigger shows what the base model draws, in `samples/step_0/` whichever trigger it is."""
    if run.step == 0 and (_samples_are_wanted(run, "step") or _samples_are_wanted(run, "epoch")):
        _sample(run, "step")


def after_step(run: Run, loss: Tensor | None, rates: Mapping[str, float | Tensor]) -> bool:
    """Count and log the step, then ask for saving, sampling and stopping.

    Args:
        loss: the step's loss; None when it was dropped.
        rates: the learning rates the step used, from `current_rates`.
    Returns:
        Whether a plugin, or a request to the running job, wants to stop.
    """
    run.step += 1
    if run.step == 1 and run.parts.keys.save_train_state:
        refuse_state_that_cannot_be_kept(run)
    run.parts.saves.poll(run)
    metrics: dict[str, float | Tensor] = {**rates, **run.parts.speed.metrics()}
    if loss is not None:
        average, ema = run.parts.recorder.record(loss)
        metrics |= {"loss/step": loss, "loss_avr/step": average, "loss_ema/step": ema}
    run.parts.metrics.push(run.step, run.epoch, metrics)  # first, so that the step is logged also if a plugin raises here
    run.parts.hooks.on_step_end(run=run, metrics=metrics)
    asked = _requests(run)
    _save_if_wanted(run, "step", asked="save" in asked)
    if "sample" in asked or _samples_are_wanted(run, "step"):
        _sample(run, "step")
    reasons = [*(run.parts.hooks.should_stop(run=run) or ()), *["asked by sdxl-train ctl"] * ("stop" in asked)]
    if reasons:
        run.stop_reason = "; ".join(reasons)
    return bool(reasons)


def _requests(run: Run) -> list[str]:
    """What `sdxl-train ctl` asks for now; what cannot be done is left out with a warning."""
    try:
        asked = take_requests(run.output_dir) if run.is_main_process else []
    except OSError as error:  # the disk refuses, for a while perhaps; a request that cannot be read is no reason to end the training
        run.parts.console.warn(f"requests of sdxl-train ctl cannot be read: {error}")
        asked = []
    for request in asked:
        if request not in REQUESTS:
            run.parts.console.warn(f"{run.output_dir / CONTROL_NAME}: {request!r} is no request; there are {', '.join(REQUESTS)}")
        elif request == "sample" and not run.parts.samples:
            run.parts.console.warn("sdxl-train ctl sample: nothing to render, since the configuration has no sample_benchmark")
        else:
            run.parts.console.line(f"sdxl-train ctl {request}, after step {run.step}")
    return [request for request in asked if request in REQUESTS and (request != "sample" or run.parts.samples)]


def after_epoch(run: Run) -> bool:
    """Log the epoch, then ask for saving and sampling. Returns whether the training goes on."""
    run.parts.metrics.flush()
    run.parts.hooks.on_epoch_end(run=run, metrics=run.parts.epoch_loss.metrics())
    run.epoch_is_open = False
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
        run.parts.saves.finish(run)
        run.parts.saves.refuse_failure()
        _sample_if_wanted(run, moment)
        run.parts.stop.check()  # a signal that came while the last samples were rendered
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
        run.parts.saves.finish(run)
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


def _save_if_wanted(run: Run, moment: Moment, is_last: bool = False, asked: bool = False) -> None:
    """Ask the save triggers; write each step once. A failed save before the end is tried again at the next trigger."""
    keys, saves = run.parts.keys, run.parts.saves
    reasons = [*(run.parts.hooks.should_save(run=run, moment=moment) or ()), *["sdxl-train ctl"] * asked]
    if not reasons or not (keys.save_model or keys.save_train_state) or not run.is_main_process:
        return
    run.parts.metrics.flush()
    if is_last:
        saves.finish(run)
    if saves.is_saved(run):
        return
    try:
        saves.start(run, "; ".join(reasons))
    except NotSavedError as error:
        if is_last:
            raise
        run.parts.console.warn(f"saving at step {run.step} failed, and will be tried again at the next trigger: {error}")
    if is_last:
        saves.finish(run, must_succeed=True)


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


def current_rates(run: Run) -> dict[str, float | Tensor]:
    """The learning rates that the next update uses, by their tags: "lr/unet" and so on.

    A group without a rate is one whose optimizer computes it; the schedule then reports the rate of the update before. A group's "d" is
    the step size that D-adaptation or Prodigy has found: the update moves by "lr_effective/unet" = d * lr. Tensors stay on the device.
    """
    rates: dict[str, float | Tensor] = {}
    for group, reported in zip(run.optimizer.param_groups, run.lr_scheduler.get_last_lr(), strict=True):
        rate = reported if group["lr"] is None else group["lr"]
        rates[f"lr/{group['name']}"] = rate
        if "d" in group:
            rates[f"lr_effective/{group['name']}"] = group["d"] * rate
    # Some optimizers keep their "d" as a tensor of shape [1].
    return {tag: rate.detach().reshape(()).clone() if isinstance(rate, Tensor) else float(rate) for tag, rate in rates.items()}
