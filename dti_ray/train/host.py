"""The process that trains: its device, its threads, its memory allocator, the signal that ends it.

Stage: beside the loop; free of Ray and DeepSpeed. In: nothing. Out: a process that is ready to train.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
import threading
from types import FrameType

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's parameters, from glibc's malloc.h
KEEP_BYTES = 2**30
OLD_GLIBC_BYTES = 2**25  # what releases before 2.35 take at most

log = logging.getLogger(__name__)
sigterm = threading.Event()  # set in the main thread, read by the loop's


def training_device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settle(device: torch.device, threads: int | None = None) -> None:
    """Prepare the process for training on a device.

    On CPUs glibc's allocator is told to keep what a step frees. By default it hands every large tensor back to
    the kernel, which then clears its pages anew at each use. In threads other than the main one, Ray's workers among
    them, that holds for tensors of up to about 48 MB.

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
        if not (libc.mallopt(MMAP_THRESHOLD, KEEP_BYTES) or libc.mallopt(MMAP_THRESHOLD, OLD_GLIBC_BYTES)):
            log.info("the allocator takes no threshold: freed memory goes back to the kernel")
            return
        libc.mallopt(TRIM_THRESHOLD, KEEP_BYTES)


def hear_sigterm() -> None:
    """Take the first SIGTERM as notice that this machine will go away, and leave the next one to Ray."""
    before = signal.getsignal(signal.SIGTERM)

    def notice(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        sigterm.set()

    signal.signal(signal.SIGTERM, notice)
