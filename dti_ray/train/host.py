"""The process that trains: its device, its threads, its memory allocator.

Stage: beside the loop; free of Ray and DeepSpeed. In: nothing. Out: a process that is ready to train.
"""

from __future__ import annotations

import ctypes
import logging
import sys

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's parameters, from glibc's malloc.h
KEEP_BYTES = 2**30

log = logging.getLogger(__name__)


def training_device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settle(device: torch.device, threads: int | None = None) -> None:
    """Prepare the process for training on a device.

    On CPUs glibc's allocator is told to keep what a step frees. By default it hands every large tensor back to
    the kernel, which then clears its pages anew at each use (docs/benchmarks has the measurement).

    Args:
        device: where the model will run.
        threads: of one operation on CPUs; None leaves PyTorch's choice.
    """
    if device.type != "cpu":
        return
    if threads is not None:
        torch.set_num_threads(threads)
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
        except OSError:
            log.info("no glibc: freed memory goes back to the kernel")
            return
        for parameter in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            libc.mallopt(parameter, KEEP_BYTES)
