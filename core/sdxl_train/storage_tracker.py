"""Counts what operations do on the meta device: the memory that is alive, floating-point operations, kernels, and reads by the host."""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

TEMPORARY = "activations"  # what belongs to no other part: activations, and what an operation or the optimizer needs for a moment

_ATEN = torch.ops.aten
_MODES = ("storage_tracker", "cuda_stand_in")  # what computes for others
_READS = frozenset({_ATEN._local_scalar_dense.default, _ATEN.nonzero.default, _ATEN.is_nonzero.default, _ATEN.equal.default})
# These compute the scores a second time, which is no operation of the model.
_FUSED_BACKWARD = frozenset({_ATEN._scaled_dot_product_flash_attention_backward, _ATEN._scaled_dot_product_efficient_attention_backward})
_FUSED_PRODUCTS, _MODEL_PRODUCTS = 5, 4
_ALLOCATIONS = frozenset({_ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN.empty_strided.default, _ATEN._unsafe_view.default})


class StorageTracker(TorchDispatchMode):
    """
    Attributes:
        live, peak: bytes by part, now and when their sum was largest. No allocator rounds them up.
        flops: multiplications and additions of matrix products and convolutions; those of gradient checkpointing's second pass too.
        num_kernels: operations that a device would run; views and allocations are none.
        reads: where the host asked for a value, which drains the queue of a device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.flops = 0
        self.num_kernels = 0
        self.reads: list[str] = []
        self._total = 0
        self._peak_total = 0
        self._parts: dict[int, tuple[str, int, weakref.ref[Any]]] = {}

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count the memory of tensors under a part from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._parts.get(id(storage))
            if known is None:
                self._add(storage, part)
            else:
                before, size, reference = known
                self.live[before] -= size
                self.live[part] += size
                self._parts[id(storage)] = part, size, reference

    def reset_peak(self) -> None:
        """Begin to count anew; what is alive stays."""
        self._peak_total, self.peak = self._total, dict(self.live)
        self.flops = self.num_kernels = 0
        self.reads.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS and any(isinstance(arg, Tensor) and arg.is_meta for arg in args):
            return self._read(func, args)
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            flops = count(*args, **kwargs, out_val=out)
            self.flops += flops * _MODEL_PRODUCTS // _FUSED_PRODUCTS if func._overloadpacket in _FUSED_BACKWARD else flops
        leaves = (out,) if isinstance(out, Tensor) else tree_leaves(out)
        made = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_meta]
        if made and not func.is_view and func not in _ALLOCATIONS:
            self.num_kernels += 1
        for tensor in made:
            storage = tensor.untyped_storage()
            if id(storage) not in self._parts:
                self._add(storage, TEMPORARY)
        return out

    def _read(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Note a read, and answer ones so that the step goes on."""
        here = Path(__file__).parent
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).stem not in _MODES]
        ours = [frame for frame in frames if here in Path(frame.filename).parents]
        frame = (ours or frames)[-1]
        self.reads.append(f"{Path(frame.filename).name}:{frame.lineno} ({func._overloadpacket.__name__})")
        if func is _ATEN.nonzero.default:
            return torch.zeros(1, args[0].dim(), dtype=torch.int64, device="meta")
        return torch.ones((), dtype=args[0].dtype).item() if func is _ATEN._local_scalar_dense.default else True

    def _add(self, storage: Any, part: str) -> None:
        size, key = storage.nbytes(), id(storage)
        self._parts[key] = part, size, weakref.ref(storage, lambda _: self._remove(key))
        self.live[part] += size
        self._total += size
        if self._total > self._peak_total:
            self._peak_total, self.peak = self._total, dict(self.live)

    def _remove(self, key: int) -> None:
        part, size, _ = self._parts.pop(key)
        self.live[part] -= size
        self._total -= size
