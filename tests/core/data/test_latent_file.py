"""Caches of this program and of others are read; damaged, foreign and hostile files are refused with the reason."""

import errno
import io
import os
import pickle
import resource
import stat
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdxl_train.data.buckets import Placement, cover
from sdxl_train.data.latent_file import (
    BadCache,
    CacheHeader,
    cache_key,
    cache_path_of,
    file_digest,
    read_at,
    read_header,
    read_latents,
    sd_scripts_cache_name,
    verify,
    write_cache,
)

BUCKET = (64, 96)  # px
H, W = 12, 8
PLACEMENT = Placement(BUCKET, (64, 107), (0, 5))


def latents(seed: int = 0, height: int = H, width: int = W) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, height, width)).astype(np.float32)


def save(tmp_path: Path, compressed: bool = False, **arrays) -> str:
    path = tmp_path / "a.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return str(path)


def write(path: Path | str, flipped: bool = True, placement: Placement = PLACEMENT, **changes) -> CacheHeader:
    width, height = placement.bucket
    arguments = {
        "latents": latents(1, height // 8, width // 8),
        "latents_flipped": latents(2, height // 8, width // 8) if flipped else None,
        "original_size": (77, 129),
        "placement": placement,
        "source": (12345, 1_700_000_000_123_456_789),
        "source_digest": bytes(range(16)),
        "vae_digest": bytes(range(100, 116)),
        "precision": "fp32",
    }
    return write_cache(str(path), **(arguments | changes))


def reason(path: str, bucket: tuple[int, int] | None = BUCKET, flip_aug: bool = False) -> str:
    """Why the cache is refused, by its header or its values; the file stays as it was."""
    with pytest.raises(BadCache) as caught:
        verify(read_header(path, bucket), flip_aug)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def every_handle_is_closed() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() == before


# --- names


def test_the_cache_of_a_picture_lies_beside_it() -> None:
    assert cache_path_of("/d/a.b.jpg") == "/d/a.b.npz"
    assert sd_scripts_cache_name("a", (512, 768)) == "a_0512x0768_sdxl.npz"
    assert sd_scripts_cache_name("a", (12000, 40)) == "a_12000x0040_sdxl.npz"


@pytest.mark.parametrize("stem", ["a", "a.b", "a_b", "a\nb", "x_0512x0768_sdxl", "é", "\udcff"])
def test_a_cache_name_leads_back_to_the_key(stem: str) -> None:
    assert cache_key(sd_scripts_cache_name(stem, (12000, 40))) == (stem, True)
    if stem != "x_0512x0768_sdxl":
        assert cache_key(f"{stem}.npz") == (stem, False)


@pytest.mark.parametrize(
    "stem", ["_0512x0768_sdxl", "a_512x768_sdxl", "a_0512x0768", "a_0512x0768_sdxl_", "a_00512x0768_sdxl", "a_٠٥١٢x0768_sdxl"]
)
def test_other_names_are_keys_as_they_are(stem: str) -> None:
    assert cache_key(f"{stem}.npz") == (stem, False)


# --- what is written


def test_plain_numpy_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        found = {key: file[key] for key in file.files}
    expected = {
        "latents": latents(1),
        "latents_flipped": latents(2),
        "original_size": np.array([77, 129]),
        "crop_ltrb": np.array([0, 5, 64, 90]),  # cut off: 5 above, 107 - 96 - 5 = 6 below
        "source": np.array([12345, 1_700_000_000_123_456_789]),
        "source_digest": np.arange(16, dtype=np.uint8),
        "vae_digest": np.arange(100, 116, dtype=np.uint8),
        "vae_precision": np.array("fp32"),
    }
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape and (found[key] == value).all(), key


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    header = write(tmp_path / "a.npz")
    assert read_header(header.path, None) == header == read_header(header.path, BUCKET)
    assert (header.bucket, header.shape, header.has_flipped, header.suffix) == (BUCKET, (4, H, W), True, "")
    assert (header.original_size, header.crop, header.precision) == ((77, 129), (0, 5, 0), "fp32")
    assert (header.source, header.source_digest) == ((12345, 1_700_000_000_123_456_789), bytes(range(16)))
    assert header.vae_digest == bytes(range(100, 116))
    verify(header, flip_aug=True)
    out = np.empty((2, 4, H, W), np.float32)
    for flipped in (False, True):
        status = read_at(header.path, (header.offsets[flipped], out[int(flipped)]))
        assert status.st_mtime_ns == header.status.st_mtime_ns == os.stat(header.path).st_mtime_ns
        assert (out[int(flipped)] == latents(1 + flipped)).all() and (read_latents(header, flipped) == latents(1 + flipped)).all()


def test_members_are_not_compressed_and_carry_no_time(tmp_path: Path) -> None:
    write(tmp_path / "a.npz")
    write(tmp_path / "b.npz", latents=np.asfortranarray(latents(1)))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert {info.compress_type for info in zipfile.ZipFile(tmp_path / "a.npz").infolist()} == {zipfile.ZIP_STORED}


def test_without_flip_aug_no_flipped_latents_are_written(tmp_path: Path) -> None:
    header = write(tmp_path / "a.npz", flipped=False)
    assert not header.has_flipped and header.offsets[1] == -1
    assert "latents_flipped" not in np.load(header.path).files
    verify(header, flip_aug=False)
    with pytest.raises(BadCache, match="has no array latents_flipped"):
        read_latents(header, flipped=True)
    assert reason(header.path, flip_aug=True) == "it has no array latents_flipped"


@pytest.mark.parametrize("image_size", [(64, 97), (65, 96), (100, 100), (640, 961), (1000, 333), (64, 96)])
def test_the_crop_is_that_of_the_placement_also_once_flipped(tmp_path: Path, image_size: tuple[int, int]) -> None:
    placement = cover(image_size, BUCKET)
    header = write(tmp_path / "a.npz", placement=placement)
    left, top = placement.crop
    assert header.crop == (left, top, placement.resized[0] - BUCKET[0] - left)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_a_cache_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "a.npz")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "a.npz").st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("name", ["x" * 251 + ".npz", "a b\n-.npz", os.fsdecode(b"\xff\xfe.npz")])
