from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdxl_train.data import images
from sdxl_train.data.buckets import place
from sdxl_train.data.images import BadImage, load_image, load_pixels

LIMIT = 200_000_000
SCAN = b"\xff\xda"


def photograph(size, slope=1.2, colour=0.4, seed=0) -> np.ndarray:
    """Noise whose amplitude falls as 1 / frequency^slope, as it does in photographs; `colour` of it differs by channel. [h, w, 3] uint8"""
    width, height = size
    random = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(width), np.fft.fftfreq(height)))
    frequency[0, 0] = 1
    planes = [np.fft.irfft2(np.fft.rfft2(random.standard_normal((height, width))) / frequency**slope, s=(height, width)) for _ in range(4)]
    grey, *colours = (plane / plane.std() for plane in planes)
    return np.clip(np.stack([128 + 45 * ((1 - colour) * grey + colour * plane) for plane in colours], axis=2), 0, 255).astype(np.uint8)


def encoded(picture: np.ndarray | Image.Image, **options) -> bytes:
    stream = BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def decibel(a, b) -> float:
    error = ((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.fixture
def both_ways(tmp_path, monkeypatch):
    """A JPEG as loaded, decoded in full and then loaded, and the scales it was decoded at."""

    def load(raw: bytes, placement):
        path = tmp_path / "a.jpg"
        path.write_bytes(raw)
        scales, decode = [], images._decoded

        def noting(source, header, scale=1):
            decoded = decode(source, header, scale)
            scales.append(decoded.scale)
            return decoded

        with monkeypatch.context() as patched:
            patched.setattr(images, "_decoded", noting)
            found = load_pixels(str(path), placement, LIMIT)
        with monkeypatch.context() as patched:
            patched.setattr(images, "reduced_scale", lambda layout, factor: 1)
            full = load_pixels(str(path), placement, LIMIT)
        return found, full, scales

    return load


@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("quality", [85, 95])
@pytest.mark.parametrize(("size", "scale"), [((256, 256), 2), ((401, 267), 2), ((552, 351), 2), ((751, 502), 4), ((1051, 1050), 8)])
def test_a_photograph_is_decoded_at_reduced_scale_and_stays_within_45_db(both_ways, size, scale, quality, sampling):
    raw = encoded(photograph(size), quality=quality, subsampling=sampling)
    found, full, scales = both_ways(raw, place(size, 128, 32))
    assert scales == [scale]
    assert decibel(found, full) >= 45


@pytest.mark.parametrize("slope", [1.0, 1.5])
def test_sharp_colours_stored_at_half_size_are_made_up_for(both_ways, slope):
    raw = encoded(photograph((1024, 1024), slope, 0.5), quality=92, subsampling=2)
    found, full, scales = both_ways(raw, place((1024, 1024), 512, 64))
    assert scales == [2]
    assert decibel(found, full) >= 45


def hard_pictures():
    random = np.random.default_rng(0)
    y, x = np.mgrid[:1024, :1024]
    yield "noise", random.integers(0, 256, (1024, 1024, 3), np.uint8)
    yield "black and white", np.repeat(random.integers(0, 2, (1024, 1024, 1), np.uint8) * 255, 3, 2)
    yield "coloured blocks", np.kron(random.integers(0, 2, (64, 64, 3), np.uint8) * 255, np.ones((16, 16, 1), np.uint8))
    yield "stripes", np.stack([((x // 3 + y // 3) % 2) * 255, ((x // 5) % 2) * 255, ((y // 4) % 2) * 255], 2).astype(np.uint8)
    yield "red on blue", np.where(((x // 2 + y // 2) % 2)[..., None] == 1, [255, 0, 0], [0, 0, 255]).astype(np.uint8)


@pytest.mark.parametrize(("name", "picture"), list(hard_pictures()))
@pytest.mark.parametrize("sampling", [0, 2])
def test_where_45_db_cannot_be_held_a_picture_is_decoded_in_full(both_ways, name, picture, sampling):
    found, full, _ = both_ways(encoded(picture, quality=80, subsampling=sampling), place((1024, 1024), 512, 64))
    assert decibel(found, full) >= 45


@pytest.mark.parametrize("sampling", ["4:2:2", "cmyk", "profile"])
def test_kinds_whose_reduced_decode_differs_are_decoded_in_full(both_ways, sampling):
    picture, options = Image.fromarray(photograph((512, 512))), {"quality": 90}
    if sampling == "cmyk":
        picture = picture.convert("CMYK")
    elif sampling == "profile":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        options["icc_profile"] = profile.replace("sRGB".encode("utf-16-be"), "Mine".encode("utf-16-be")).replace(b"sRGB", b"Mine")
    else:
        options["subsampling"] = 1
    _, _, scales = both_ways(encoded(picture, **options), place((512, 512), 128, 32))
    assert scales == [1]


def test_grey_and_srgb_tagged_pictures_are_decoded_at_reduced_scale(both_ways):
    grey = Image.fromarray(photograph((700, 601))).convert("L")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for raw in (encoded(grey, quality=90), encoded(photograph((700, 601)), quality=90, subsampling=0, icc_profile=srgb)):
        found, full, scales = both_ways(raw, place((700, 601), 256, 32))
        assert scales == [2]
        assert decibel(found, full) >= 45


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_of_odd_size_shows_the_same_window(both_ways, tmp_path, orientation):
    stored = photograph((1003, 757), 1.5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(stored, quality=95, subsampling=0, exif=exif)
    (tmp_path / "b.jpg").write_bytes(raw)
    upright = load_image(str(tmp_path / "b.jpg"), LIMIT)
    placement = place(upright.size, 256, 64)
    found, full, scales = both_ways(raw, placement)
    assert scales == [2]
    assert decibel(found, full) >= 45
    # An odd size leaves half a block on another side once it is turned, so this is not exact to the last level.
    (width, height), (left, top) = placement.bucket, placement.crop
    whole = np.asarray(upright.resize(placement.resized, Image.Resampling.HAMMING))
    assert decibel(found, whole[top : top + height, left : left + width]) >= 36


def cut(raw: bytes, share: float) -> bytes:
    """The last scan cut, and the end marker put behind it."""
    start = raw.rindex(SCAN) + 14
    return raw[: start + int((len(raw) - 2 - start) * share)] + b"\xff\xd9"


BASELINE = [
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"optimize": True},
    {"restart_marker_rows": 1},
    {"restart_marker_blocks": 3},
]


@pytest.mark.parametrize("options", BASELINE)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_cut_in_its_pixels_is_found_though_its_end_marker_is_there(tmp_path, mode, options):
    raw = encoded(Image.fromarray(photograph((300, 203))).convert(mode), quality=90, **options)
    path = tmp_path / "a.jpg"
    placement = place((300, 203), 128, 32)
    for reduced in (False, True):
        for share in (0.0, 0.1, 0.5, 0.9, 0.99):
            path.write_bytes(cut(raw, share))
            with pytest.raises(BadImage, match=r"a\.jpg: it cannot be decoded: image file is truncated"):
                load_pixels(str(path), placement, LIMIT) if reduced else load_image(str(path), LIMIT)
        path.write_bytes(raw)
        load_pixels(str(path), placement, LIMIT)
        assert load_image(str(path), LIMIT).tobytes() == Image.open(BytesIO(raw)).convert("RGB").tobytes()


def test_a_marker_amid_the_pixels_is_found(tmp_path):
    raw = bytearray(encoded(photograph((300, 200)), quality=90))
    raw[len(raw) // 2 : len(raw) // 2 + 2] = b"\xff\xc5"
    (tmp_path / "a.jpg").write_bytes(raw)
    with pytest.raises(BadImage, match="image file is truncated"):
        load_image(str(tmp_path / "a.jpg"), LIMIT)


def test_pixels_replaced_by_longer_data_are_found(tmp_path):
    raw, other = (encoded(photograph((300, 200), seed=seed), quality=90) for seed in (0, 1))
    (tmp_path / "a.jpg").write_bytes(raw[:-2] + other[other.rindex(SCAN) + 14 :])
    with pytest.raises(BadImage, match="the last row comes before the end of the data"):
        load_image(str(tmp_path / "a.jpg"), LIMIT)


@pytest.mark.parametrize("filling", [b"\xff\xff", bytes(500), bytes(3)])
def test_padding_before_the_end_marker_does_not_matter(tmp_path, filling):
    picture = photograph((300, 200))
    raw = encoded(picture, quality=95, subsampling=0)
    (tmp_path / "a.jpg").write_bytes(raw[:-2] + filling + raw[-2:])
    assert decibel(load_image(str(tmp_path / "a.jpg"), LIMIT), picture) > 35


def test_a_progressive_jpeg_without_its_last_scans_is_found(tmp_path):
    raw = encoded(photograph((300, 200)), quality=90, progressive=True)
    path = tmp_path / "a.jpg"
    path.write_bytes(raw)
    assert load_image(str(path), LIMIT).size == (300, 200)
    for at in (raw.rindex(SCAN), raw.rindex(b"\xff\xc4"), len(raw) // 3):
        path.write_bytes(raw[:at] + b"\xff\xd9")
        with pytest.raises(BadImage, match="without its last scans"):
            load_image(str(path), LIMIT)


@pytest.mark.parametrize("size", [(1, 1), (15, 3), (16, 1), (17, 40), (3000, 1)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_small_and_thin_jpegs_load(tmp_path, size, options):
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", size, (10, 200, 30)), quality=95, **options))
    assert np.abs(np.asarray(load_image(str(tmp_path / "a.jpg"), LIMIT)).astype(int) - (10, 200, 30)).max() <= 3
    assert load_pixels(str(tmp_path / "a.jpg"), place(size, 64, 32), LIMIT).std(axis=(0, 1)).max() < 1
