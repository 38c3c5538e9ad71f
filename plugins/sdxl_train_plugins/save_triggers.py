"""When to save."""

from __future__ import annotations

import sdxl_train
from sdxl_train import Run, hookimpl, option


class Steps:
    """After every n-th step."""

    class Options(sdxl_train.Options):
        save_every_n_steps: int | None = option(
            None, "save after every n-th step; absent or 0 turns it off", zh="每 n 步保存一次；缺省或 0 为关闭", flat=True, ge=0
        )

    def __init__(self, options: Options) -> None:
        self._every = options.save_every_n_steps

    @hookimpl
    def should_save(self, run: Run, moment: str) -> str | None:
        return f"every {self._every} steps" if moment == "step" and self._every and run.step % self._every == 0 else None


class Epochs:
    """After every n-th epoch."""

    class Options(sdxl_train.Options):
        save_every_n_epochs: int | None = option(
            None, "save after every n-th epoch; absent or 0 turns it off", zh="每 n 轮保存一次；缺省或 0 为关闭", flat=True, ge=0
        )

    def __init__(self, options: Options) -> None:
        self._every = options.save_every_n_epochs

    @hookimpl
    def should_save(self, run: Run, moment: str) -> str | None:
        return f"every {self._every} epochs" if moment == "epoch" and self._every and run.epoch % self._every == 0 else None


class TrainEnd:
    """When the last step is done."""

    class Options(sdxl_train.Options):
        save_on_train_end: bool = option(True, "save when the last step is done; false turns it off", zh="训练结束时保存", flat=True)

    def __init__(self, options: Options) -> None:
        self._is_on = options.save_on_train_end

    @hookimpl
    def should_save(self, moment: str) -> str | None:
        return "end of training" if self._is_on and moment == "train_end" else None


class KeyboardInterrupted:
    """On Ctrl-C, SIGTERM or SIGHUP."""

    class Options(sdxl_train.Options):
        save_on_keyboard_interrupt: bool = option(
            True, "save the last completed step on Ctrl-C, SIGTERM or SIGHUP; false turns it off", zh="键盘中断时保存", flat=True
        )

    def __init__(self, options: Options) -> None:
        self._is_on = options.save_on_keyboard_interrupt

    @hookimpl
    def should_save(self, moment: str) -> str | None:
        return "interrupted" if self._is_on and moment == "keyboard_interrupt" else None


class ExceptionRaised:
    """When the training ends with an exception."""

    class Options(sdxl_train.Options):
        save_on_exception: bool = option(
            True,
            "save the last completed step when the training ends with an exception; false turns it off",
            zh="训练异常时保存",
            flat=True,
        )

    def __init__(self, options: Options) -> None:
        self._is_on = options.save_on_exception

    @hookimpl
    def should_save(self, moment: str) -> str | None:
        return "exception" if self._is_on and moment == "exception" else None
