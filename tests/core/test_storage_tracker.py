"""What the tracker counts of operations on the meta device, checked on a few of them."""

import torch
import torch.nn.functional as F

from sdxl_train.cuda_stand_in import CudaStandIn
from sdxl_train.storage_tracker import TEMPORARY, StorageTracker

MIB = 2**20


def test_memory_is_counted_while_it_is_alive_and_views_are_not() -> None:
    with StorageTracker() as tracker:
        kept = torch.empty(MIB, dtype=torch.uint8, device="meta")
        rows = kept.view(1024, 1024)[:512].transpose(0, 1)
        assert tracker.live.total() == MIB
        for _ in range(3):
            torch.zeros(2 * MIB, dtype=torch.uint8, device="meta")
        assert tracker.live.total() == MIB and tracker.peak == {TEMPORARY: 3 * MIB}
        del kept
        assert tracker.live.total() == MIB
        del rows
        assert tracker.live.total() == 0


def test_memory_is_counted_under_the_part_it_is_assigned_to() -> None:
    weight = torch.nn.Parameter(torch.empty(256, 256, device="meta"))
    with StorageTracker() as tracker:
        tracker.assign([weight], "weights")
        out = weight @ weight
        assert tracker.live == {"weights": 256 * 256 * 4, TEMPORARY: 256 * 256 * 4}
        tracker.assign([out], "results")
        assert tracker.live == {"weights": 256 * 256 * 4, TEMPORARY: 0, "results": 256 * 256 * 4}


def test_operations_and_kernels_are_counted() -> None:
    a, b = torch.empty(8, 16, device="meta"), torch.empty(16, 4, device="meta")
    with StorageTracker() as tracker:
        (a @ b).relu().view(32)[:3]
    assert tracker.flops == 2 * 8 * 16 * 4 and tracker.num_kernels == 2


def test_a_read_by_the_host_is_found_and_does_not_end_the_step() -> None:
    values = torch.empty(3, device="meta")
    with StorageTracker() as tracker:
        assert values.sum().item() == 1.0
        assert bool(values.isfinite().all())
        torch.tensor([1.0, 2.0]).sum().item()  # on the CPU nothing waits
    assert len(tracker.reads) == 2


def test_autocast_is_that_of_cuda_and_its_copies_of_weights_are_kept_only_with_its_cache() -> None:
    weight = torch.nn.Parameter(torch.empty(64, 64, device="meta"))
    x = torch.empty(2, 64, device="meta")
    for cache, copies in ((True, 1), (False, 2)):
        found: list[torch.Tensor] = []
        with CudaStandIn(found.append) as cuda, cuda.autocast(torch.bfloat16, True, cache):
            out = F.linear(F.linear(x, weight), weight)
            assert out.dtype is torch.bfloat16 and F.layer_norm(out, (64,)).dtype is torch.float32
        assert len(found) == copies and found[0].dtype is torch.bfloat16
    with CudaStandIn(found.append):
        assert F.linear(x, weight).dtype is torch.float32


def test_attention_keeps_no_matrix_of_scores() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.empty(1, 1, 4096, 64, device="meta", dtype=dtype, requires_grad=True)
        with StorageTracker() as tracker, CudaStandIn(lambda copy: None):
            F.scaled_dot_product_attention(q, q, q).sum().backward()
        assert q.grad is not None and tracker.peak[TEMPORARY] < 4096 * 4096 / 2
        assert tracker.flops == 3 * 2 * 2 * 4096 * 4096 * 64  # as products of matrices; the backward pass is twice the forward pass
