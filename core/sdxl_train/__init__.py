"""The public API for plugin authors. Nothing else of this package is promised; see docs/writing-plugins.md."""

from sdxl_train.data.image_info import ImageInfo
from sdxl_train.errors import CheckpointError, ConfigError, DataError, PluginError, SdxlTrainError
from sdxl_train.hookspecs import hookimpl
from sdxl_train.options import Options, option
from sdxl_train.run import Run

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ImageInfo",
    "Options",
    "PluginError",
    "Run",
    "SdxlTrainError",
    "hookimpl",
    "option",
]
