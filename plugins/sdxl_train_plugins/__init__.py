"""The built-in plugins, one file a kind. They use only the public API of sdxl_train."""
