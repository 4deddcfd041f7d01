"""GPUs: what their machines said of them is judged; none is needed here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dti_ray.config import load_config
from dti_ray.doctor.check import Status
from dti_ray.doctor.devices import (
    NAMES,
    Seat,
    check_bf16,
    check_gpus,
    check_kernels,
    check_memory,
    check_nccl,
    check_seats,
)
from dti_ray.doctor.machine import Cuda, Device, Question, ask

GB = 10**9
H200 = Device("NVIDIA H200", 141 * GB, 140 * GB, (9, 0))
T4 = Device("Tesla T4", 16 * GB, 15 * GB, (7, 5))
CUDA = Cuda("13.0", "2.27.5", "3.6.0", "/usr/bin/gcc", (H200, H200), is_attached=True)
SEAT = Seat("gpu-1", CUDA, 2)


def with_cuda(**changes: object) -> Seat:
    return replace(SEAT, host="gpu-2", cuda=replace(CUDA, **changes))  # pyright: ignore[reportArgumentType]


def test_sound_machines_pass_every_check() -> None:
    config = load_config([], ["cluster.gpus_per_worker=1"])
    checks = check_seats(config, [SEAT, with_cuda()], 60 * GB, "")
    assert tuple(check.name for check in checks) == NAMES
    assert {check.status for check in checks} == {Status.PASS}
    assert checks[0].found == "4 NVIDIA H200 on gpu-1, gpu-2; PyTorch for CUDA 13.0"
    assert checks[1].found == "NVIDIA H200 has 141.0 GB, a worker takes about 60.0 GB"


def test_driver_that_is_missing_is_told_in_its_own_words() -> None:
    bare = with_cuda(devices=(), trouble="Found no NVIDIA driver on your system")
    found = check_gpus([SEAT, bare])
    assert (found.status, found.found) == (Status.FAIL, "gpu-2: Found no NVIDIA driver on your system")
    config = load_config([], ["cluster.gpus_per_worker=1"])
    checks = check_seats(config, [bare], None, "")
    assert [check.status for check in checks] == [Status.FAIL, *[Status.SKIP] * 4]


def test_gpu_that_this_pytorch_has_no_kernels_for_fails() -> None:
    found = check_gpus([with_cuda(devices=(H200, replace(H200, trouble="no kernel image is available")))])
    assert found.found == "gpu-2: NVIDIA H200 cannot be used: no kernel image is available"


def test_fewer_gpus_than_counted_fail_and_mixed_ones_warn() -> None:
    short = check_gpus([replace(SEAT, gpus=8)])
    assert (short.status, short.found) == (Status.FAIL, "gpu-1 shows 2 where 8 are wanted")
    assert check_gpus([with_cuda(devices=(H200, T4))]).status is Status.WARN


@pytest.mark.parametrize(
    ("wanted", "free", "status"),
    [
        (100 * GB, 140 * GB, Status.PASS),
        (130 * GB, 140 * GB, Status.WARN),
        (150 * GB, 140 * GB, Status.FAIL),
        (100 * GB, 90 * GB, Status.WARN),
        (None, 140 * GB, Status.SKIP),
    ],
)
def test_memory_of_the_smallest_gpu_counts(wanted: int | None, free: int, status: Status) -> None:
    found = check_memory([replace(H200, free_bytes=free), replace(H200, memory_bytes=200 * GB)], wanted, "no data set")
    assert found.status is status
    assert wanted is not None or found.found == "NVIDIA H200 has 141.0 GB; no data set"


def test_old_gpu_computes_no_bf16() -> None:
    assert check_bf16([H200, T4], "fp32").status is Status.PASS
    found = check_bf16([H200, T4], "bf16")
    assert (found.status, found.found) == (Status.FAIL, "Tesla T4 has compute capability 7.5, which computes no bf16")


def test_kernels_need_triton_and_a_compiler() -> None:
    assert check_kernels([SEAT]).found == "Triton 3.6.0, /usr/bin/gcc"
    assert check_kernels([SEAT, with_cuda(triton=None)]).found == "no Triton on gpu-2"
    assert check_kernels([with_cuda(compiler=None)]).status is Status.FAIL


def test_nccl_must_be_there_and_be_one_version_and_have_a_gpu_for_each_worker() -> None:
    assert check_nccl([SEAT], workers=2, gpus_per_worker=1).status is Status.PASS
    assert check_nccl([SEAT], workers=1, gpus_per_worker=1).status is Status.SKIP
    assert check_nccl([with_cuda(nccl=None)], workers=2, gpus_per_worker=1).status is Status.FAIL
    assert check_nccl([SEAT, with_cuda(nccl="2.26.2")], workers=2, gpus_per_worker=1).found == "versions 2.26.2, 2.27.5"
    assert check_nccl([SEAT], workers=2, gpus_per_worker=0.5).status is Status.WARN


@pytest.mark.slow
def test_machine_says_why_it_has_no_gpus() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    cuda = ask(Question(with_gpus=True), limit_s=120).cuda
    assert cuda is not None
    assert cuda.devices == ()
    assert cuda.trouble
