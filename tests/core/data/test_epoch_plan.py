import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_train.data.epoch_plan import epoch_plan, num_batches, steps_per_epoch

ORACLES = json.loads((Path(__file__).parents[2] / "oracles.json").read_text(encoding="utf-8"))


class Columns(SimpleNamespace):
    def __len__(self):
        return len(self.num_repeats)


def columns(bucket_sizes, num_repeats) -> Any:
    return Columns(bucket_sizes=np.array(bucket_sizes, np.int32), num_repeats=np.array(num_repeats, np.int32))


def three_buckets():
    sizes = [(64, 64), (32, 96), (96, 32)]
    return columns([sizes[i % 3] for i in range(50)], [1 + i % 4 for i in range(50)])


def test_batches_of_each_bucket_have_the_published_sizes():
    for given, expected in zip(ORACLES["bucket_batches"]["inputs"], ORACLES["bucket_batches"]["expected"], strict=True):
        sides = {name: (32 * (i + 1), 32) for i, name in enumerate(given["buckets"])}
        buckets = [(sides[name], row["num_repeats"]) for name, row in given["buckets"].items() for _ in range(row["images"])]
        index = columns([size for size, _ in buckets], [repeats for _, repeats in buckets])
        plan = epoch_plan(index, 0, 1, given["batch_size"])
        found = {name: sorted((len(batch.data) for batch in plan if batch.bucket == size), reverse=True) for name, size in sides.items()}
        assert found == expected["batch_sizes"]
        assert len(plan) == num_batches(index, given["batch_size"]) == expected["batches"]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_every_datum_is_trained_num_repeats_times_in_its_own_bucket(batch_size):
    index = three_buckets()
    plan = epoch_plan(index, 3, 2, batch_size)
    seen = Counter(sample for batch in plan for sample in batch.data)
    assert seen == {(datum, occurrence): 1 for datum in range(50) for occurrence in range(1 + datum % 4)}
    assert all(tuple(index.bucket_sizes[datum]) == batch.bucket for batch in plan for datum, _ in batch.data)
    assert {batch.epoch for batch in plan} == {2}
    assert len(plan) == num_batches(index, batch_size)


def test_same_seed_and_epoch_give_the_same_batches_and_others_do_not():
    index = three_buckets()
    first = list(epoch_plan(index, 42, 1, 4))
    assert first == list(epoch_plan(index, 42, 1, 4))
    other_epoch, other_seed = list(epoch_plan(index, 42, 2, 4)), list(epoch_plan(index, 43, 1, 4))
    assert len({str([batch.data for batch in plan]) for plan in (first, other_epoch, other_seed)}) == 3


def test_members_of_a_batch_change_between_epochs_and_not_only_their_order():
    index = columns([(64, 64)] * 40, [1] * 40)
    first, second = ({frozenset(batch.data) for batch in epoch_plan(index, 42, epoch, 4)} for epoch in (1, 2))
    assert first != second


def test_buckets_are_mixed_over_the_epoch():
    index = columns([(64, 64)] * 100 + [(32, 96)] * 100, [1] * 200)
    buckets = [batch.bucket for batch in epoch_plan(index, 0, 1, 2)]
    changes = sum(a != b for a, b in itertools.pairwise(buckets))
    assert 30 < changes < 70  # about half of 99


def test_ranks_take_slices_that_are_disjoint_and_complete():
    plan = epoch_plan(three_buckets(), 1, 1, 4)
    shares = [plan[rank::3] for rank in range(3)]
    assert sum(map(len, shares)) == len(plan)
    assert sorted(sample for share in shares for batch in share for sample in batch.data) == sorted(s for batch in plan for s in batch.data)
    assert shares[1][0] == plan[1] and plan[-1] == list(plan)[-1]


def test_samples_are_plain_integers():
    datum, occurrence = epoch_plan(three_buckets(), 1, 1, 4)[0].data[0]
    assert type(datum) is int and type(occurrence) is int


def test_steps_per_epoch_as_published():
    for given, expected in zip(ORACLES["steps_per_epoch"]["inputs"], ORACLES["steps_per_epoch"]["expected"], strict=True):
        assert steps_per_epoch(given["batches"], given["gradient_accumulation_steps"], given["num_processes"]) == expected["steps"]


def test_a_million_data_are_planned_without_an_object_each():
    repeats = np.ones(1_000_000, np.int32)
    plan = epoch_plan(Columns(bucket_sizes=np.full((1_000_000, 2), 64, np.int32), num_repeats=repeats), 0, 1, 16)  # type: ignore[arg-type]
    assert len(plan) == 62_500
    assert len(plan[62_499].data) == 16
