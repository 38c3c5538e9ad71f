"""How many drawn pictures are recognised: a measure of whether a model knows what its prompts mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

SIDE_PX = 16


@dataclass(frozen=True)
class Retrieval:
    """What `retrieval_accuracy` found. As a string it is one line for a log.

    Attributes:
        nearest: for each sample, in order: its prompt, and the prompt of the reference nearest to it.
        num_references: how many there were to choose from.
    """

    nearest: tuple[tuple[str, str], ...]
    num_references: int

    @property
    def num_right(self) -> int:
        return sum(prompt == found for prompt, found in self.nearest)

    @property
    def accuracy(self) -> float:
        """The share of samples that are nearest to the reference of their own prompt, in [0, 1]."""
        return self.num_right / len(self.nearest)

    @property
    def chance(self) -> float:
        """The accuracy that guessing has on average: 1 / the number of references."""
        return 1 / self.num_references

    def __str__(self) -> str:
        of = f"{self.num_right} of {len(self.nearest)} samples recognised among {self.num_references} pictures"
        return f"{of}: {self.accuracy:.1%} (chance {self.chance:.1%})"


def retrieval_accuracy(samples: Iterable[tuple[str, Image]], references: Mapping[str, Image]) -> Retrieval:
    """The share of samples whose nearest reference is the one of their prompt. Deterministic: draw the samples from fixed seeds.

    The distance of two pictures is the mean of (a - b)^2 over the three colours of 16 x 16 pixels: each is put on white where it is
    transparent and reduced to that size by averaging areas, whatever its shape. So it sees where colours are, not details. Of
    references equally near, the first one counts. It is the retrieval of the first rank, as R-precision has it for text and pictures
    (Xu et al. 2018, AttnGAN, arXiv:1711.10485), with plain pixels in place of a trained encoder.

    Args:
        samples: (prompt, picture) of each; a prompt may come with several seeds. Any size and mode that Pillow knows.
        references: the picture of every prompt that may be answered; more of them make it harder.
    Returns:
        accuracy and chance level, both in [0, 1], and what was taken for what.
    Raises:
        ValueError: no samples, no references, or a sample whose prompt has no reference.
    """
    import numpy as np

    samples = list(samples)
    if not samples or not references:
        raise ValueError(f"retrieval needs samples and references, got {len(samples)} and {len(references)}")
    if missing := [prompt for prompt, _ in samples if prompt not in references]:
        raise ValueError(f"{len(missing)} samples have a prompt without a reference, such as {missing[0]!r}")
    prompts = list(references)
    known = np.stack([_reduced(references[prompt]) for prompt in prompts])  # [R, SIDE_PX, SIDE_PX, 3]
    nearest = tuple(
        (prompt, prompts[int(np.square(known - _reduced(picture)).mean(axis=(1, 2, 3)).argmin())]) for prompt, picture in samples
    )
    return Retrieval(nearest, len(prompts))


def _reduced(picture: Image) -> NDArray[np.float64]:
    """[SIDE_PX, SIDE_PX, 3] in [0, 1]."""
    import numpy as np
    from PIL import Image

    coloured = picture.convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return np.asarray(on_white.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX), dtype=np.float64) / 255