def test_every_file_name_can_be_cached(tmp_path: Path, name: str) -> None:
    header = write(os.path.join(tmp_path, name))
    assert (read_latents(header, False) == latents(1)).all() and os.listdir(tmp_path) == [name]


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files cannot grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    large = Placement((256, 256), (256, 256), (0, 0))
    header = write(tmp_path / "old.npz", placement=large)
    for name in ("old.npz", "new.npz"):
        with full_disk(10_000), pytest.raises(OSError) as caught:
            write(tmp_path / name, placement=large, source=(1, 1))
        assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert os.listdir(tmp_path) == ["old.npz"] and read_header(header.path, large.bucket) == header


def test_a_digest_depends_on_every_byte(tmp_path: Path) -> None:
    data = bytes(range(256)) * 3000
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data[:-1] + b"\0")
    (tmp_path / "empty").write_bytes(b"")
    assert file_digest(str(tmp_path / "a")) != file_digest(str(tmp_path / "b"))
    # `b2sum -l 128 /dev/null`
    assert file_digest(str(tmp_path / "empty")).hex() == "cae66941d9efbd404e4d88758ea67670"


# --- files of other programs


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", ["", f"_{H}x{W}"])
def test_files_of_sd_scripts_are_read(tmp_path: Path, suffix: str, compressed: bool) -> None:
    arrays = {
        "latents": latents(1),
        "original_size": np.array((77, 129)),
        "crop_ltrb": np.array((3.0, 5.9, 61.7, 91.0)),
        "latents_flipped": latents(2),
        "alpha_mask": np.ones((96, 64), np.float32),
    }
    path = save(tmp_path, compressed, **{key + suffix: value for key, value in arrays.items()})
    for header in (read_header(path, BUCKET), read_header(path, None)):
        assert (header.bucket, header.suffix, header.has_flipped, header.original_size) == (BUCKET, suffix, True, (77, 129))
        assert header.crop == (3, 5, 64 - 61)  # fractions are cut off
        assert (header.source, header.source_digest, header.vae_digest, header.precision) == (None, None, None, None)
        assert (min(header.offsets) >= 0) is not compressed
        verify(header, flip_aug=True)
        for flipped in (False, True):
            assert (read_latents(header, flipped) == latents(1 + flipped)).all()


