"""What a device can do at best, and how much memory a run has taken."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense TFLOP/s of matrix products in bf16 (fp16 where a card has no bf16), accumulated in float32, from the makers' data sheets.
_PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "H200": 989, "H200 NVL": 835, "GH200": 989, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "H800": 989, "H800 PCIe": 756, "H20": 148, "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10": 125, "A10G": 70, "L40S": 362,
    "L40": 181, "L4": 121, "V100": 125, "T4": 65,
    "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX A5000": 111, "RTX PRO 6000": 504,
    "RTX 5090": 209, "RTX 5080": 113, "RTX 5070 Ti": 88, "RTX 5070": 62,
    "RTX 4090": 165, "RTX 4080 SUPER": 104, "RTX 4080": 97, "RTX 4070 Ti": 80, "RTX 4070": 58,
    "RTX 3090 Ti": 80, "RTX 3090": 71, "RTX 3080": 60, "RTX 3070": 41,
    "MI300X": 1307, "MI325X": 1307, "MI250X": 383,
}  # fmt: skip
# Parts and slower kinds of a card, of which the name tells no figure.
_OTHER_KINDS = frozenset({"LAPTOP", "MAX", "MIG"})


def peak_flops(name: str) -> float | None:
    """Dense bf16 operations a second of a device by its name, as `torch.cuda.get_device_name` gives it; None where it is not known."""
    words = set(name.upper().replace("-", " ").split())
    if _OTHER_KINDS & words:
        return None
    found = [card for card in _PEAK_TFLOPS if words.issuperset(card.upper().split())]
    return _PEAK_TFLOPS[max(found, key=lambda card: len(card.split()))] * 1e12 if found else None


def device_peak_flops(device: torch.device) -> float | None:
    """`peak_flops` of a CUDA device; None for others."""
    import torch

    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> tuple[str, int] | None:
    """("peak", bytes that torch has had allocated on a CUDA device at most), else ("rss", the same of the process in memory).

    None on Windows without CUDA. Does not wait for the device.
    """
    if device.type == "cuda":
        import torch

        return "peak", torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return "rss", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
