"""Every hook, in the order in which a run calls them. A plugin method is marked `@hookimpl` and takes the arguments it wants.

`random` in the step hooks is a `StepRandom`, in the caption hooks a `FetchRandom` (see randomness.py): draw from nothing else, so that
resuming, the number of workers and accumulation change no draw. A wrapper draws from `random.stream("its name")` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from sdxl_train.data.batches import Batch
    from sdxl_train.data.image_info import ImageInfo
    from sdxl_train.randomness import FetchRandom, StepRandom
    from sdxl_train.run import Run

hookspec = pluggy.HookspecMarker("sdxl_train")
hookimpl = pluggy.HookimplMarker("sdxl_train")

Moment = Literal["step", "epoch", "train_end", "keyboard_interrupt", "exception"]
Counter = Mapping[str, Mapping[str, int]]


class HookSpecs:
    """The signatures are a promise: tests/golden/hookspecs.txt holds them, and arguments may only be added."""

    # ---- Start: data ------------------------------------------------------------------------------------------------------------

    @hookspec(firstresult=True)
    def count_repeats(self, img_key: str, img_md: dict[str, Any], counter: Counter) -> int:
        """How often a picture is trained per epoch, asked once for each while the data is indexed. Pick: `num_repeats_getter`.

        Args:
            img_key: the picture's file name without extension.
            img_md: its metadata; every documented field is present, None when absent.
            counter: {"artist" | "characters" | "styles" | "quality" | "category": {formatted name: occurrences in the data set}}.
        Returns:
            An integer >= 0; 0 leaves the picture out. None, bool and float are errors.
        """
        raise AssertionError

    # ---- Start: optimizer -------------------------------------------------------------------------------------------------------

    @hookspec(firstresult=True)
    def build_optimizer(self, param_groups: list[dict[str, Any]]) -> Optimizer:
        """Make the optimizer. Pick: `optimizer_type`.

        Args:
            param_groups: dicts with `params` (list of Parameter), `lr` (float), `param_names` (a name for each parameter) and `name`
                ("unet" or "block0" ... "block22", "text_encoder1", "text_encoder2").
        Returns:
            A torch Optimizer over exactly these groups. None is an error. One that has `grad_scale`, `found_inf`, `step_key`, `begin_step`
            and `step_parameter` (see `sdxl_train/masked_optimizer.py`) can take the clipping factor by itself and serve `fused_backward`;
            `compile` calls its `compile_update`, if it has one. A train state is gone on with by the class that it is of, or by one whose
            `state_class` is the name of that ("package.module.Class").
        """
        raise AssertionError

    @hookspec(firstresult=True)
    def build_lr_scheduler(self, optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LRScheduler:
        """Make the learning-rate schedule, which is stepped once after each applied optimizer step. Pick: `lr_scheduler`.

        Args:
            optimizer: as answered by `build_optimizer`.
            num_warmup_steps: steps of linear warm-up, >= 0.
            num_training_steps: optimizer steps of the whole run, >= 1.
        Returns:
            A torch LRScheduler. None is an error.
        """
        raise AssertionError

    @hookspec
    def on_train_start(self, run: Run) -> None:
        """Everything is built and nothing is trained yet. Event."""

    @hookspec
    def on_epoch_start(self, run: Run) -> None:
        """Epoch `run.epoch` (from 1) begins. Event."""

    # ---- Making a batch, in loader processes ------------------------------------------------------------------------------------

    @hookspec(firstresult=True)
    def process_caption(self, img_info: ImageInfo, counter: Counter, flip_aug: bool, random: FetchRandom) -> str:
        """Rewrite the tag caption `img_info.caption` whenever it is the text chosen for a fetch. Chain: `caption_processor`.

        It may run in a loader process, so it must be a function of its arguments.

        Args:
            img_info: a fresh view of the picture; in a chain `img_info.caption` is the previous member's answer.
            counter: as in `count_repeats`.
            flip_aug: this fetch is horizontally flipped.
            random: a `random.Random` of this fetch and this chain member.
        Returns:
            The text to train. None is an error.
        """
        raise AssertionError

    @hookspec(firstresult=True)
    def process_description(self, img_info: ImageInfo, counter: Counter, flip_aug: bool, random: FetchRandom) -> str:
        """Rewrite the description `img_info.description`, as `process_caption` does captions. Chain: `description_processor`."""
        raise AssertionError

    # ---- A step -----------------------------------------------------------------------------------------------------------------

    @hookspec(firstresult=True)
    def sample_timesteps(self, batch_size: int, min_timestep: int, max_timestep: int, batch: Batch, random: StepRandom) -> Tensor:
        """Draw one timestep per sample. Pick: `timestep_sampler_type`. `random` draws on the CPU here.

        Returns:
            [batch_size] int64 in [min_timestep, max_timestep). None is an error.
        """
        raise AssertionError

    @hookspec(firstresult=True)
    def shape_noise(self, noise: Tensor, latents: Tensor, timesteps: Tensor, batch: Batch, random: StepRandom) -> Tensor:
        """Change the noise that is added to the latents and is part of the target. Chain: `noise_strategies`.

        Args:
            noise: [B, 4, h, w] float32; in a chain the previous member's answer.
            latents: scaled latents. [B, 4, h, w] float32.
            timesteps: [B] int64.
        Returns:
            [B, 4, h, w] float32. None is an error; leave the hook out, or return `noise`, to change nothing.
        """
        raise AssertionError

    @hookspec(firstresult=True)
    def shape_input_noise(self, noise: Tensor, timesteps: Tensor, batch: Batch, random: StepRandom) -> Tensor:
        """Change the noise of the U-Net's input only; the target keeps what `shape_noise` answered. Chain: `noise_strategies`.

        Returns:
            [B, 4, h, w] float32. None is an error.
        """
        raise AssertionError

    @hookspec(firstresult=True)
    def compute_loss(self, model_pred: Tensor, target: Tensor, timesteps: Tensor, batch: Batch, snr: Tensor) -> Tensor:
        """The loss of each sample. Pick: `loss_type`.

        Args:
            model_pred, target: [B, 4, h, w] float32; the target is noise or velocity as `prediction_type` says.
            timesteps: [B] int64.
            snr: as in `weigh_loss`. [B] float32, >= 0.
        Returns:
            [B] float32, attached to model_pred's graph, finite also at snr 0. None is an error.
        """
        raise AssertionError

    @hookspec
    def weigh_loss(self, timesteps: Tensor, snr: Tensor, prediction_type: str, batch: Batch) -> Tensor:
        """A factor on the loss of each sample; all plugins' factors are multiplied. Collect: `loss_weightings`.

        Args:
            timesteps: [B] int64.
            snr: alphas_cumprod / (1 - alphas_cumprod) at the timesteps; 0 at the last one with zero_terminal_snr. [B] float32, >= 0.
            prediction_type: "epsilon" or "v_prediction".
        Returns:
            [B] floating point, finite also at snr 0. None is an error; answer ones to change nothing.
        """
        raise AssertionError

    @hookspec
    def on_step_end(self, run: Run, metrics: Mapping[str, float | Tensor]) -> None:
        """Step `run.step` is done. Event.

        Args:
            metrics: the tags of the event file ("loss/step", "lr/unet", ...). Tensors are 0-dim and may still be computed on the
                device: reading one waits for it, so prefer `on_log`.
        """

    @hookspec
    def on_log(self, run: Run, metrics: Mapping[str, float]) -> None:
        """The metrics of a step have been read, in order of steps and possibly a few steps late. Event.

        Args:
            metrics: the same tags as plain floats, and `step`, `epoch` and `time` (seconds since 1970) of the step they belong to.
        """

    @hookspec
    def on_epoch_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Epoch `run.epoch` is done. Event. `metrics` holds "loss/epoch", the mean of the epoch's step losses."""

    # ---- Moments ----------------------------------------------------------------------------------------------------------------

    @hookspec
    def should_stop(self, run: Run) -> str | None:
        """Asked after each step: a reason to end the training as if this were its last step, or None to go on. Collect."""

    @hookspec
    def should_save(self, run: Run, moment: Moment) -> str | None:
        """A reason to save at this moment, or None. Collect: `save_triggers`.

        Args:
            moment: "step", "epoch", "train_end", "keyboard_interrupt" or "exception".
        """

    @hookspec
    def should_sample(self, run: Run, moment: Moment) -> str | None:
        """A reason to render the sample benchmark at this moment, or None. Collect: `sample_triggers`.

        Args:
            moment: "step", "epoch" or "train_end". A fresh run asks once before step 1, with `run.step` and `run.epoch` 0.
        """

    @hookspec
    def checkpoint_metadata(self, run: Run) -> dict[str, str]:
        """Entries for the metadata of a saved model; an entry given twice is an error. Collect. Answer {} to add none."""
        raise AssertionError

    @hookspec
    def on_save(self, run: Run, path: Path, reason: str) -> None:
        """A model file is complete on disk under `path`; once per path. Event."""

    @hookspec(firstresult=True)
    def build_sampler(self, noise_scheduler: Any) -> Any:
        """Make the diffusers scheduler that renders samples. Pick: `sample_sampler`.

        Args:
            noise_scheduler: the training schedule; see `sdxl_train.diffusion.NoiseSchedule`.
        Returns:
            A fresh diffusers scheduler (`set_timesteps`, `scale_model_input`, `step`). None is an error.
        """
        raise AssertionError

    @hookspec
    def on_sample(self, run: Run, paths: list[Path]) -> None:
        """A round of samples has been rendered; `paths` are the pictures in the order of the benchmark. Event."""

    @hookspec
    def on_train_end(self, run: Run, moment: Moment) -> None:
        """The training is over; `moment` is "train_end", "keyboard_interrupt" or "exception". Event."""
