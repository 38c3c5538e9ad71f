"""What a batch holds, and that its draws depend on each sample's place alone."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from made_index import made_index
from PIL import Image

from sdxl_train.data.batches import Batch, Fetcher, assemble
from sdxl_train.data.buckets import choose_buckets
from sdxl_train.data.epoch_plan import BatchPlan
from sdxl_train.data.index import Index
from sdxl_train.errors import DataError
from sdxl_train.keys import Config
from sdxl_train.model.tokenizer import PromptTokenizer
from sdxl_train.plugins import Plugins
from sdxl_train.randomness import StepRandom, sample_place

TOKENIZER = PromptTokenizer()


class PlainLatents:
    """Latents whose value tells datum and orientation."""

    def read(self, data, flipped):
        values = torch.tensor([datum + 100.0 * flip for datum, flip in zip(data, flipped, strict=True)])
        return values[:, None, None, None].expand(-1, 4, 8, 12)


def config_of(**changed) -> Config:
    given = {"pretrained_model_name_or_path": "base", "image_dirs": ["images"], "output_dir": "out", "max_token_length": 150}
    return Config(**(given | changed))


def index_of(sizes: list[tuple[int, int]], resolution: int, step: int, folder: Path = Path("."), originals=None) -> Index:
    keys = [f"p{i}" for i in range(len(sizes))]
    rows = {key: {"caption": f"tag {key}", "description": f"prose {key}", "score": i} for i, key in enumerate(keys)}
    buckets = choose_buckets(np.array(sizes, np.int64), resolution, step)
    return made_index(rows, [str(folder / f"{key}.png") for key in keys], sizes, buckets, original_sizes=originals)


def fetcher_of(index: Index, with_pixels: bool = False, seed: int = 0, **changed) -> Fetcher:
    return Fetcher(index, Plugins([], seed), TOKENIZER, config_of(**changed), seed, with_pixels)


def batch_of(index: Index, *data: tuple[int, int], epoch: int = 1, store=None, **changed) -> Batch:
    width, height = index.bucket_sizes[data[0][0]].tolist()
    return assemble(fetcher_of(index, **changed)(BatchPlan(epoch, (width, height), data)), index, store)


def flips(index: Index, datum: int) -> dict[bool, int]:
    """An epoch in which the datum is flipped, and one in which it is not."""
    fetcher = fetcher_of(index)
    bucket = tuple(index.bucket_sizes[datum].tolist())
    return {fetcher(BatchPlan(epoch, bucket, ((datum, 0),))).flipped[0]: epoch for epoch in range(1, 30)}


def test_sizes_and_crops_are_those_of_the_oracle_also_after_a_flip(oracle):
    for given, expected in oracle("size_conditioning"):
        index = index_of([(given["width"], given["height"])], given["resolution"], given["bucket_reso_step"])
        for flipped, epoch in flips(index, 0).items():
            batch = batch_of(index, (0, 0), epoch=epoch)
            assert batch.flipped == [flipped]
            assert batch.original_sizes == [tuple(expected["original_hw"])]
            assert batch.target_sizes == [tuple(expected["target_hw"])]
            assert batch.crops == [tuple(expected["crop_top_left_flipped" if flipped else "crop_top_left"])]


def test_the_original_size_is_that_of_the_metadata():
    index = index_of([(96, 64)], 80, 8, originals=[(3000, 2000)])
    assert batch_of(index, (0, 0)).original_sizes == [(2000, 3000)]


def test_shapes_dtypes_and_the_scale_of_latents():
    index = index_of([(96, 64), (96, 64)], 80, 8)
    batch = batch_of(index, (0, 0), (1, 0), store=PlainLatents())
    assert len(batch) == 2 and batch.pixels is None
    assert batch.te1_ids.shape == batch.te2_ids.shape == (2, 2, 77)  # 150 tokens: two chunks
    assert batch.te1_ids.dtype == batch.te2_ids.dtype == torch.int64
    assert batch.noise.shape == (2, 4, 8, 12) and batch.noise.dtype == torch.float32
    assert batch.latents is not None
    expected = [0.13025 * (datum + 100 * flip) for datum, flip in zip((0, 1), batch.flipped, strict=True)]
    torch.testing.assert_close(batch.latents[:, 0, 0, 0], torch.tensor(expected))


def test_ids_are_those_of_the_caption_that_is_trained():
    index = index_of([(96, 64)], 80, 8)
    batch = batch_of(index, (0, 0))
    assert batch.captions[0] in ("tag p0", "prose p0")
    te1_ids, te2_ids, _ = TOKENIZER.tokenize(batch.captions[0], 150)
    assert batch.te1_ids[0].tolist() == te1_ids
    assert batch.te2_ids[0].tolist() == te2_ids


def test_metadata_is_made_anew_when_it_is_asked_for():
    batch = batch_of(index_of([(96, 64), (96, 64)], 80, 8), (1, 0), (0, 0))
    batch.metadata[0]["score"] = "changed"
    assert [entry["score"] for entry in batch.metadata] == [1, 0]


def test_a_samples_draws_are_the_same_in_every_batch():
    index = index_of([(96, 64)] * 4, 80, 8)
    together = batch_of(index, (0, 0), (1, 1), (2, 0), (3, 0))
    for row, sample in ((3, (3, 0)), (1, (1, 1))):
        alone = batch_of(index, sample)
        assert alone.captions == [together.captions[row]] and alone.flipped == [together.flipped[row]]
        assert torch.equal(alone.noise[0], together.noise[row])
        assert torch.equal(StepRandom(alone.places, "t").uniform(), StepRandom(together.places, "t").uniform()[row : row + 1])


@pytest.mark.parametrize("other", [{"epoch": 2}, {"seed": 1}, {"data": (0, 1)}])
def test_another_epoch_seed_or_repeat_draws_anew(other):
    index = index_of([(96, 64)], 80, 8)
    other = dict(other)
    changed = batch_of(index, other.pop("data", (0, 0)), **other)
    assert not torch.equal(changed.noise, batch_of(index, (0, 0)).noise)


def test_noise_is_standard_normal():
    index = index_of([(256, 256)] * 4, 256, 8)
    noise = batch_of(index, *((datum, 0) for datum in range(4))).noise  # 16384 values
    assert abs(noise.mean()) < 4 / 128 and abs(noise.std() - 1) < 4 / 181


def test_without_flip_aug_nothing_is_flipped():
    index = index_of([(96, 64)] * 32, 80, 8)
    data = [(datum, 0) for datum in range(32)]
    assert any(batch_of(index, *data).flipped)
    assert not any(batch_of(index, *data, flip_aug=False).flipped)


def test_pixels_are_cropped_first_and_then_mirrored(tmp_path):
    index = index_of([(98, 64)], 80, 8, tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (64, 98, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "p0.png")
    assert index.placement(0).crop == (1, 0) and index.placement(0).resized == (98, 64)
    cropped = torch.from_numpy(picture[:, 1:97]).permute(2, 0, 1)
    for flipped, epoch in flips(index, 0).items():
        pixels = batch_of(index, (0, 0), epoch=epoch, with_pixels=True).pixels
        assert pixels is not None and pixels.dtype == torch.uint8
        assert torch.equal(pixels[0], cropped.flip(-1) if flipped else cropped)


def test_a_picture_that_has_vanished_is_named(tmp_path):
    index = index_of([(96, 64)], 80, 8, tmp_path)
    with pytest.raises(DataError, match=r"p0\.png"):
        batch_of(index, (0, 0), with_pixels=True)


def test_what_travels_between_processes_holds_no_tensor(tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "p0.png")
    fetched = fetcher_of(index_of([(96, 64)], 80, 8, tmp_path), with_pixels=True)(BatchPlan(1, (96, 64), ((0, 0),)))
    assert b"torch" not in pickle.dumps(fetched)


def test_making_a_batch_leaves_the_global_generators_alone():
    index = index_of([(96, 64)], 80, 8)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    batch_of(index, (0, 0))
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_to_moves_every_tensor_and_keeps_the_rest():
    index = index_of([(96, 64)], 80, 8)
    batch = batch_of(index, (0, 0), store=PlainLatents())
    moved = batch.to("meta")
    assert {moved.te1_ids.device.type, moved.te2_ids.device.type, moved.noise.device.type} == {"meta"}
    assert moved.latents is not None and moved.latents.device.type == "meta"
    assert moved.keys == batch.keys and moved.metadata == batch.metadata
    assert moved.places == [sample_place(0, 1, "p0", 0)]
