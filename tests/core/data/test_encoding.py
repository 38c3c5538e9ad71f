"""Latents encoded before training: each as if it were alone, all bad pictures named, nothing that is not finite."""

import threading
from collections import Counter as Tally
from pathlib import Path

import numpy as np
import pytest
import torch
from made_index import made_index
from PIL import Image

from sdxl_train.data.caching import VaeInUse, Work, prepare_latents
from sdxl_train.data.encoding import check_pictures, encode_chunks, encode_pixels
from sdxl_train.data.index import Index
from sdxl_train.data.latents import LatentStore
from sdxl_train.errors import DataError
from sdxl_train.keys import Config
from sdxl_train.model.single_file import load_vae, open_checkpoint
from sdxl_train.randomness import sample_place

SIZES = [(64, 64), (64, 32), (64, 64), (32, 64), (64, 64), (64, 32), (64, 64)]


@pytest.fixture(scope="module")
def vae(tiny_base: Path):
    return load_vae(open_checkpoint(str(tiny_base)), torch.float32).requires_grad_(False).eval()


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return make_index(tmp_path, SIZES)


def make_index(folder: Path, sizes: list[tuple[int, int]], order: list[int] | None = None, repeats: list[int] | None = None) -> Index:
    """Pictures p0, p1, ... of exactly the size of their bucket; `order` is their order in the index."""
    order = list(range(len(sizes))) if order is None else order
    for i in order:
        width, height = sizes[i]
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"p{i}.png")
    columns = np.array([sizes[i] for i in order])
    return made_index({f"p{i}": {} for i in order}, [str(folder / f"p{i}.png") for i in order], columns, columns, num_repeats=repeats)


def config_of(**changed) -> Config:
    given = {"pretrained_model_name_or_path": "base", "image_dirs": ["images"], "output_dir": "out", "vae_batch_size": 2}
    return Config(**(given | changed))


def encode(index: Index, vae, on_progress=lambda done, total: None, check_stop=lambda: None, **changed) -> LatentStore:
    """All in memory, as with cache_latents_to_disk = false."""
    in_use = VaeInUse(vae, torch.device("cpu"), bytes(16), "float32")
    work = Work(lambda text: None, check_stop, lambda label, total: on_progress if label == "encoding pictures" else lambda *done: None)
    return prepare_latents(index, in_use, config_of(**changed), work, to_disk=False, in_memory=True).store


def stored(index: Index, store: LatentStore, flipped: bool = False) -> dict[str, torch.Tensor]:
    return {index.key(i): store.read([i], [flipped])[0] for i in range(len(index)) if index.num_repeats[i] > 0}


def break_picture(index: Index, *data: int) -> None:
    """Cut the file in the middle of its pixels but keep its end, so that only decoding finds it."""
    for datum in data:
        path = Path(index.image_path(datum))
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
        path.write_bytes(bytes(whole))


class CountingVae:
    """The VAE, with a record of its encodes; it may break the pictures of one of them."""

    def __init__(self, vae, broken_encode: int | None = None, value: float = float("nan")) -> None:
        self.vae, self.dtype, self.shapes = vae, vae.dtype, []
        self.broken_encode, self.value = broken_encode, value

    def encode(self, pixels):
        self.shapes.append(tuple(pixels.shape))
        answer = self.vae.encode(pixels)
        if self.broken_encode == len(self.shapes) - 1:
            answer.latent_dist.mean[-1, 0, 0, 0] = self.value
        return answer


def test_latents_are_mean_plus_deviation_times_a_draw_of_key_and_orientation(index, vae):
    encoded = encode(index, vae)
    draws = []
    for flipped in (False, True):
        pixels = torch.from_numpy(np.asarray(Image.open(index.image_path(1)))[:, :: -1 if flipped else 1].copy())
        posterior = vae.encode(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).latent_dist
        latents = encoded.read([1], [flipped])
        assert latents.dtype == torch.float32 and latents.shape == (1, 4, 4, 8)
        draws.append(((latents - posterior.mean) / posterior.std).flatten())
    assert all(0.6 < draw.std() < 1.4 and abs(draw.mean()) < 0.4 for draw in draws)  # 128 values: N(0, 1) within 4 deviations
    assert not torch.allclose(draws[0], draws[1], atol=0.1)


