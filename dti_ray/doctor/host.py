"""Shared memory, open files and disks of the machines that a run will use.

Stage: a check. In: `Host`s. Out: `Check`s; of several machines the worst one is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dti_ray.doctor.check import Check, Status, failed, passed, size, skipped, warned, worst
from dti_ray.doctor.machine import Disk, Machine

GIB = 2**30
NCCL_SHARED_BYTES = GIB  # GPUs of one machine talk through it; a container has 64 MB unless told otherwise
MUST_BE_IN_SHARED_MEMORY = 10 * 10**9  # Ray starts no larger object store elsewhere
ENOUGH_OPEN_FILES, FEW_OPEN_FILES = 8_192, 1_024
FULL = 0.95  # Ray creates no objects on a disk that is fuller
MORE_SHARED = "mount a larger /dev/shm: in Kubernetes an emptyDir with medium: Memory, in Docker --shm-size"


@dataclass(frozen=True)
class Demand:
    """Bytes that will be wanted on a disk."""

    disk: Disk
    size_bytes: int
    what: str


@dataclass(frozen=True)
class Host:
    """A machine, and what will run on it.

    Attributes:
        machine: as it answered.
        object_store_bytes: of Ray's object store there.
        runs_ray: whether that object store is there already.
        workers: training workers that it may hold.
        kept: states below a storage root that is a folder of it; None where there is none.
    """

    machine: Machine
    object_store_bytes: int
    runs_ray: bool
    workers: int
    kept: Demand | None = None


def check_shared_memory(hosts: Sequence[Host], with_gpus: bool) -> Check:
    """Hold /dev/shm against the object store, and against what NCCL takes."""
    return _worst_of([(host, _shared_memory(host, with_gpus)) for host in hosts])


def check_open_files(hosts: Sequence[Host]) -> Check:
    """Hold the limit of open files against what Ray asks for."""
    return _worst_of([(host, _open_files(host.machine.open_files)) for host in hosts])


def check_disks(hosts: Sequence[Host], state_bytes: int | None) -> Check:
    """Hold free disk against spilled objects, states that are restored, and states that are kept.

    Args:
        hosts: the machines.
        state_bytes: of one state of the run; None where it is not known.
    """
    return _worst_of(
        [(host, _disks(_demands(host, state_bytes), host.machine.ray, state_bytes is None)) for host in hosts]
    )


def _shared_memory(host: Host, with_gpus: bool) -> Check:
    name, shared = "shared memory", host.machine.shared
    if shared is None:
        return skipped(name, "this system has no /dev/shm")
    store, there = host.object_store_bytes, shared.total_bytes if host.runs_ray else shared.free_bytes
    found = f"{shared.path} has {size(there)}, the object store wants {size(store)}"
    if there < store:
        if store > MUST_BE_IN_SHARED_MEMORY and not host.runs_ray:
            return failed(name, f"{found}: Ray will not start", MORE_SHARED)
        return warned(name, f"{found}: Ray keeps it on disk, which is slow", MORE_SHARED)
    if with_gpus and host.workers > 1 and shared.total_bytes < NCCL_SHARED_BYTES:
        return warned(name, f"{shared.path} has {size(there)}; NCCL between GPUs may run out of it", MORE_SHARED)
    return passed(name, found)


def _open_files(limit: int | None) -> Check:
    name = "open files"
    if limit is None:
        return skipped(name, "this system has no such limit")
    found, advice = f"{limit:,} for a process", f"raise the hard limit to {ENOUGH_OPEN_FILES:,} at least (ulimit -Hn)"
    if limit < FEW_OPEN_FILES:
        return failed(name, found, advice)
    return warned(name, found, advice) if limit < ENOUGH_OPEN_FILES else passed(name, found)


def _demands(host: Host, state_bytes: int | None) -> list[Demand]:
    restored = (state_bytes or 0) * host.workers
    return [
        Demand(host.machine.ray, host.object_store_bytes, "objects that Ray spills"),
        Demand(host.machine.temp, restored, f"a state for each of {host.workers} workers, to go on from"),
        *([host.kept] if host.kept is not None else []),
    ]


def _disks(demands: Sequence[Demand], ray: Disk, is_state_unknown: bool) -> Check:
    by_device: dict[int, list[Demand]] = {}
    for demand in demands:
        by_device.setdefault(demand.disk.device, []).append(demand)
    checks = [_disk(wanted) for wanted in by_device.values()]
    if ray.free_bytes < (1 - FULL) * ray.total_bytes:
        found = f"{ray.path} is on a disk that is {1 - ray.free_bytes / ray.total_bytes:.0%} full"
        checks.append(failed("disk", f"{found}; Ray stores nothing above {FULL:.0%}", "make room, or set RAY_TMPDIR"))
    check = worst(checks)
    if check.status is Status.PASS:
        unknown = "; states not counted, as the model is not known" if is_state_unknown else ""
        return passed("disk", f"{'; '.join(one.found for one in checks)}{unknown}")
    return check


def _disk(demands: Sequence[Demand]) -> Check:
    disk, needed = demands[0].disk, sum(demand.size_bytes for demand in demands)
    paths = ", ".join(dict.fromkeys(demand.disk.path for demand in demands))
    found = f"{paths}: {size(disk.free_bytes)} free, {size(needed)} wanted"
    parts = ", ".join(f"{size(demand.size_bytes)} {demand.what}" for demand in demands if demand.size_bytes)
    advice = "make room, or set TMPDIR and RAY_TMPDIR to a larger disk; lower checkpoint.keep_last or keep_best"
    if disk.free_bytes < needed:
        return failed("disk", f"{found} ({parts})", advice)
    if disk.free_bytes < 2 * needed:
        return warned("disk", f"{found} ({parts})", advice)
    return passed("disk", found)


def _worst_of(checks: Sequence[tuple[Host, Check]]) -> Check:
    """Return the worst check, with its machine where there are several."""
    if len(checks) == 1:
        return checks[0][1]
    by_host: Mapping[int, Host] = {id(check): host for host, check in checks}
    chosen = worst([check for _, check in checks])
    alike = sum(check.status is chosen.status for _, check in checks)
    where = by_host[id(chosen)].machine.host
    told = f"{alike} of {len(checks)} machines, such as {where}: {chosen.found}"
    return Check(chosen.name, chosen.status, told, chosen.advice)
