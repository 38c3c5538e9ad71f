"""Makes a batch: what a loader process fetches for it, and what the main process adds.

Only numpy arrays and strings travel between processes, through pipes: tensors would take shared memory, of which a container has 64 MiB.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.captions import choose_and_process, is_flipped
from sdxl_train.data.epoch_plan import BatchPlan
from sdxl_train.data.images import load_pixels
from sdxl_train.devices import to_device
from sdxl_train.errors import DataError
from sdxl_train.keys import Config
from sdxl_train.model.architecture import LATENT_CHANNELS, PX_PER_LATENT
from sdxl_train.model.tokenizer import PromptTokenizer
from sdxl_train.plugins import Plugins
from sdxl_train.randomness import StepRandom, sample_place
from sdxl_train.text_display import shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sdxl_train.data.index import Index
    from sdxl_train.data.latents import LatentStore


@dataclass
class Batch:
    """Pictures of one bucket that are trained together, B of them.

    Attributes:
        keys: the key of each sample.
        captions: the text of each sample as trained, after its processors.
        flipped: whether each sample is flipped horizontally.
        original_sizes: (h, w) in px before any resizing.
        crops: (top, left) in px of what was cut off, in the resized and then flipped picture.
        target_sizes: (h, w) of the bucket in px.
        data: the row of each sample in the index.
        places: each sample's place in the run, for `StepRandom`.
        te1_ids, te2_ids: token ids for each text encoder, n chunks a sample. [B, n, 77] int64.
        noise: N(0, 1), before any noise strategy. [B, 4, h, w] float32.
        latents: scaled latents; None until pixels are encoded. [B, 4, h, w] float32.
        pixels: the pictures, only where latents are encoded in every step. [B, 3, 8h, 8w] uint8.
    """

    keys: list[str]
    captions: list[str]
    flipped: list[bool]
    original_sizes: list[tuple[int, int]]
    crops: list[tuple[int, int]]
    target_sizes: list[tuple[int, int]]
    data: list[int]
    places: list[bytes]
    te1_ids: Tensor
    te2_ids: Tensor
    noise: Tensor
    latents: Tensor | None = None
    pixels: Tensor | None = None
    index: Index | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """The metadata (`img_md`) of each sample, made anew when asked."""
        assert self.index is not None
        return [self.index.metadata(datum) for datum in self.data]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device; the copy to a CUDA device does not hold up the host."""
        import torch

        moved = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = to_device(value, device)
        return Batch(**moved)


@dataclass(frozen=True)
class FetchedBatch:
    """What a loader process makes of a batch of the epoch plan. Arrays as in `Batch`, except pixels: [B, 8h, 8w, 3]."""

    plan: BatchPlan
    places: list[bytes]
    captions: list[str]
    flipped: list[bool]
    te1_ids: NDArray[np.int64]
    te2_ids: NDArray[np.int64]
    pixels: NDArray[np.uint8] | None


@dataclass(frozen=True)
class Fetcher:
    """Fetches what belongs to a batch of the plan. A function of the plan, the seed and the data: it keeps nothing from call to call.

    Args:
        with_pixels: also decode the pictures, for latents that are encoded in every step.
    """

    index: Index
    plugins: Plugins
    tokenizer: PromptTokenizer
    config: Config
    seed: int
    with_pixels: bool

    def rebuilt(self) -> Fetcher:
        """The same with plugin instances of its own, for a loader process."""
        return replace(self, plugins=self.plugins.rebuilt())

    def __call__(self, plan: BatchPlan) -> FetchedBatch:
        """Choose and process the texts, tokenise them, and read the pictures if they are wanted.

        Raises:
            PluginError: a processor raised or answered no str.
            DataError: a picture can no longer be read, or a text is not Unicode.
        """
        places = [sample_place(self.seed, plan.epoch, self.index.key(datum), occurrence) for datum, occurrence in plan.data]
        flipped = [self.config.flip_aug and is_flipped(place) for place in places]
        samples = [(datum, place, flip) for (datum, _), place, flip in zip(plan.data, places, flipped, strict=True)]
        captions = [self._caption(datum, place, flip) for datum, place, flip in samples]
        tokens = [self._tokens(datum, caption) for (datum, _, _), caption in zip(samples, captions, strict=True)]
        pixels = np.stack([self._pixels(datum, flip) for datum, _, flip in samples]) if self.with_pixels else None
        te1_ids, te2_ids = (np.array(ids, np.int64) for ids in zip(*tokens, strict=True))  # [B, n, 77]
        return FetchedBatch(plan, places, captions, flipped, te1_ids, te2_ids, pixels)

    def _caption(self, datum: int, place: bytes, flipped: bool) -> str:
        return choose_and_process(self.index.info(datum), self.plugins.hooks, place, flipped, self.index.counter)

    def _tokens(self, datum: int, caption: str) -> tuple[list[list[int]], list[list[int]]]:
        try:
            te1_ids, te2_ids, _ = self.tokenizer.tokenize(caption, self.config.max_token_length)
        except DataError as error:
            raise DataError(f"{shown(self.index.key(datum))}: {error}") from error
        return te1_ids, te2_ids

    def _pixels(self, datum: int, flipped: bool) -> NDArray[np.uint8]:
        pixels = pixels_of(self.index, datum, self.config.max_image_pixels)
        return pixels[:, ::-1] if flipped else pixels


def pixels_of(index: Index, datum: int, max_image_pixels: int) -> NDArray[np.uint8]:
    """A picture as trained: resized and cropped to its bucket. [8h, 8w, 3] uint8.

    Raises:
        DataError: it cannot be read, or has changed.
    """
    return load_pixels(index.image_paths[datum], index.placement(datum), max_image_pixels)


def assemble(fetched: FetchedBatch, index: Index, store: LatentStore | None) -> Batch:
    """Add sizes, base noise and scaled latents to what was fetched, on the CPU.

    Args:
        store: None where latents are encoded in every step.
    """
    import torch

    from sdxl_train.model.sdxl import LATENT_SCALE

    plan = fetched.plan
    width, height = plan.bucket
    data = [datum for datum, _ in plan.data]
    return Batch(
        keys=[index.key(datum) for datum in data],
        captions=fetched.captions,
        flipped=fetched.flipped,
        original_sizes=[(int(h), int(w)) for w, h in index.original_sizes[data]],
        crops=[(top, left) for left, top in map(index.crop, data, fetched.flipped)],
        target_sizes=[(height, width)] * len(data),
        data=data,
        places=fetched.places,
        te1_ids=torch.from_numpy(fetched.te1_ids),
        te2_ids=torch.from_numpy(fetched.te2_ids),
        noise=StepRandom(fetched.places, "noise").normal(LATENT_CHANNELS, height // PX_PER_LATENT, width // PX_PER_LATENT),
        latents=None if store is None else store.read(data, fetched.flipped) * LATENT_SCALE,
        pixels=None if fetched.pixels is None else torch.from_numpy(fetched.pixels).permute(0, 3, 1, 2),
        index=index,
    )
