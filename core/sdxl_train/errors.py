"""What can be wrong with what a user gave us. Each is shown as one message, without a traceback, when it comes before step 1."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: what it concerns: config, metadata, caption, name, image, cache, data, checkpoint.
        message: one line that names the key or the file, what was found and what would do.
        path: the file, where it is one.
        key: the TOML key or the key of the datum, where it is one.
    """

    kind: str
    message: str
    path: str | None = None
    key: str | None = None


class SdxlTrainError(Exception):
    """Something the user can mend: the message names the key or file, what was found and what would do.

    Attributes:
        problems: the same, one by one; empty where the message alone says it.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class ConfigError(SdxlTrainError):
    """The TOML file or the command line."""


class DataError(SdxlTrainError):
    """Pictures, captions, metadata or caches."""


class CheckpointError(SdxlTrainError):
    """Model files and train states."""


class PluginError(SdxlTrainError):
    """A plugin that cannot be loaded, raised, or answered wrongly; names the plugin and the hook."""
