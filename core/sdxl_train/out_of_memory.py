"""A batch that does not fit into memory, said in words that help: which bucket, how many pictures, and what needs less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sdxl_train.errors import SdxlTrainError

if TYPE_CHECKING:
    from sdxl_train.data.batches import Batch

# What torch's allocators say that have no exception class of their own.
_SAID = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory")


@contextmanager
def naming_the_bucket(batch: Batch) -> Iterator[None]:
    """Around the passes of a batch.

    Raises:
        SdxlTrainError: the memory did not suffice, also inside a plugin.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        height, width = batch.target_sizes[0]
        raise SdxlTrainError(
            f"out of memory in the bucket {width}x{height} with batch_size {len(batch)}: a smaller batch_size (with more "
            "gradient_accumulation_steps), gradient_checkpointing = true, fused_backward = true or a lower resolution needs less. "
            f"What was said: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised from, says that memory could not be had."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID):
            return True
        error = error.__cause__
    return False