def test_latents_do_not_depend_on_the_batch_size_or_the_order_of_the_data(tmp_path, index, vae):
    expected = [stored(index, encode(index, vae, vae_batch_size=1), flipped) for flipped in (False, True)]
    backwards = make_index(tmp_path, SIZES, order=list(reversed(range(len(SIZES)))))
    for other, size in ((index, 3), (backwards, 2)):
        encoded = encode(other, vae, vae_batch_size=size)
        for flipped in (False, True):
            for key, latents in stored(other, encoded, flipped).items():
                torch.testing.assert_close(latents, expected[flipped][key], atol=1e-5, rtol=1e-5)


def test_another_seed_draws_other_latents(index, vae):
    first, other = stored(index, encode(index, vae, seed=0)), stored(index, encode(index, vae, seed=1))
    assert all(not torch.allclose(first[key], other[key], atol=1e-3) for key in first)


def test_flipped_latents_are_encoded_from_flipped_pixels(index, vae):
    given = []

    class Recorder(CountingVae):
        def encode(self, pixels):
            given.append(pixels)
            return super().encode(pixels)

    encode(index, Recorder(vae))
    for plain, flipped in zip(given[::2], given[1::2], strict=True):
        assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)


def test_encodes_share_a_bucket_and_are_as_few_as_can_be(index, vae):
    counting = CountingVae(vae)
    encode(index, counting, vae_batch_size=3)
    # four of 64x64, two of 64x32, one of 32x64, in both orientations; shapes are (B, 3, h, w)
    assert Tally(counting.shapes) == {(3, 3, 64, 64): 2, (1, 3, 64, 64): 2, (2, 3, 32, 64): 2, (1, 3, 64, 32): 2}
    counting = CountingVae(vae)
    encode(index, counting, vae_batch_size=3, flip_aug=False)
    assert len(counting.shapes) == 4


def test_repeats_of_zero_are_not_encoded_and_more_repeats_encode_once(tmp_path, vae):
    index = make_index(tmp_path, SIZES, repeats=[0, 1, 5, 0, 1, 1, 1])
    assert encode_chunks(index, np.flatnonzero(index.num_repeats).tolist(), 2) == [[1, 5], [2, 4], [6]]
    counting = CountingVae(vae)
    encode(index, counting, flip_aug=False)
    assert sum(shape[0] for shape in counting.shapes) == 5


def test_reading_a_batch_gives_each_sample_its_orientation(index, vae):
    encoded = encode(index, vae)
    plain, flipped = stored(index, encoded), stored(index, encoded, flipped=True)
    batch = encoded.read([4, 0, 4, 6], [True, False, False, True])
    for row, expected in zip(batch, (flipped["p4"], plain["p0"], plain["p4"], flipped["p6"]), strict=True):
        assert torch.equal(row, expected)
    batch.zero_()  # what was read is the caller's own
    assert torch.equal(encoded.read([0], [False])[0], plain["p0"])


def test_all_bad_pictures_are_named_and_nothing_is_encoded_after_the_first(index, vae):
    break_picture(index, 0, 4)  # both of the bucket that is encoded last: 64x64 holds 0, 2, 4, 6
    counting = CountingVae(vae)
    with pytest.raises(DataError) as caught:
        encode(index, counting, vae_batch_size=1, flip_aug=False)
    assert "bad pictures" in str(caught.value) and "(2)" in str(caught.value) and "bad_images" in str(caught.value)
    assert "p0.png" in str(caught.value) and "p4.png" in str(caught.value) and "p2.png" not in str(caught.value)
    assert len(counting.shapes) == 3


