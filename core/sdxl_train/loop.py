"""The method: one epoch after another, one step after another. Everything a user may vary is asked through a hook."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from sdxl_train.data.batches import Batch
from sdxl_train.data.encoding import encode_pixels
from sdxl_train.data.epoch_plan import epoch_plan
from sdxl_train.data.latents import nonfinite_latents_error
from sdxl_train.data.loader_processes import WorkerDiedError
from sdxl_train.devices import to_device
from sdxl_train.errors import SdxlTrainError
from sdxl_train.metrics import FiniteCheck
from sdxl_train.model.sdxl import make_add_time_ids, predict
from sdxl_train.model.text import encode_prompts
from sdxl_train.moments import after_epoch, after_step, before_first_step, current_rates, finish
from sdxl_train.out_of_memory import naming_the_bucket
from sdxl_train.randomness import StepRandom
from sdxl_train.run import Run
from sdxl_train.timesteps import draw_timesteps


def train(run: Run) -> None:
    """Train until the last step, a reason to stop, a signal or an exception; what `save_triggers` want is saved in each case."""
    run.parts.hooks.on_train_start(run=run)
    with finish(run):
        before_first_step(run)
        run.parts.speed.restart()
        while run.step < run.num_train_steps or run.epoch_is_open:
            if not run.epoch_is_open:
                run.epoch += 1
                run.parts.epoch_loss.reset()
            run.epoch_is_open = True
            run.parts.hooks.on_epoch_start(run=run)
            if not _train_epoch(run):
                break


def _train_epoch(run: Run) -> bool:
    """The rest of an epoch; False when the training is to stop."""
    keys, plan = run.parts.keys, epoch_plan(run.parts.index, run.parts.keys.seed, run.epoch, run.parts.keys.batch_size)
    done = (run.step - (run.epoch - 1) * run.steps_per_epoch) * keys.gradient_accumulation_steps  # micro-batches, before a resume
    batches = run.parts.loader.batches(plan[done:])
    try:
        for first in range(done, len(plan), keys.gradient_accumulation_steps):
            rates = current_rates(run)
            loss = train_step(run, batches, min(keys.gradient_accumulation_steps, len(plan) - first))
            run.parts.epoch_loss.add(loss)
            if after_step(run, loss, rates) or run.step == run.num_train_steps:
                break
    finally:
        batches.close()
    is_whole = run.step == run.epoch * run.steps_per_epoch
    return after_epoch(run) if is_whole else False


def train_step(run: Run, batches: Iterator[Batch], num_micro_batches: int) -> Tensor | None:
    """One optimizer step over the next micro-batches of the plan.

    The gradient is the mean over these micro-batches. A step whose loss is not finite changes nothing.

    Returns:
        The mean of the micro-batch losses, 0-dim float32, detached; None when the step was dropped.
    """
    batch_losses: list[Tensor] = []
    keys_seen: list[str] = []
    encoded: list[tuple[Batch, Tensor]] = []  # batches encoded in this step, and whether each of their latents is finite
    losses = finite = None
    update = run.parts.update
    update.begin(run.step + 1)
    for i in range(num_micro_batches):
        run.parts.stop.check()
        batch = _next_batch(run, batches)
        keys_seen += batch.keys
        height, width = batch.target_sizes[0]
        run.parts.speed.batch_begun(len(batch), (width, height), batch.te1_ids.shape[1])
        with naming_the_bucket(batch):
            if batch.pixels is not None:
                batch.latents, are_finite = encode_pixels(run.vae, batch.pixels, batch.places, run.device)
                encoded.append((batch, are_finite))
            loss = training_loss(run, batch)
            batch_losses.append(loss.detach())
            if i == num_micro_batches - 1:
                losses = torch.stack(batch_losses)
                finite = FiniteCheck(losses)  # copied before the last backward pass is queued, read after it
            update.backward(loss / num_micro_batches)
    if not update.is_done_in_backward:
        run.parts.stop.check()
    run.parts.speed.step_done()
    if losses is None or finite is None or not finite.is_finite():
        update.drop()
        _refuse_nonfinite_latents(run, encoded)
        _drop(run, keys_seen)
        return None
    update.apply()
    run.dropped_in_a_row = 0
    return losses.mean()


def training_loss(run: Run, batch: Batch) -> Tensor:
    """The loss of a micro-batch: the mean over its samples of loss x weights. 0-dim float32."""
    keys, hooks, schedule = run.parts.keys, run.parts.hooks, run.noise_scheduler
    latents = batch.latents
    assert latents is not None
    timesteps = to_device(draw_timesteps(batch, hooks, keys), run.device)  # [B]

    random = StepRandom(batch.places, "shape_noise", run.device)
    noise = hooks.shape_noise(noise=batch.noise, latents=latents, timesteps=timesteps, batch=batch, random=random)
    target = schedule.target(latents, noise, timesteps)  # [B, 4, h, w]
    random = StepRandom(batch.places, "shape_input_noise", run.device)
    input_noise = hooks.shape_input_noise(noise=noise, timesteps=timesteps, batch=batch, random=random)
    noisy_latents = schedule.add_noise(latents, input_noise, timesteps)  # [B, 4, h, w]

    with run.text_context():
        prompt_embeds, pooled = encode_prompts(batch.te1_ids, batch.te2_ids, *run.text_encoders, keys.clip_skip)
    sizes = torch.tensor([batch.original_sizes, batch.crops, batch.target_sizes])  # [3, B, 2]
    time_ids = to_device(make_add_time_ids(*sizes), run.device)  # [B, 6]
    with run.autocast():
        model_pred = predict(run.unet, noisy_latents, timesteps, prompt_embeds, pooled, time_ids)

    snr = schedule.snr(timesteps)
    loss = hooks.compute_loss(model_pred=model_pred.float(), target=target, timesteps=timesteps, batch=batch, snr=snr)  # [B]
    for factors in hooks.weigh_loss(timesteps=timesteps, snr=snr, prediction_type=keys.prediction_type, batch=batch):
        loss = loss * factors
    return loss.mean()


def _next_batch(run: Run, batches: Iterator[Batch]) -> Batch:
    began = time.perf_counter()
    try:
        return next(batches)
    except WorkerDiedError:
        run.parts.stop.check()  # a launcher's signal reaches the loader processes too: their death is part of the request to stop
        raise
    finally:
        run.parts.speed.waited(time.perf_counter() - began)


def _refuse_nonfinite_latents(run: Run, encoded: list[tuple[Batch, Tensor]]) -> None:
    index = run.parts.index
    paths = [index.source_path(batch.data[row]) for batch, finite in encoded for row, good in enumerate(finite.tolist()) if not good]
    if paths:
        raise nonfinite_latents_error(paths)


def _drop(run: Run, keys_seen: list[str]) -> None:
    """Count a step whose loss was not finite; too many in a row end the run."""
    run.dropped_steps += 1
    run.dropped_in_a_row += 1
    run.parts.console.warn(f"step {run.step + 1}: the loss is not finite; the step is dropped ({', '.join(keys_seen)})")
    if run.dropped_in_a_row >= run.parts.keys.max_nonfinite_steps:
        raise SdxlTrainError(
            f"the loss was not finite in {run.dropped_in_a_row} steps in a row (max_nonfinite_steps), last with {', '.join(keys_seen)}; "
            "a lower learning_rate or max_grad_norm = 1.0 may help; the last good weights are kept"
        )