def test_files_of_euge_trainer_are_read(tmp_path: Path) -> None:
    path = save(tmp_path, latents=latents(), original_size=np.array((77.9, 129.9)), crop_ltrb=np.array((0, 0, 0, 0)))
    header = read_header(path, BUCKET)
    assert (header.original_size, header.crop, header.has_flipped) == ((77, 129), (0, 0, 0), False)
    verify(header, flip_aug=False)


def test_of_several_sizes_the_one_for_the_bucket_is_taken_else_the_largest(tmp_path: Path) -> None:
    sizes = [(8, 12), (12, 8), (16, 8), (4, 4)]
    arrays = {f"latents_{h}x{w}": latents(i, h, w) for i, (h, w) in enumerate(sizes)}
    arrays |= {f"original_size_{h}x{w}": np.array([100 + i, 200]) for i, (h, w) in enumerate(sizes)}
    path = save(tmp_path, **arrays)
    for i, (h, w) in enumerate(sizes):
        header = read_header(path, (w * 8, h * 8))
        assert header.original_size == (100 + i, 200) and (read_latents(header, False) == latents(i, h, w)).all()
    assert read_header(path, None).bucket == (64, 128)
    assert reason(path, (64, 64)) == "its latents are for 96x64, 64x96, 64x128, 32x32 px, the bucket has 64x64 px"


@pytest.mark.parametrize(
    ("original", "chosen_for", "bucket"),
    [
        ((256, 256), (128, 32), (128, 128)),  # the size that the picture has at this resolution
        ((256, 256), (64, 32), (64, 64)),
        ((256, 128), (128, 32), (160, 96)),  # of its shape, though another one is larger
        ((256, 256), (96, 32), (64, 64)),  # none is its bucket of 96x96: the largest within the resolution
        (None, (128, 32), (128, 128)),
        (None, (32, 32), (256, 256)),  # all are above it: the largest
    ],
)
def test_of_several_sizes_without_a_picture_its_own_bucket_is_taken_else_what_the_resolution_allows(tmp_path: Path, original, chosen_for, bucket) -> None:
    sizes = [(8, 8), (16, 16), (12, 20), (32, 32)]  # (h, w)
    arrays = {f"latents_{h}x{w}": latents(i, h, w) for i, (h, w) in enumerate(sizes)}
    if original:
        arrays |= {f"original_size_{h}x{w}": np.array(original) for h, w in sizes}
    header = read_header(save(tmp_path, **arrays), None, chosen_for)
    assert header.has_several and header.bucket == bucket


