"""When to render the sample benchmark. Step 0 and epoch 0 of a fresh run count: it is asked once before its first step."""

from __future__ import annotations

import sdxl_train
from sdxl_train import Run, hookimpl, option


class Steps:
    """After every n-th step."""

    class Options(sdxl_train.Options):
        sample_every_n_steps: int | None = option(
            None,
            "render the benchmark after every n-th step, and before the first; absent or 0 turns it off",
            zh="每 n 步采样一次；缺省或 0 为关闭",
            flat=True,
            ge=0,
        )

    def __init__(self, options: Options) -> None:
        self._every = options.sample_every_n_steps

    @hookimpl
    def should_sample(self, run: Run, moment: str) -> str | None:
        return f"every {self._every} steps" if moment == "step" and self._every and run.step % self._every == 0 else None


class Epochs:
    """After every n-th epoch."""

    class Options(sdxl_train.Options):
        sample_every_n_epochs: int | None = option(
            None,
            "render the benchmark after every n-th epoch, and before the first; absent or 0 turns it off",
            zh="每 n 轮采样一次；缺省或 0 为关闭",
            flat=True,
            ge=0,
        )

    def __init__(self, options: Options) -> None:
        self._every = options.sample_every_n_epochs

    @hookimpl
    def should_sample(self, run: Run, moment: str) -> str | None:
        return f"every {self._every} epochs" if moment == "epoch" and self._every and run.epoch % self._every == 0 else None
