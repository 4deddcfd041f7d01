"""What data sheets say of GPUs: the denominators of MFU and of an estimate.

Stage: beside the configuration; no torch. In: the name of a device. Out: its peak and its memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says: dense peak of the tensor cores in bf16 (FLOP/s), memory (GB)."""

    peak_flops: float
    memory_gb: int


# NVIDIA's data sheets; of a device's name the first that occurs in it is taken.
GPUS = {
    "B200": Gpu(2250e12, 180), "GH200": Gpu(989e12, 96), "H200": Gpu(989e12, 141), "H100 PCIe": Gpu(756e12, 80),
    "H100 NVL": Gpu(835e12, 94), "H100": Gpu(989e12, 80), "A100": Gpu(312e12, 80), "A30": Gpu(165e12, 24),
    "L40S": Gpu(362e12, 48), "L40": Gpu(181e12, 48), "L4": Gpu(121e12, 24), "A40": Gpu(150e12, 48),
    "A10": Gpu(125e12, 24),
}  # fmt: skip


def peak_of(name: str) -> float | None:
    """Return the peak of the GPU of that name; a slice of one (MIG) has none that a data sheet states."""
    if "MIG" in name:
        return None
    return next((gpu.peak_flops for known, gpu in GPUS.items() if re.search(rf"\b{known}\b", name)), None)
