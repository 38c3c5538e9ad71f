"""The latent cache of one picture: an `.npz` file that kohya-ss/sd-scripts and euge-trainer read too, and those that they write.

Arrays: `latents` and, with flip_aug, `latents_flipped` [4, h, w] float32, unscaled; `original_size` int64 (w, h) of the picture in px;
`crop_ltrb` int64 (left, top, bucket width - cut on the right, bucket height - cut at the bottom) in px. Only this program has `source`
int64 (bytes, mtime_ns) and `source_digest` uint8[16] of the picture's file, `vae_digest` uint8[16] and `vae_precision` of the encoder.
Members are stored uncompressed, so latents are read at their offset. sd-scripts keeps several sizes in one file, as `latents_128x96`
(h x w in latents) and so on for each array.

Nothing is unpickled, and sizes are judged by the headers before anything is unpacked.
"""

import hashlib
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdxl_train.atomic import atomic_file
from sdxl_train.data.buckets import Placement, Size, place
from sdxl_train.data.file_stamps import stamp_of
from sdxl_train.data.npz_file import DAMAGE, BadCache, NpzArray, NpzFile, opened, packed, unreadable
from sdxl_train.model.architecture import LATENT_CHANNELS, PX_PER_LATENT

__all__ = [
    "BadCache",
    "CacheHeader",
    "cache_key",
    "cache_path_of",
    "file_digest",
    "read_at",
    "read_header",
    "read_latents",
    "sd_scripts_cache_name",
    "verify",
    "write_cache",
]

DIGEST_BYTES = 16
EXTENSION = ".npz"
KEYS = ("latents", "latents_flipped")
PX_LIMIT = 1 << 31  # of a length that makes sense

_READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # Windows would end a text at byte 26
_SD_SCRIPTS_NAME = re.compile(r"(.+)_(?:[0-9]{4}|[1-9][0-9]{4,})x(?:[0-9]{4}|[1-9][0-9]{4,})_sdxl", re.DOTALL)
_SIZED_KEY = re.compile(r"latents_([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True)
class CacheHeader:
    """What a cache holds for one bucket.

    Attributes:
        bucket: (w, h) in px.
        suffix: what follows each array's name for this size; empty for plain names.
        has_several: latents of several sizes are there, of which this is one.
        has_flipped: flipped latents of the same shape are there.
        offsets: where in the file the latents and the flipped latents begin as little-endian float32 in C order; -1 where they are
            missing or stored otherwise (`read_latents` reads them all the same).
        original_size: (w, h) in px, None where the file does not tell.
        crop: (left, top, left once flipped) in px, zeros without a crop.
        source: (bytes, mtime_ns) of the picture's file; this and the next three are None in files of other programs.
        source_digest: `file_digest` of the picture's file.
        vae_digest: of the weights that encoded it.
        precision: what it was encoded in.
        status: of the file when this was read.
    """

    path: str
    bucket: Size
    suffix: str
    has_several: bool
    has_flipped: bool
    offsets: tuple[int, int]
    original_size: Size | None
    crop: tuple[int, int, int]
    source: tuple[int, int] | None
    source_digest: bytes | None
    vae_digest: bytes | None
    precision: str | None
    status: os.stat_result = field(compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the latents: (4, h, w)."""
        return _latent_shape(self.bucket)


def cache_path_of(image_path: str) -> str:
    """The cache of a picture: its path with another extension."""
    return os.path.splitext(image_path)[0] + EXTENSION


def sd_scripts_cache_name(stem: str, image_size: Size) -> str:
    """The file name that sd-scripts gives to the cache of a picture. `image_size`: (w, h) in px."""
    width, height = image_size
    return f"{stem}_{width:04d}x{height:04d}_sdxl{EXTENSION}"


def cache_key(file_name: str) -> tuple[str, bool]:
    """(key of the datum, whether the name is one of sd-scripts) of a cache's file name.

    A picture may itself be called like `a_0512x0768_sdxl.png`: then the whole stem is its key. Only the caller can know.
    """
    stem = os.path.splitext(file_name)[0]
    match = _SD_SCRIPTS_NAME.fullmatch(stem)
    return (match[1], True) if match else (stem, False)


def read_header(path: str, bucket: Size | None, chosen_for: tuple[int, int] | None = None) -> CacheHeader:
    """Read the zip directory, the array headers and the small arrays; the latents' values are neither read nor judged.

    Args:
        bucket: (w, h) in px that the latents must have; None takes what the file has.
        chosen_for: resolution and bucket_reso_step in px: of several sizes, without `bucket`, the one that is the bucket of the original
            size beside it is taken, else the largest of area <= resolution^2, else the largest. None takes the largest.
    Raises:
        BadCache: with the reason: unreadable, no zip archive, cut, no latents of the bucket, not float, of another shape, or of a size
            that the file cannot hold.
        OSError: when the machine is at fault and not the file (too many open files).
    """
    with opened(path) as archive:
        sizes = _sizes(archive, path)
        suffix = _own_suffix(archive, sizes, chosen_for) if bucket is None else _suffix_of(sizes, path, bucket)
        height, width = sizes[suffix]
        shape = LATENT_CHANNELS, height, width
        plain = _latents(archive, path, KEYS[0] + suffix, shape)
        bucket = width * PX_PER_LATENT, height * PX_PER_LATENT
        try:
            flipped = _latents(archive, path, KEYS[1] + suffix, shape)
        except (BadCache, *DAMAGE):  # Ignored without flip_aug; who needs them learns the reason from `verify` or `read_latents`.
            flipped = None
        original_size = _original_size(_lengths(archive, "original_size" + suffix, 2))
        crop = _crop(_lengths(archive, "crop_ltrb" + suffix, 4), bucket)
        # The further arrays belong to the plain names: sd-scripts adds its own latents to a file and leaves the rest as it is.
        own = not suffix
        source = archive.small("source", (2,), "i") if own else None
        precision = archive.small("vae_precision", (), "U") if own else None
        return CacheHeader(
            path=path,
            bucket=bucket,
            suffix=suffix,
            has_several=len(sizes) > 1,
            has_flipped=flipped is not None,
            offsets=(plain.raw_offset, -1 if flipped is None else flipped.raw_offset),
            original_size=original_size,
            crop=crop,
            source=None if source is None else (int(source[0]), int(source[1])),
            source_digest=_digest(archive, "source_digest") if own else None,
            vae_digest=_digest(archive, "vae_digest") if own else None,
            precision=None if precision is None else str(precision[()]),
            status=archive.status,
        )


def read_latents(header: CacheHeader, flipped: bool, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Read the latents of one orientation. [4, h, w] float32, in `out` where it is given (C order).

    Raises:
        BadCache: unreadable, cut, damaged, or not there.
        OSError: as `read_header`.
    """
    latents = np.empty(header.shape, np.float32) if out is None else out
    assert latents.shape == header.shape and latents.dtype == np.float32 and latents.flags.c_contiguous
    offset = header.offsets[flipped]
    if offset >= 0:
        read_at(header.path, (offset, latents))
        return latents
    with opened(header.path) as archive:
        array = _latents(archive, header.path, KEYS[flipped] + header.suffix, header.shape)
        values = np.concatenate(list(archive.pieces(array)))
        latents[...] = values.reshape(header.shape, order="F" if array.fortran_order else "C")
    return latents


def read_at(path: str, *parts: tuple[int, NDArray[np.float32]]) -> os.stat_result:
    """Fill each array (C order) with the little-endian float32 at its offset in bytes in the file.

    Returns:
        the file's status, for comparison with that of the file that was verified: here nothing is checked but the length.
    Raises:
        BadCache: the file cannot be read, or ends before an array is full.
        OSError: as `read_header`.
    """
    try:
        # Not by `open`, whose file object would take longer than all the rest beside the copying.
        descriptor = os.open(path, _READ_FLAGS)
        try:
            status = os.fstat(descriptor)
            for offset, out in parts:
                left, end = out.data.cast("B"), offset + out.nbytes
                while left:
                    if not (count := _read_into(left, descriptor, end - len(left))):
                        raise BadCache.of(path, f"it is cut: {end} bytes are needed, it has {status.st_size}")
                    left = left[count:]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, error) from error
    return status


def verify(header: CacheHeader, flip_aug: bool) -> None:
    """Read all latents in use, compare their checksums, and look for values that are not finite (as float32). Memory: some pieces.

    The small arrays' checksums were compared by `read_header`. Flipped latents are required with `flip_aug`, ignored otherwise.

    Raises:
        BadCache: with the reason, and the array where it is one.
        OSError: as `read_header`.
    """
    with opened(header.path) as archive:
        if stamp_of(archive.status) != stamp_of(header.status):
            raise BadCache.of(header.path, "it was changed while it was read; nothing else may write to it")
        for key in KEYS[: 1 + flip_aug]:
            for values in archive.pieces(_latents(archive, header.path, key + header.suffix, header.shape)):
                if not np.isfinite(values).all():
                    found = "NaN" if np.isnan(values).any() else "infinity"
                    raise BadCache.of(header.path, f"its array {key}{header.suffix} holds a value that is not finite ({found})")


def write_cache(
    path: str,
    latents: NDArray[np.float32],
    latents_flipped: NDArray[np.float32] | None,
    original_size: Size,
    placement: Placement,
    source: tuple[int, int],
    source_digest: bytes,
    vae_digest: bytes,
    precision: str,
) -> CacheHeader:
    """Write a cache, whole or not at all. The same arguments give the same bytes. Arguments as in `CacheHeader`.

    Args:
        latents, latents_flipped: [4, h, w] of the placement's bucket, unscaled, finite.
    Returns:
        the header, as read back from the file.
    Raises:
        OSError: from the file system; then no file is left behind, and an older one is as it was.
    """
    bucket, (left, top), (cut_right, _) = placement.bucket, placement.crop, placement.flipped_crop
    cut_bottom = placement.resized[1] - bucket[1] - top
    both = [array for array in (latents, latents_flipped) if array is not None]
    assert all(array.shape == _latent_shape(bucket) for array in both)
    assert len(source_digest) == len(vae_digest) == DIGEST_BYTES
    arrays = {
        **{key: np.asarray(array, "<f4", order="C") for key, array in zip(KEYS, both, strict=False)},
        "original_size": np.array(original_size, "<i8"),
        "crop_ltrb": np.array([left, top, bucket[0] - cut_right, bucket[1] - cut_bottom], "<i8"),
        "source": np.array(source, "<i8"),
        "source_digest": np.frombuffer(source_digest, np.uint8),
        "vae_digest": np.frombuffer(vae_digest, np.uint8),
        "vae_precision": np.array(precision),
    }
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(packed(arrays))
    return read_header(path, bucket)


def file_digest(path: str) -> bytes:
    """BLAKE2b of a file's bytes, 16 bytes long, read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).digest()


def _read_into(out: memoryview, descriptor: int, offset: int) -> int:
    """Fills the beginning of `out` from the file; returns the bytes read."""
    if sys.platform != "win32":
        return os.preadv(descriptor, [out], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    data = os.read(descriptor, len(out))
    out[: len(data)] = data
    return len(data)


def _sizes(archive: NpzFile, path: str) -> dict[str, tuple[int, int]]:
    """{suffix of the keys: (h, w) in latents} of each size that the file holds; that of plain keys comes first."""
    sizes: dict[str, tuple[int, int]] = {}
    sized = [match for match in map(_SIZED_KEY.fullmatch, archive.keys) if match]
    if KEYS[0] in archive.keys or not sized:
        _, height, width = _latents(archive, path, KEYS[0]).shape
        sizes[""] = height, width
    return sizes | {f"_{match[1]}x{match[2]}": (int(match[1]), int(match[2])) for match in sized}


def _suffix_of(sizes: dict[str, tuple[int, int]], path: str, bucket: Size) -> str:
    """The size of the bucket; plain keys are preferred."""
    for suffix, size in sizes.items():
        if size == _latent_shape(bucket)[1:]:
            return suffix
    found = ", ".join(f"{width * PX_PER_LATENT}x{height * PX_PER_LATENT}" for height, width in list(sizes.values())[:20])
    raise BadCache.of(path, f"its latents are for {found} px, the bucket has {bucket[0]}x{bucket[1]} px")


def _own_suffix(archive: NpzFile, sizes: dict[str, tuple[int, int]], chosen_for: tuple[int, int] | None) -> str:
    """The size that the picture would have, see `read_header`; of equal ones plain keys are preferred."""
    by_area = sorted(sizes, key=lambda suffix: math.prod(sizes[suffix]), reverse=True)
    if chosen_for is None or len(sizes) == 1:
        return by_area[0]
    resolution, step = chosen_for
    for suffix in by_area:
        original_size = _original_size(_lengths(archive, "original_size" + suffix, 2))
        if original_size and sizes[suffix] == _latent_shape(place(original_size, resolution, step).bucket)[1:]:
            return suffix
    within = [suffix for suffix in by_area if math.prod(sizes[suffix]) * PX_PER_LATENT**2 <= resolution**2]
    return (within or by_area)[0]


def _latents(archive: NpzFile, path: str, key: str, shape: tuple[int, ...] | None = None) -> NpzArray:
    """The array of this name if it can be latents, of this shape where one is given."""
    array = archive.array(key)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise BadCache.of(path, f"its array {key} is of type {array.dtype}, not float")
    if len(array.shape) != 3 or array.shape[0] != LATENT_CHANNELS or min(array.shape) < 1:
        raise BadCache.of(path, f"its array {key} has the shape {array.shape}, not ({LATENT_CHANNELS}, h, w)")
    if shape is not None and array.shape != shape:
        raise BadCache.of(path, f"its array {key} has the shape {array.shape}, not {shape}")
    return array


def _lengths(archive: NpzFile, key: str, count: int) -> list[int] | None:
    """`count` lengths in px; None where they are missing or make no sense. Fractions are cut off: sd-scripts writes some."""
    values = archive.small(key, (count,), "iuf")
    if values is None or not (np.abs(values.astype(np.float64)) < PX_LIMIT).all():
        return None
    return [int(value) for value in values.tolist()]


def _digest(archive: NpzFile, key: str) -> bytes | None:
    values = archive.small(key, (DIGEST_BYTES,), "u")
    return None if values is None else values.astype(np.uint8).tobytes()


def _latent_shape(bucket: Size) -> tuple[int, int, int]:
    return LATENT_CHANNELS, bucket[1] // PX_PER_LATENT, bucket[0] // PX_PER_LATENT


def _original_size(numbers: list[int] | None) -> Size | None:
    return (numbers[0], numbers[1]) if numbers and min(numbers) > 0 else None


def _crop(ltrb: list[int] | None, bucket: Size) -> tuple[int, int, int]:
    """(left, top, left once flipped) in px. Some versions of euge-trainer store the whole picture as the window: that cuts nothing."""
    if ltrb is None or not any(ltrb):
        return 0, 0, 0
    left, top, right, _ = ltrb
    return max(0, left), max(0, top), max(0, bucket[0] - right)
