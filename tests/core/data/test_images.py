import os
import resource
import struct
import subprocess
import sys
import zlib
from hashlib import blake2b
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from sdxl_train.data import images
from sdxl_train.data.buckets import place
from sdxl_train.data.image_headers import read_header
from sdxl_train.data.images import BadImage, image_header, load_image, load_pixels, load_pixels_and_source

LIMIT = 200_000_000
SIZE = (37, 21)


def scene(size=SIZE) -> np.ndarray:
    """A smooth picture without symmetry. [h, w, 3] uint8"""
    y, x = np.mgrid[: size[1], : size[0]]
    return np.stack([x * 255 // size[0], y * 255 // size[1], (x + 2 * y) * 255 // (size[0] + 2 * size[1])], axis=2).astype(np.uint8)


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    stream = BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def write(tmp_path, raw: bytes, name="a.png") -> str:
    path = tmp_path / name
    path.write_bytes(raw)
    return str(path)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, depth=8, colour=2, pixels: bytes | None = None) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" if pixels is None else pixels, 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


FORMATS = [
    ("PNG", {}),
    ("JPEG", {"quality": 95, "subsampling": 0}),
    ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
    ("WEBP", {"quality": 95}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
]


@pytest.mark.parametrize(("image_format", "options"), FORMATS)
def test_size_and_pixels_of_every_format_whatever_the_name_says(tmp_path, image_format, options):
    path = write(tmp_path, encoded(Image.fromarray(scene()), image_format, **options), "a.jpg")
    assert image_header(path, LIMIT) == SIZE
    image = load_image(path, LIMIT)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - scene()).mean() < 4


@pytest.mark.parametrize(("image_format", "options"), FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_file_is_found_without_decoding(tmp_path, image_format, options, share):
    raw = encoded(Image.fromarray(scene((200, 150))), image_format, **options)
    with pytest.raises(BadImage, match=r"a\.png: it"):
        image_header(write(tmp_path, raw[: int(len(raw) * share)]), LIMIT)


def test_the_end_of_a_thumbnail_is_not_taken_for_the_end_of_a_cut_jpeg(tmp_path):
    thumbnail = encoded(Image.fromarray(scene((8, 8))), "JPEG")
    raw = encoded(Image.fromarray(scene((400, 300))), "JPEG")
    segment = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail
    raw = raw[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + raw[2:]
    assert image_header(write(tmp_path, raw), LIMIT) == (400, 300)
    with pytest.raises(BadImage, match="EOI"):
        image_header(write(tmp_path, raw[: len(segment) + 900]), LIMIT)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("trailer", [b"\0" * 100, b"something behind the picture"])
def test_bytes_behind_the_picture_do_not_matter(tmp_path, image_format, trailer):
    path = write(tmp_path, encoded(Image.fromarray(scene()), image_format) + trailer)
    assert image_header(path, LIMIT) == SIZE == load_image(path, LIMIT).size


def test_a_flipped_bit_in_the_pixels_of_a_png_is_found(tmp_path):
    raw = bytearray(encoded(Image.fromarray(scene((200, 150))), "PNG"))
    raw[len(raw) // 2] ^= 1
    with pytest.raises(BadImage, match=r"a\.png: its pixels are damaged"):
        load_image(write(tmp_path, bytes(raw)), LIMIT)


def test_pixels_that_cannot_be_unpacked_are_a_bad_picture_and_never_filled_in(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, 150 * (200 * 3 + 1), np.uint8)
    rows.reshape(150, -1)[:, 0] = 0  # the filter of each row
    packed = zlib.compress(rows.tobytes())
    whole = png(200, 150, pixels=rows.tobytes())
    assert load_image(write(tmp_path, whole), LIMIT).size == (200, 150)
    half = chunk(b"IDAT", packed[: len(packed) // 2])
    path = write(tmp_path, whole[:33] + half + chunk(b"IEND", b""))
    assert image_header(path, LIMIT) == (200, 150)
    with pytest.raises(BadImage, match="cannot be decoded"):
        load_image(path, LIMIT)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    "raw", [b"", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\4\0\0\0WEBP", b"BM", b"GIF89a" + bytes(30)]
)
def test_what_is_no_picture_is_refused(tmp_path, raw):
    with pytest.raises(BadImage, match=r"a\.png: it"):
        image_header(write(tmp_path, raw), LIMIT)


def test_every_header_cut_anywhere_is_refused_and_never_crashes(tmp_path):
    for image_format, options in FORMATS:
        raw = encoded(Image.fromarray(scene((9, 5))), image_format, **options)
        for length in range(0, len(raw) - 13, 7):
            with pytest.raises(BadImage):
                read_header(write(tmp_path, raw[:length]))


def test_random_damage_to_headers_is_refused_or_read_and_never_crashes(tmp_path):
    random = np.random.default_rng(0)
    for image_format, options in FORMATS:
        raw = np.frombuffer(encoded(Image.fromarray(scene((9, 5))), image_format, **options), np.uint8)
        for _ in range(60):
            damaged = raw.copy()
            damaged[random.integers(0, min(len(raw), 300), 4)] = random.integers(0, 256, 4)
            try:
                load_image(write(tmp_path, damaged.tobytes()), 1_000_000)
            except BadImage:
                continue


def test_missing_folders_pipes_and_unreadable_files_are_named_with_the_reason(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("none.png", "No such file"), ("pipe.png", "not a regular file"), (".", "not a regular file")):
        with pytest.raises(BadImage, match=reason):
            image_header(str(tmp_path / name), LIMIT)


def test_too_many_open_files_is_no_fault_of_the_picture(tmp_path):
    path = write(tmp_path, encoded(Image.fromarray(scene()), "PNG"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            image_header(path, LIMIT)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_before_measuring_and_to_the_pixels(tmp_path, image_format, orientation):
    upright = scene((48, 32))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),  # to be turned clockwise
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[image_format]
    path = write(tmp_path, encoded(Image.fromarray(np.ascontiguousarray(stored)), image_format, exif=exif, **options))
    assert image_header(path, LIMIT) == (48, 32)
    assert np.abs(np.asarray(load_image(path, LIMIT)).astype(int) - upright).max() <= (12 if image_format == "JPEG" else 0)


def test_orientation_behind_the_pixels_of_a_png_is_found(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = encoded(Image.fromarray(scene()), "PNG")
    raw = raw[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + raw[-12:]
    path = write(tmp_path, raw)
    assert image_header(path, LIMIT) == SIZE[::-1] == load_image(path, LIMIT).size


@pytest.mark.parametrize("image_format", ["WEBP", "PNG"])
def test_animations_are_refused_with_the_number_of_frames(tmp_path, image_format):
    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(3)]
    path = write(tmp_path, encoded(frames[0], image_format, save_all=True, append_images=frames[1:]))
    with pytest.raises(BadImage, match="it has 3 frames"):
        image_header(path, LIMIT)


def test_the_pixel_limit_is_applied_to_the_header_alone(tmp_path):
    large, larger = write(tmp_path, png(12_000, 9_000)), write(tmp_path, png(20_000, 20_000), "b.png")
    assert image_header(large, LIMIT) == (12_000, 9_000)
    with pytest.raises(BadImage, match="12000x9000 = 108000000 px, above max_image_pixels = 50000000"):
        image_header(large, 50_000_000)
    for refuse in (image_header, load_image):
        with pytest.raises(BadImage, match="above max_image_pixels"):
            refuse(larger, LIMIT)


def test_pillows_own_pixel_limit_does_not_add_to_the_key(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for image_format in ("PNG", "JPEG", "BMP"):
        path = write(tmp_path, encoded(Image.fromarray(scene((90, 70))), image_format))
        assert load_pixels(path, place((90, 70), 64, 32), LIMIT).shape == (64, 64, 3)
    assert not recwarn.list


def grown_kib_by_refusing(path):
    """How much memory a fresh process takes to find that a picture is bad."""
    code = (
        "import resource, sys; from sdxl_train.data.images import BadImage, load_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_image(sys.argv[1], 50_000_000)\n"
        "except BadImage: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    return int(subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("width", [12_000, 20_000])
def test_refusing_a_bomb_takes_no_memory(tmp_path, width):
    path = write(tmp_path, png(width, width))
    assert grown_kib_by_refusing(path) < 64 * 1024


def test_huge_text_chunks_are_refused_also_packed_ones(tmp_path):
    text = b"note\0" + b"x" * (1 << 20)
    packed = b"note\0\0" + zlib.compress(b"x" * (2 << 20))
    international = b"note\0\1\0en\0note\0" + zlib.compress(b"x" * (2 << 20))
    for kind, body in ((b"tEXt", text), (b"zTXt", packed), (b"iTXt", international)):
        with pytest.raises(BadImage, match=kind.decode()):
            image_header(write(tmp_path, png(1, 1, chunk(kind, body))), LIMIT)
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "a cat" * 1000, zip=True)
    info.add_itxt("more", "猫" * 1000, zip=True)
    assert image_header(write(tmp_path, encoded(Image.fromarray(scene()), "PNG", pnginfo=info)), LIMIT) == SIZE


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def loaded(tmp_path, image: Image.Image, image_format="PNG", **options) -> np.ndarray:
    return np.asarray(load_image(write(tmp_path, encoded(image, image_format, **options)), LIMIT)).astype(int)


def test_alpha_is_composited_on_white(tmp_path):
    alpha = scene()[..., 2]
    rgba = Image.fromarray(np.dstack([scene(), alpha]))
    grey_alpha = Image.merge("LA", [Image.fromarray(scene()[..., 0]), Image.fromarray(alpha)])
    assert np.abs(loaded(tmp_path, rgba) - on_white(scene(), alpha)).max() <= 1
    assert np.abs(loaded(tmp_path, rgba, "WEBP", lossless=True, exact=True) - on_white(scene(), alpha)).max() <= 1
    assert np.abs(loaded(tmp_path, grey_alpha) - on_white(scene()[..., [0, 0, 0]], alpha)).max() <= 1


def test_transparent_palette_entries_and_colours_are_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 90])
    palette.putpixel((1, 0), 1)
    assert loaded(tmp_path, palette, transparency=bytes([0, 255])).tolist() == [[[255, 255, 255], [0, 0, 90]]]
    assert loaded(tmp_path, palette).tolist() == [[[200, 0, 0], [0, 0, 90]]]
    rgb = Image.fromarray(np.array([[[10, 20, 30], [9, 9, 9]]], np.uint8))
    assert loaded(tmp_path, rgb, transparency=(10, 20, 30)).tolist() == [[[255, 255, 255], [9, 9, 9]]]
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert loaded(tmp_path, grey, transparency=7).tolist() == [[[255] * 3, [8] * 3]]


def test_16_bits_are_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert loaded(tmp_path, Image.fromarray(deep)).tolist() == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]
    rows = b"\0" + struct.pack(">HHHHHH", 65535, 257, 0, 32896, 32896, 32896)
    path = write(tmp_path, png(2, 1, depth=16, pixels=rows))
    assert np.asarray(load_image(path, LIMIT)).tolist() == [[[255, 1, 0], [128, 128, 128]]]
    transparent = write(tmp_path, png(2, 1, chunk(b"tRNS", b"\x01\x01"), depth=16, colour=0, pixels=b"\0" + struct.pack(">HH", 257, 258)))
    assert np.asarray(load_image(transparent, LIMIT)).tolist() == [[[255] * 3, [1] * 3]]


def test_one_bit_grey_and_cmyk_become_rgb(tmp_path):
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert loaded(tmp_path, bits).tolist() == [[[0] * 3, [255] * 3]]
    assert loaded(tmp_path, Image.fromarray(scene()[..., 0])).tolist() == scene()[..., [0, 0, 0]].tolist()
    cmyk = Image.fromarray(np.dstack([255 - scene(), np.zeros(SIZE[::-1], np.uint8)]), "CMYK")
    assert np.abs(loaded(tmp_path, cmyk, "JPEG", quality=98, subsampling=0) - scene()).mean() < 2


def wide_profile() -> bytes:
    """A profile whose red, green and blue are those of sRGB in another order: converting swaps the colours, so it shows."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12)}
    red, blue = (bytes(profile[tags[name] + 4 : tags[name] + 12]) for name in (b"rXYZ", b"bXYZ"))
    profile[tags[b"rXYZ"] + 4 : tags[b"rXYZ"] + 12], profile[tags[b"bXYZ"] + 4 : tags[b"bXYZ"] + 12] = blue, red
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "BGRs".encode("utf-16-be")).replace(b"sRGB", b"BGRs")


@pytest.mark.parametrize(
    ("image_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 98, "subsampling": 0})]
)
def test_an_embedded_profile_is_converted_to_srgb(tmp_path, image_format, options):
    flat = Image.new("RGB", (16, 16), (200, 100, 30))
    found = loaded(tmp_path, flat, image_format, icc_profile=wide_profile(), **options)
    assert np.abs(found - [30, 100, 200]).max() <= 3
    transparent = flat.copy()
    transparent.putalpha(0)
    if image_format != "JPEG":
        assert loaded(tmp_path, transparent, image_format, icc_profile=wide_profile(), **options).min() == 255


@pytest.mark.parametrize("profile", [b"no profile at all", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_a_broken_or_srgb_profile_changes_nothing(tmp_path, profile):
    assert loaded(tmp_path, Image.fromarray(scene()), icc_profile=profile).tolist() == scene().tolist()


def test_pixels_fill_the_bucket_without_stretching(tmp_path):
    y, x = np.mgrid[:300, :640]
    disc = (((x - 320) ** 2 + (y - 150) ** 2) < 100**2).astype(np.uint8) * 255
    path = write(tmp_path, encoded(Image.fromarray(disc), "PNG"))
    placement = place((640, 300), 256, 64)
    pixels = load_pixels(path, placement, LIMIT)
    assert pixels.shape == (placement.bucket[1], placement.bucket[0], 3) and pixels.dtype == np.uint8
    inside = pixels[..., 0] > 127
    diameter_x, diameter_y = inside.any(axis=0).sum(), inside.any(axis=1).sum()
    assert abs(diameter_x - diameter_y) <= 1
    assert abs(diameter_y - 200 * placement.resized[1] / 300) <= 1


@pytest.mark.parametrize("size", [(640, 300), (90, 400), (65, 33), (20, 20)])
def test_the_window_equals_resizing_all_and_cropping(tmp_path, size):
    placement = place(size, 64, 32)
    image = Image.fromarray(scene(size))
    (width, height), (left, top) = placement.bucket, placement.crop
    whole = np.asarray(image.resize(placement.resized, Image.Resampling.LANCZOS)).astype(int)
    pixels = load_pixels(write(tmp_path, encoded(image, "PNG")), placement, LIMIT)
    assert np.abs(pixels - whole[top : top + height, left : left + width]).max() <= 2


def test_extreme_shapes_load_without_building_a_huge_picture(tmp_path):
    path = write(tmp_path, encoded(Image.new("RGB", (60_000, 1), (1, 2, 3)), "PNG"))
    placement = place((60_000, 1), 512, 32)
    assert placement.resized[0] > 1_000_000
    assert load_pixels(path, placement, LIMIT).tolist() == np.full((placement.bucket[1], placement.bucket[0], 3), (1, 2, 3)).tolist()


def test_a_picture_that_changed_its_shape_since_indexing_is_refused(tmp_path):
    path = write(tmp_path, encoded(Image.fromarray(scene((100, 50))), "PNG"))
    with pytest.raises(BadImage, match="changed since the data set was indexed; it has 100x50 px now"):
        load_pixels(path, place((50, 100), 64, 32), LIMIT)


def area(picture: np.ndarray, start: tuple[float, float], factor: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """The mean of what each pixel of the result covers, part pixels by their share. `start` and `factor` are (down, across)."""
    for axis, length in enumerate(size):
        edges = start[axis] + factor[axis] * np.arange(length + 1)
        lines = np.moveaxis(picture, axis, 0)
        sums = np.concatenate([np.zeros_like(lines[:1], np.float64), np.cumsum(lines, 0, np.float64)])
        positions = np.arange(len(sums))
        flat = sums.reshape(len(sums), -1)
        at_edges = np.stack([np.interp(edges, positions, column) for column in flat.T], axis=1)
        means = np.diff(at_edges, axis=0) / factor[axis]
        picture = np.moveaxis(means.reshape(length, *sums.shape[1:]), 0, axis)
    return picture


@pytest.mark.parametrize(
    ("size", "tolerance"), [((128, 128), 0.51), ((256, 256), 1.01), ((101, 160), 2.5), ((203, 130), 2.5), ((301, 333), 2.5)]
)
@pytest.mark.parametrize(("image_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})])
def test_shrinking_is_the_mean_of_the_area(tmp_path, image_format, options, size, tolerance):
    rough = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    picture = np.array(Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC))
    placement = place(size, 64, 32)
    (width, height), (left, top) = placement.bucket, placement.crop
    across, down = size[0] / placement.resized[0], size[1] / placement.resized[1]
    expected = area(picture, (top * down, left * across), (down, across), (height, width))
    pixels = load_pixels(write(tmp_path, encoded(Image.fromarray(picture), image_format, **options)), placement, LIMIT)
    error = np.abs(pixels - expected)
    # Whole numbers of pixels: the mean itself, rounded. Others: a smooth filter of that width.
    assert (error.max() if size[0] % 64 == 0 else error.mean()) <= tolerance


@pytest.mark.parametrize(("image_format", "options"), FORMATS)
@pytest.mark.parametrize("in_memory_bytes", [1 << 30, 0])
def test_the_source_is_told_with_the_pixels(tmp_path, monkeypatch, image_format, options, in_memory_bytes):
    raw = encoded(Image.fromarray(scene((150, 90))), image_format, **options)
    path, placement = write(tmp_path, raw), place((150, 90), 64, 32)
    expected = load_pixels(path, placement, LIMIT)
    os.utime(path, ns=(5, 1_600_000_000_123_456_789))
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", in_memory_bytes)
    pixels, source = load_pixels_and_source(path, placement, LIMIT)
    assert pixels.tolist() == expected.tolist()
    assert (source.size, source.mtime_ns, source.ignored_profile) == (len(raw), os.stat(path).st_mtime_ns, False)
    assert source.digest == blake2b(raw, digest_size=16).digest()


def other_space(space: bytes) -> bytes:
    profile = bytearray(wide_profile())
    profile[16:20] = space
    return bytes(profile)


def test_a_profile_that_cannot_be_used_is_told(tmp_path):
    flat = Image.fromarray(scene())
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cases = [(flat, None, False), (flat, srgb, False), (flat.convert("L"), srgb, False), (flat, wide_profile(), False)]
    cases += [(flat, b"no profile at all", True), (flat, other_space(b"CMYK"), True), (flat, wide_profile()[:200], True)]
    for image, profile, ignored in cases:
        path = write(tmp_path, encoded(image, "PNG", **({} if profile is None else {"icc_profile": profile})))
        assert load_pixels_and_source(path, place(SIZE, 32, 16), LIMIT)[1].ignored_profile is ignored
    path = write(tmp_path, encoded(flat.convert("CMYK"), "JPEG", icc_profile=srgb))
    assert load_pixels_and_source(path, place(SIZE, 32, 16), LIMIT)[1].ignored_profile


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "PPM", "ICO"])
def test_another_format_named_jpg_is_refused(tmp_path, image_format):
    path = write(tmp_path, encoded(Image.fromarray(scene((16, 16))), image_format), "a.jpg")
    for refuse in (lambda: image_header(path, LIMIT), lambda: load_pixels(path, place((16, 16), 32, 16), LIMIT)):
        with pytest.raises(BadImage, match=r"a\.jpg: it is no PNG, JPEG, WebP or BMP picture"):
            refuse()


def test_16_bit_colours_with_opacity_are_composited(tmp_path):
    rows = b"\0" + struct.pack(">8H", 65535, 0, 32896, 65535, 1000, 2000, 3000, 0)
    path = write(tmp_path, png(2, 1, depth=16, colour=6, pixels=rows))
    assert np.asarray(load_image(path, LIMIT)).tolist() == [[[255, 0, 128], [255, 255, 255]]]
    rows = b"\0" + struct.pack(">4H", 257 * 90, 65535, 0, 0)  # grey and opacity
    path = write(tmp_path, png(2, 1, depth=16, colour=4, pixels=rows))
    assert np.asarray(load_image(path, LIMIT)).tolist() == [[[90] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("from_the_top", [False, True])
def test_kinds_of_bmp(tmp_path, mode, from_the_top):
    image = Image.fromarray(scene()).convert(mode)
    raw = bytearray(encoded(image, "BMP"))
    if from_the_top:  # a negative height
        raw[22:26] = struct.pack("<i", -SIZE[1])
    expected = np.asarray(image.convert("RGB"))
    assert np.asarray(load_image(write(tmp_path, bytes(raw)), LIMIT)).tolist() == expected[:: -1 if from_the_top else 1].tolist()
    with pytest.raises(BadImage, match="it is cut"):
        load_image(write(tmp_path, bytes(raw[:-20])), LIMIT)


def test_a_packed_bmp_is_read_and_a_cut_one_refused(tmp_path):
    palette = b"\x0a\x14\x1e\0" + b"\xc8\x64\x32\0" + bytes(254 * 4)
    packed = b"\3\0\1\1\0\0" + b"\4\1\0\0" + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, 4, 2, 1, 8, 1, len(packed), 0, 0, 256, 0)
    raw = b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(packed), 0, 0, 14 + 40 + 1024) + head + palette + packed
    dark, light = [30, 20, 10], [50, 100, 200]
    assert np.asarray(load_image(write(tmp_path, raw), LIMIT)).tolist() == [[light] * 4, [dark] * 3 + [light]]
    with pytest.raises(BadImage):
        load_image(write(tmp_path, raw[:-10]), LIMIT)


@pytest.mark.parametrize("size", [(1, 1), (4000, 1), (1, 4000)])
@pytest.mark.parametrize(("image_format", "options"), FORMATS)
def test_the_smallest_and_thinnest_pictures_fill_their_buckets(tmp_path, image_format, options, size):
    path = write(tmp_path, encoded(Image.new("RGB", size, (200, 90, 30)), image_format, **options))
    placement = place(size, 128, 32)
    pixels = load_pixels(path, placement, LIMIT)
    assert pixels.shape == (placement.bucket[1], placement.bucket[0], 3)
    assert np.abs(pixels.astype(int) - (200, 90, 30)).max() <= 3


@pytest.mark.parametrize(
    "name", ["a b.png", "-a.png", "a\nb.png", "e\u0301.png", "é.png", os.fsdecode(b"\xff\xfe.png"), "x" * 251 + ".png"]
)
def test_any_file_name_is_read_and_escaped_in_the_reason(tmp_path, name):
    raw = encoded(Image.fromarray(scene()), "PNG")
    assert load_image(write(tmp_path, raw, name), LIMIT).size == SIZE
    with pytest.raises(BadImage) as refused:
        image_header(write(tmp_path, raw[:40], name), LIMIT)
    assert "\n" not in str(refused.value)
    str(refused.value).encode()


def test_a_damaged_picture_takes_no_more_memory_than_its_pixels(tmp_path):
    raw = encoded(Image.fromarray(scene((3000, 2000))), "JPEG", quality=90)  # 24 MB decoded
    path = write(tmp_path, raw[: len(raw) // 2] + b"\xff\xd9")
    assert grown_kib_by_refusing(path) < 64 * 1024
