"""Shared memory, open files and disks are held against what a run puts there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dti_ray.doctor.check import Status
from dti_ray.doctor.host import Demand, Host, check_disks, check_open_files, check_shared_memory
from dti_ray.doctor.machine import Disk, Machine, disk_of

GB = 10**9
ROOMY = Disk("/tmp", 1, 500 * GB, 1000 * GB)
MACHINE = Machine("a", {}, 8, 65_536, Disk("/dev/shm", 2, 16 * GB, 16 * GB), ROOMY, replace(ROOMY, path="/tmp/ray"))
HOST = Host(MACHINE, object_store_bytes=4 * GB, runs_ray=False, workers=2)


def with_shared(free: int, total: int, store: int = 4 * GB, runs_ray: bool = False) -> Host:
    machine = replace(MACHINE, shared=Disk("/dev/shm", 2, free, total))
    return replace(HOST, machine=machine, object_store_bytes=store, runs_ray=runs_ray)


def test_object_store_that_fits_passes() -> None:
    found = check_shared_memory([HOST], with_gpus=True)
    assert (found.status, found.found) == (Status.PASS, "/dev/shm has 16.0 GB, the object store wants 4.0 GB")


def test_containers_default_is_too_small_and_the_remedy_is_named() -> None:
    found = check_shared_memory([with_shared(64 << 20, 64 << 20)], with_gpus=False)
    assert found.status is Status.WARN
    assert "/dev/shm has 67.1 MB" in found.found
    assert "emptyDir" in found.advice


def test_large_object_store_without_room_is_what_ray_refuses() -> None:
    assert check_shared_memory([with_shared(GB, 16 * GB, 12 * GB)], with_gpus=False).status is Status.FAIL
    running = with_shared(GB, 16 * GB, 12 * GB, runs_ray=True)
    assert check_shared_memory([running], with_gpus=False).status is Status.PASS, "it lies there already"


def test_gpus_of_one_machine_need_shared_memory_beside_the_object_store() -> None:
    host = with_shared(500 << 20, 500 << 20, store=100 << 20)
    assert check_shared_memory([host], with_gpus=False).status is Status.PASS
    assert check_shared_memory([host], with_gpus=True).status is Status.WARN
    assert check_shared_memory([replace(host, workers=1)], with_gpus=True).status is Status.PASS


def test_system_without_shared_memory_is_skipped() -> None:
    host = replace(HOST, machine=replace(MACHINE, shared=None))
    assert check_shared_memory([host], with_gpus=False).status is Status.SKIP


@pytest.mark.parametrize(
    ("limit", "status"), [(65_536, Status.PASS), (4_096, Status.WARN), (256, Status.FAIL), (None, Status.SKIP)]
)
def test_limit_of_open_files(limit: int | None, status: Status) -> None:
    assert check_open_files([replace(HOST, machine=replace(MACHINE, open_files=limit))]).status is status


def test_worst_machine_of_several_is_named() -> None:
    low = replace(HOST, machine=replace(MACHINE, host="b", open_files=256))
    found = check_open_files([HOST, low, HOST])
    assert (found.status, found.found) == (Status.FAIL, "1 of 3 machines, such as b: 256 for a process")
    assert check_open_files([HOST, HOST]).found == "2 of 2 machines, such as a: 65,536 for a process"


def test_demands_on_one_disk_are_added() -> None:
    tight = Disk("/tmp", 1, 60 * GB, 100 * GB)
    machine = replace(MACHINE, temp=tight, ray=replace(tight, path="/tmp/ray"))
    host = replace(HOST, machine=machine)
    assert check_disks([host], 10 * GB).status is Status.PASS
    found = check_disks([host], 14 * GB)
    assert (found.status, found.found.partition(" (")[0]) == (
        Status.WARN,
        "/tmp/ray, /tmp: 60.0 GB free, 32.0 GB wanted",
    )
    kept = Demand(replace(tight, path="/data"), 40 * GB, "4 states that are kept")
    full = check_disks([replace(host, kept=kept)], 10 * GB)
    assert full.status is Status.FAIL
    assert full.found == (
        "/tmp/ray, /tmp, /data: 60.0 GB free, 64.0 GB wanted (4.0 GB objects that Ray spills, "
        "20.0 GB a state for each of 2 workers, to go on from, 40.0 GB 4 states that are kept)"
    )
    elsewhere = replace(kept, disk=replace(kept.disk, device=9))
    assert check_disks([replace(host, kept=elsewhere)], 10 * GB).status is Status.WARN, "60 GB are free there, too"


def test_state_of_unknown_size_is_said() -> None:
    assert "states not counted" in check_disks([HOST], None).found


def test_disk_that_is_too_full_for_ray_fails_whatever_is_wanted() -> None:
    full = Disk("/tmp/ray", 1, 40 * GB, 1000 * GB)
    found = check_disks([replace(HOST, machine=replace(MACHINE, ray=full))], None)
    assert (found.status, found.advice) == (Status.FAIL, "make room, or set RAY_TMPDIR")
    assert "96% full" in found.found


def test_disk_of_a_folder_to_come_is_that_of_its_parent(tmp_path: Path) -> None:
    here, to_come = disk_of(tmp_path), disk_of(tmp_path / "one" / "two")
    assert (to_come.device, to_come.total_bytes) == (here.device, here.total_bytes)
    assert to_come.path == str(tmp_path / "one" / "two")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_file_system_in_memory_is_another_device(tmp_path: Path) -> None:
    assert disk_of(Path("/dev/shm")).device != disk_of(Path("/proc")).device
