"""An index made from plain values, for tests of what works on one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdxl_train.data.columns import NameColumn, TextColumn
from sdxl_train.data.counter import Counter
from sdxl_train.data.index import Caches, Index


def made_index(
    rows: Mapping[str, Mapping[str, Any]],
    image_paths: Sequence[str],
    image_sizes: Any,
    bucket_sizes: Any,
    num_repeats: Any = None,
    original_sizes: Any = None,
    counter: Counter | None = None,
) -> Index:
    """The index of these data in their order: {key: metadata}, with (w, h) of picture and bucket; one repeat where none are given."""
    import json

    count = len(rows)
    texts = [(row.get("caption"), row.get("description")) for row in rows.values()]
    none = NameColumn([], np.full(count, -1, np.int32))
    return Index(
        keys=TextColumn.of(rows),
        image_paths=TextColumn.of(image_paths),
        cache_paths=TextColumn.of("" for _ in rows),
        texts=TextColumn.of(json.dumps(row) for row in rows.values()),
        artists=none,
        characters=none,
        styles=none,
        qualities=none,
        folders=none,
        image_sizes=np.array(image_sizes, np.int32),
        given_sizes=np.zeros((count, 2), np.int32),
        original_sizes=np.array(image_sizes if original_sizes is None else original_sizes, np.int32),
        bucket_sizes=np.array(bucket_sizes, np.int32),
        num_repeats=np.ones(count, np.int32) if num_repeats is None else np.array(num_repeats, np.int32),
        has_caption=np.array([bool(caption and caption.strip()) for caption, _ in texts], bool),
        has_description=np.array([bool(text and text.strip()) for _, text in texts], bool),
        max_tokens=np.array([max(len(text.encode()) * (1 if text.isascii() else 3) if text else 0 for text in pair) for pair in texts], np.int32),
        num_tokens=np.full(count, -1, np.int32),
        stamps=np.zeros((count, 4), np.int64),
        is_bad=np.zeros(count, bool),
        is_decoded=np.zeros(count, bool),
        caches=Caches.unknown(count),
        shares=np.full(count, -1, np.int32),
        counter=counter or {},
    )