def test_latents_that_sd_scripts_added_do_not_get_our_digests(tmp_path: Path) -> None:
    write(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = {key: file[key] for key in file.files}
    path = save(
        tmp_path,
        **arrays,
        **{f"latents_{H}x{W}": latents(3), "latents_16x8": latents(4, 16, 8), "crop_ltrb_16x8": np.array([1, 2, 60, 120])},
    )
    own, added = read_header(path, BUCKET), read_header(path, None)
    assert own.suffix == "" and own.vae_digest == bytes(range(100, 116)) and (read_latents(own, False) == latents(1)).all()
    assert added.suffix == "_16x8" and added.crop == (1, 2, 4)
    assert (added.source, added.source_digest, added.vae_digest, added.original_size) == (None, None, None, None)


@pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4", "<f4"])
@pytest.mark.parametrize("fortran_order", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_latents_are_read_however_they_are_stored(tmp_path: Path, dtype: str, fortran_order: bool, compressed: bool) -> None:
    values = [latents(i).astype(np.float16).astype(dtype) for i in (1, 2)]
    if fortran_order:
        values = [np.asfortranarray(value) for value in values]
    path = save(tmp_path, compressed, latents=values[0], latents_flipped=values[1])
    header = read_header(path, BUCKET)
    raw = dtype == "<f4" and not fortran_order and not compressed
    assert (min(header.offsets) > 0, max(header.offsets) > 0) == (raw, raw)
    verify(header, flip_aug=True)
    out = np.empty((2, 4, H, W), np.float32)
    for flipped in (False, True):
        assert read_latents(header, flipped, out[int(flipped)]).base is out
        assert (out[int(flipped)] == values[flipped].astype(np.float32)).all()


@pytest.mark.parametrize(
    "value",
    [
        np.array([77, 129], object),
        np.array(None),
        np.array(77),
        np.array([77]),
        np.array([[77, 129]]),
        np.array([77, 129, 3, 4, 5]),
        np.array(["77", "129"]),
        np.array([np.nan, 129.0]),
        np.array([np.inf, 129.0]),
        np.array([1e300, 129.0]),
        np.array([2**63 - 1, 129]),
        np.array([True, False]),
        np.array([(77, 129)], [("w", int), ("h", int)]),
        np.array([{"size": "x" * 5000}], object),
        np.array([0, 129]),
        np.zeros(0),
        None,
    ],
)
def test_sizes_that_make_no_sense_count_as_missing(tmp_path: Path, value: np.ndarray | None) -> None:
    arrays = {"latents": latents()} | ({} if value is None else {"original_size": value, "crop_ltrb": value})
    header = read_header(save(tmp_path, **arrays), BUCKET)
    assert (header.original_size, header.crop) == (None, (0, 0, 0))
    verify(header, flip_aug=False)


@pytest.mark.parametrize(
    ("ltrb", "crop"),
    [((0, 0, 64, 96), (0, 0, 0)), ((7, 0, 56, 96), (7, 0, 8)), ((0, 0, 2000, 3000), (0, 0, 0)), ((0, 0, 63, 96), (0, 0, 1))],
)
def test_a_stored_crop_is_read_as_what_was_cut_off(tmp_path: Path, ltrb: tuple[int, ...], crop: tuple[int, ...]) -> None:
    assert read_header(save(tmp_path, latents=latents(), crop_ltrb=np.array(ltrb)), BUCKET).crop == crop


def test_members_written_to_a_stream_and_behind_other_bytes_are_read(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b"in front"

        def writable(self) -> bool:
            return True

        def write(self, data, /) -> int:
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    np.savez(pipe, latents=latents(1))  # type: ignore[arg-type]
    (tmp_path / "a.npz").write_bytes(pipe.data)
    header = read_header(str(tmp_path / "a.npz"), BUCKET)
    verify(header, flip_aug=False)
    assert header.offsets[0] > 0 and (read_latents(header, False) == latents(1)).all()


# --- what is refused


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (latents().astype(object), "holds pickled objects, which are never read"),
        (latents().astype(np.int32), "is of type int32, not float"),
        (latents().astype(np.complex64), "is of type complex64, not float"),
        (latents()[:3], "has the shape (3, 12, 8), not (4, h, w)"),
        (latents()[None], "has the shape (1, 4, 12, 8), not (4, h, w)"),
        (latents()[:, :0], "has the shape (4, 0, 8), not (4, h, w)"),
        (np.array(1.0), "has the shape (), not (4, h, w)"),
        (latents().astype([("x", "<f4")]), "its array latents has no header that can be read"),
        (latents(0, W, H), "its latents are for 96x64 px, the bucket has 64x96 px"),
    ],
)
def test_other_arrays_are_no_latents(tmp_path: Path, value: np.ndarray, words: str) -> None:
    assert words in reason(save(tmp_path, latents=value))


def test_latents_of_another_size_than_their_name_says_are_refused(tmp_path: Path) -> None:
    assert "has the shape (4, 12, 8), not (4, 8, 8)" in reason(save(tmp_path, latents_8x8=latents()), None)


def test_a_file_without_latents_is_refused(tmp_path: Path) -> None:
    assert reason(save(tmp_path, moments=latents())) == "it has no array latents"


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("key", ["latents", "latents_flipped"])
def test_values_that_are_not_finite_are_found_in_the_arrays_in_use(tmp_path: Path, key: str, value: float, compressed: bool) -> None:
    arrays = {"latents": latents(1).astype(np.float64), "latents_flipped": latents(2).astype(np.float64)}
    arrays[key][3, -1, -1] = value
    path = save(tmp_path, compressed, **arrays)
    found = "NaN" if np.isnan(value) else "infinity"
    assert reason(path, flip_aug=True) == f"its array {key} holds a value that is not finite ({found})"
    if key == "latents_flipped":
        verify(read_header(path, BUCKET), flip_aug=False)


@pytest.mark.parametrize("flipped", [latents(2)[:, 1:], latents(2).astype(int), latents(2).astype(object)])
def test_defective_flipped_latents_matter_only_with_flip_aug(tmp_path: Path, flipped: np.ndarray) -> None:
    path = save(tmp_path, latents=latents(), latents_flipped=flipped)
    header = read_header(path, BUCKET)
    assert not header.has_flipped and header.offsets[1] == -1
    verify(header, flip_aug=False)
    assert "latents_flipped" in reason(path, flip_aug=True)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path, compressed: bool) -> None:
    path = save(tmp_path, compressed, latents=latents(), original_size=np.array([1, 2]))
    whole = Path(path).read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        Path(path).write_bytes(whole[:length])
        reason(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path, compressed: bool) -> None:
    path = save(tmp_path, compressed, latents=latents(1), latents_flipped=latents(2), original_size=np.array([77, 129]))
    whole, expected, found = Path(path).read_bytes(), read_header(path, BUCKET), 0
    random = np.random.default_rng(0)
    edges = [*range(200), *range(len(whole) - 400, len(whole))]
    for position in [*edges, *random.integers(0, len(whole), 300).tolist()]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(random.integers(8))
        Path(path).write_bytes(damaged)
        try:
            header = read_header(path, BUCKET)
            verify(header, flip_aug=True)
        except BadCache:
            found += 1
            continue
        # The zip format has bytes without meaning for the data, such as times; and an array may lose its name.
        assert header.original_size in (expected.original_size, None)
        assert all((read_latents(header, bool(i)) == latents(1 + i)).all() for i in (0, 1))
    assert found > len(edges) // 3 + 250


