"""File names of the data set: which are pictures, and what their key is."""

import os

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})  # in any letter case


def split_name(path: str) -> tuple[str, str]:
    """(key, extension in lower case) of a file: the key is its name without the last extension and keeps its letter case."""
    key, extension = os.path.splitext(os.path.basename(path))
    return key, extension.lower()