def test_skipped_bad_pictures_are_reported_and_all_others_are_encoded_as_ever(index, vae):
    expected = stored(index, encode(index, vae))
    break_picture(index, 0, 3)
    encoded = encode(index, vae, bad_images="skip")
    assert index.num_repeats.tolist() == [0, 1, 1, 0, 1, 1, 1] and index.summary.bad == 2
    for datum in (1, 2, 4, 5, 6):
        torch.testing.assert_close(encoded.read([datum], [False])[0], expected[f"p{datum}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_name_the_picture_and_both_remedies(index, vae, value):
    with pytest.raises(DataError) as caught:
        encode(index, CountingVae(vae, broken_encode=1, value=value), flip_aug=False)  # p1 and p5, the last of which is broken
    message = str(caught.value)
    assert "p5.png" in message and "p1.png" not in message
    assert "no_half_vae = true" in message and "vae" in message.replace("no_half_vae", "")


def test_checking_pictures_finds_the_same_bad_ones(index):
    break_picture(index, 2, 5)
    progress = []
    bad = check_pictures(index, list(range(7)), config_of(), lambda: None, lambda *done: progress.append(done))
    assert sorted(bad) == [2, 5] and "p5.png" in bad[5].message and bad[5].path == index.image_path(5)
    assert index.is_decoded.tolist() == [True, True, False, True, True, False, True]
    assert progress == [(done, 7) for done in range(1, 8)]


def test_progress_ends_with_all_pictures(index, vae):
    progress = []
    encode(index, vae, lambda *done: progress.append(done))
    assert progress[-1] == (7, 7) and progress == sorted(progress)


def test_a_stop_request_ends_the_encoding_and_its_threads(index, vae):
    class Stop(BaseException):
        pass

    counting = CountingVae(vae)

    def check_stop() -> None:
        if len(counting.shapes) == 2:
            raise Stop

    with pytest.raises(Stop):
        encode(index, counting, check_stop=check_stop)
    assert len(counting.shapes) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_pixels_encoded_in_a_step_draw_from_the_samples_place(index, vae):
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(index.image_path(datum))) for datum in (0, 2)])).permute(0, 3, 1, 2)
    places = [sample_place(0, 1, key, 0) for key in ("p0", "p2")]
    together, finite = encode_pixels(vae, pixels, places, "cpu")
    assert together.shape == (2, 4, 8, 8) and together.dtype == torch.float32 and finite.tolist() == [True, True]
    alone, _ = encode_pixels(vae, pixels[1:], places[1:], "cpu")
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-5)
    next_epoch, _ = encode_pixels(vae, pixels[:1], [sample_place(0, 2, "p0", 0)], "cpu")
    assert not torch.allclose(next_epoch[0], together[0], atol=1e-3)


def test_latents_of_a_step_are_scaled_and_stored_ones_are_not(index, vae):
    means = [vae.encode(pixels_of(index, datum)).latent_dist.mean[0] for datum in range(7)]
    scaled, _ = encode_pixels(vae, ((pixels_of(index, 0) + 1) * 127.5).round().to(torch.uint8), [b"place"], "cpu")
    unscaled = stored(index, encode(index, vae))["p0"]
    assert correlation_slope(means[0], unscaled) == pytest.approx(1, abs=0.25)
    assert correlation_slope(means[0], scaled[0]) == pytest.approx(0.13025, abs=0.25 * 0.13025)


def pixels_of(index: Index, datum: int) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(index.image_path(datum)))).permute(2, 0, 1)[None].float() / 127.5 - 1


def correlation_slope(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum() / (x * x).sum())


def test_a_sample_that_is_not_finite_is_flagged_by_its_row(index, vae):
    pixels = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    _, finite = encode_pixels(CountingVae(vae, broken_encode=0), pixels, [b"a", b"b", b"c"], "cpu")
    assert finite.tolist() == [True, True, False]