def zeros_of_a_gib() -> bytes:
    """A raw deflate stream of 1 GiB of zeros in about 1 MB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * 1023 + packer.compress(bytes(1 << 20)) + packer.flush()


def npy_header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def deflated(head: bytes, tail: bytes, file_size: int, key: str = "latents") -> bytes:
    """A zip archive of one member that unpacks to `head` and the raw deflate stream `tail`; its directory says `file_size`."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH) + tail
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(f"{key}.npy", packed)
        info = archive.getinfo(f"{key}.npy")
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, file_size
    return stream.getvalue()


@pytest.mark.parametrize("key", ["latents", "latents_8192x8192", "original_size"])
@pytest.mark.parametrize("honest", [True, False])
def test_a_megabyte_that_unpacks_to_a_gibibyte_costs_no_memory(tmp_path: Path, honest: bool, key: str) -> None:
    head = npy_header((4, 8192, 8192) if honest else (4, H, W))
    size = len(head) + (1 << 30 if honest else latents().nbytes)
    path = tmp_path / "a.npz"
    path.write_bytes(deflated(head, zeros_of_a_gib(), size, key))
    assert path.stat().st_size < 1 << 21
    tracemalloc.start()
    try:
        for bucket in (None, BUCKET):
            reason(str(path), bucket)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("shape", [(4, 8192, 8192), (4, 10**6, 10**6), (4, 10**30, 8), (4, H, W + 1)])
