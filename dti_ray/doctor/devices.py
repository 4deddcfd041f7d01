"""GPUs of the machines that will train: there, usable, large enough, able to talk to each other.

Stage: a check. In: what machines said of their GPUs. Out: `Check`s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dti_ray.config import RunConfig
from dti_ray.doctor.check import Check, check, check_all, failed, passed, size, skipped, warned
from dti_ray.doctor.machine import Cuda, Device, Machine

NAMES = ("gpus", "gpu memory", "bf16", "kernels", "nccl")
LIMIT_S = 10.0
FIRST_WITH_BF16 = (8, 0)
MARGIN = 0.9  # of a GPU's memory; the rest goes to CUDA itself, to NCCL, and to pieces between allocations


@dataclass(frozen=True)
class Seat:
    """A machine with GPUs.

    Attributes:
        host: its name.
        cuda: as it answered.
        gpus: that Ray counts there, or that the run wants there.
    """

    host: str
    cuda: Cuda
    gpus: float


def seat(machine: Machine, gpus: float) -> Seat:
    """Return a machine's GPUs, and how many must be there."""
    assert machine.cuda is not None, "it was asked for them"
    return Seat(machine.host, machine.cuda, gpus)


def check_seats(config: RunConfig, seats: Sequence[Seat], memory_bytes: int | None, unknown: str) -> list[Check]:
    """Check all that concerns GPUs.

    Args:
        config: of the run.
        seats: machines with GPUs.
        memory_bytes: of one worker, estimated; None where it cannot be.
        unknown: why not.
    """
    usable = [one for one in seats if one.cuda.devices and not one.cuda.trouble]
    first = check("gpus", LIMIT_S, lambda: check_gpus(seats))
    if not usable:
        return [first, *skip_all("no GPU can be used", NAMES[1:])]
    devices, cluster = [device for one in usable for device in one.cuda.devices], config.cluster
    rest: dict[str, Callable[[], Check]] = {
        "gpu memory": lambda: check_memory(devices, memory_bytes, unknown),
        "bf16": lambda: check_bf16(devices, config.train.precision),
        "kernels": lambda: check_kernels(usable),
        "nccl": lambda: check_nccl(usable, cluster.workers, cluster.gpus_per_worker),
    }
    return [first, *check_all(LIMIT_S, rest)]


def skip_all(reason: str, names: Sequence[str] = NAMES) -> list[Check]:
    """Return the checks that nobody made."""
    return [skipped(name, reason) for name in names]


def check_gpus(seats: Sequence[Seat]) -> Check:
    """Say which GPUs there are, and which of them cannot be used."""
    name, advice = "gpus", "install the driver, a build of PyTorch for its CUDA, and Kubernetes' device plugin"
    troubles = [f"{one.host}: {one.cuda.trouble}" for one in seats if one.cuda.trouble]
    troubles += [
        f"{one.host}: {device.name} cannot be used: {device.trouble}"
        for one in seats
        for device in one.cuda.devices
        if device.trouble
    ]
    if troubles:
        return failed(name, "; ".join(troubles), advice)
    short = [one for one in seats if len(one.cuda.devices) < one.gpus]
    if short:
        told = ", ".join(f"{one.host} shows {len(one.cuda.devices)} where {one.gpus:g} are wanted" for one in short)
        return failed(name, told, "lower cluster.workers or gpus_per_worker, or see CUDA_VISIBLE_DEVICES there")
    kinds = Counter(device.name for one in seats for device in one.cuda.devices)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    builds = ", ".join(sorted({one.cuda.build or "" for one in seats}))
    found = f"{told} on {', '.join(one.host for one in seats)}; PyTorch for CUDA {builds}"
    if len(kinds) > 1:
        return warned(name, f"{found}: the slowest one sets the pace", "train on GPUs of one kind")
    return passed(name, found)


def check_memory(devices: Sequence[Device], memory_bytes: int | None, unknown: str) -> Check:
    """Hold the smallest GPU against what a worker is estimated to take."""
    name, smallest = "gpu memory", min(devices, key=lambda device: device.memory_bytes)
    has = f"{smallest.name} has {size(smallest.memory_bytes)}"
    if memory_bytes is None:
        return skipped(name, f"{has}; {unknown}")
    found = f"{has}, a worker takes about {size(memory_bytes)}"
    advice = "lower train.rows_per_pass or packing.row_tokens, raise train.zero_stage, or model.gradient_checkpointing"
    if memory_bytes > smallest.memory_bytes:
        return failed(name, found, advice)
    if memory_bytes > MARGIN * smallest.memory_bytes:
        return warned(name, f"{found}: that is close", advice)
    fullest = min(devices, key=lambda device: device.free_bytes)
    if memory_bytes > fullest.free_bytes:
        told = f"{fullest.name} has {size(fullest.free_bytes)} free now, a worker takes about {size(memory_bytes)}"
        return warned(name, told, "wait for what runs there, or end it")
    return passed(name, found)


def check_bf16(devices: Sequence[Device], precision: str) -> Check:
    """Hold the oldest GPU against `train.precision`."""
    oldest = min(devices, key=lambda device: device.capability)
    found = f"{oldest.name} has compute capability {'.'.join(map(str, oldest.capability))}"
    if oldest.capability >= FIRST_WITH_BF16:
        return passed("bf16", found)
    if precision == "bf16":
        return failed("bf16", f"{found}, which computes no bf16", "set train.precision=fp32, or take an A100 or newer")
    return passed("bf16", f"{found}; train.precision is {precision}")


def check_kernels(seats: Sequence[Seat]) -> Check:
    """Look for what compiles FlexAttention's kernels: Triton, and the C compiler that it calls."""
    name = "kernels"
    if found := _where(seats, lambda cuda: cuda.triton is None):
        return failed(name, f"no Triton on {found}", "install the PyTorch build that brings it, or pip install triton")
    if found := _where(seats, lambda cuda: cuda.compiler is None):
        return failed(name, f"no C compiler on {found}, which Triton calls", "install gcc there, or set CC")
    return passed(name, f"Triton {_all(seats, lambda cuda: cuda.triton)}, {_all(seats, lambda cuda: cuda.compiler)}")


def check_nccl(seats: Sequence[Seat], workers: int, gpus_per_worker: float) -> Check:
    """Look for NCCL, one version of it everywhere, and a GPU of its own for each worker."""
    name = "nccl"
    if workers == 1:
        return skipped(name, "one worker talks to nobody")
    if found := _where(seats, lambda cuda: cuda.nccl is None):
        return failed(name, f"PyTorch has none on {found}", "install a CUDA build of PyTorch for Linux")
    found = _all(seats, lambda cuda: cuda.nccl)
    if len({one.cuda.nccl for one in seats}) > 1:
        return warned(name, f"versions {found}", "use one image for all nodes")
    if gpus_per_worker < 1:
        told = f"{found}, which refuses two workers on one GPU; cluster.gpus_per_worker is {gpus_per_worker:g}"
        return warned(name, told, "set cluster.gpus_per_worker=1")
    return passed(name, found)


def _where(seats: Sequence[Seat], is_bad: Callable[[Cuda], bool]) -> str:
    return ", ".join(one.host for one in seats if is_bad(one.cuda))


def _all(seats: Sequence[Seat], value: Callable[[Cuda], str | None]) -> str:
    return ", ".join(sorted({value(one.cuda) or "" for one in seats}))
