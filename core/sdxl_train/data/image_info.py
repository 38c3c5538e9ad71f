"""What a caption processor is told about a picture."""

from dataclasses import dataclass
from typing import Any


@dataclass
class ImageInfo:
    """One picture at one fetch: a fresh view, so changing it changes nothing else.

    Attributes:
        key: the file name without extension.
        metadata: its metadata, every documented field present (None when absent).
        caption: tag caption or None; in a chain of processors the previous one's answer.
        description: natural-language description or None; likewise.
        image_size: (w, h) in px of the picture as it stands upright.
        original_size: (w, h) in px before any earlier resizing, as the metadata says; else `image_size`.
        latent_size: (w, h) of the bucket / 8.
        bucket_size: (w, h) of the bucket in px.
        num_repeats: how often it is trained per epoch.
        npz_path: its cache file, or None.
        image_path: its picture file, or None when only a cache exists.
    """

    key: str
    metadata: dict[str, Any]
    caption: str | None
    description: str | None
    image_size: tuple[int, int]
    original_size: tuple[int, int]
    latent_size: tuple[int, int]
    bucket_size: tuple[int, int]
    num_repeats: int
    npz_path: str | None
    image_path: str | None