def test_a_shape_that_the_file_cannot_hold_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("latents.npy", npy_header(shape) + latents().tobytes())
    assert "has 1664 bytes" in reason(str(path), None)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\0" + bytes(100),
        b"\x93NUMPY\x02\0\xff\xff\xff\xff",
        b"\x93NUMPY\x01\0\x10\0{'descr':",
        b"\x93NUMPY\x02\0\xff\x0f\0\0" + b"-" * 4095,
        npy_header((4, H, W), "|O"),
        npy_header((4, H, W), "<Q3"),
        npy_header((4, H, W), "|V0"),
        npy_header((4, H, W)).replace(b"12, 8", b"1 2,8"),
        npy_header((4, H, W)).replace(b"12, 8", b"-2, 8"),
    ],
)
def test_a_damaged_array_header_is_refused(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("latents.npy", head + latents().tobytes())
    assert "its array latents" in reason(str(path))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    pickled = np.array([Bomb(), Bomb()], object)
    path = save(tmp_path, latents=latents(), latents_flipped=pickled, original_size=pickled, crop_ltrb=pickled)
    read_header(path, BUCKET)
    reason(path, flip_aug=True)
    Path(path).write_bytes(pickle.dumps(Bomb()))
    reason(path)
    assert os.listdir(tmp_path) == ["a.npz"]


def test_methods_that_numpy_does_not_write_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("latents.npy", npy_header((4, H, W)) + latents().tobytes())
        assert "packed by a method that numpy does not write" in reason(str(path))


@pytest.mark.parametrize("offset", [2**64 - 1, 2**63 - 1, 1 << 40, 200])
def test_a_directory_that_points_elsewhere_is_refused(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("latents.npy", npy_header((4, H, W)) + latents().tobytes())
        archive.getinfo("latents.npy").header_offset = offset
    assert reason(str(path)).startswith("it is cut, damaged or no .npz file: ")


def test_a_directory_without_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"x"
        for i in range(20):
            info = zipfile.ZipInfo(f"{i}")
            info.comment = bytes(60_000)
            archive.writestr(info, b"")
    assert "a directory of 1200" in reason(str(path))


@pytest.mark.parametrize("content", [b"", b"PK", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x05\x06" + bytes(18), bytes(1000)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    reason(str(path))


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    os.mkdir(tmp_path / "folder.npz")
    assert reason(str(tmp_path / "pipe.npz")) == "it is not a regular file"
    assert reason(str(tmp_path / "folder.npz")) == "it is not a regular file"
    assert reason(str(tmp_path / "missing.npz")) == "it cannot be read: No such file or directory"
    with pytest.raises(BadCache, match=r"a\\x00b.npz: .*null byte"):
        read_header("a\0b.npz", None)


def test_a_file_that_changes_or_goes_away_is_noticed(tmp_path: Path) -> None:
    header = write(tmp_path / "a.npz")
    write(tmp_path / "a.npz", source=(1, 2))
    with pytest.raises(BadCache, match="was changed while it was read"):
        verify(header, flip_aug=False)
    out = np.empty((4, H, W), np.float32)
    with pytest.raises(BadCache, match=r"a\.npz: it is cut: \d+ bytes are needed, it has \d+"):
        read_at(header.path, (os.stat(header.path).st_size - 100, out))
    os.unlink(header.path)
    for action in (lambda: read_latents(header, False), lambda: read_latents(replace(header, offsets=(-1, -1)), False)):
        with pytest.raises(BadCache, match=r"a\.npz: it cannot be read: No such file"):
            action()


def test_too_many_open_files_say_nothing_about_the_cache(tmp_path: Path) -> None:
    header = write(tmp_path / "a.npz")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    actions = [
        lambda: read_header(header.path, BUCKET),
        lambda: read_latents(header, False),
        lambda: verify(header, False),
        lambda: file_digest(header.path),
    ]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        errors = []
        for action in actions:
            try:
                action()
            except OSError as error:
                errors.append(error.errno)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert errors == [errno.EMFILE] * len(actions)
