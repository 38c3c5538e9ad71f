"""What can be wrong with what a user gave us. Each is shown as one message, without a traceback, when it comes before step 1."""


class SdxlTrainError(Exception):
    """Something the user can mend: the message names the key or file, what was found and what would do."""


class ConfigError(SdxlTrainError):
    """The TOML file or the command line."""


class DataError(SdxlTrainError):
    """Pictures, captions, metadata or caches."""


class CheckpointError(SdxlTrainError):
    """Model files and train states."""


class PluginError(SdxlTrainError):
    """A plugin that cannot be loaded, raised, or answered wrongly; names the plugin and the hook."""
