"""What a machine says of itself: versions, memory, disks, GPUs, and whether it reaches the storage root.

Stage: below the checks of machines; runs as `python -m dti_ray.doctor.machine QUESTION`, here and on every node of a
cluster. In: a `Question` as JSON. Out: a `Machine`, one line of JSON on stdout.
Invariant: asked in a process of its own, which can be ended: a GPU driver or a file system that hangs takes nothing
else along.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from dti_ray.doctor.check import one_line
from dti_ray.doctor.packages import installed_here, versions
from dti_ray.errors import DtiRayError
from dti_ray.storage import Storage

MODULE = "dti_ray.doctor.machine"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - what is looked at
ATTACHED = Path("/dev/nvidiactl")
FRAMES = re.compile(r"Traceback \(most recent call last\):.*?(?=\b[\w.]+(Error|Exception): )")  # within a message
BETWEEN = ("The above exception was", "During handling of the above")  # two tracebacks
MOST_OPEN_FILES = 65_536  # Ray raises its own limit up to here


@dataclass(frozen=True)
class Question:
    """What a machine is asked beside the usual.

    Attributes:
        with_gpus: look at its GPUs; that imports PyTorch and takes some hundred MB of each for a second.
        root: storage root that it must be able to write; None: not asked.
        paths: files and folders that must lie there.
    """

    with_gpus: bool = False
    root: str | None = None
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """One GPU; `trouble` says why it cannot be used, or is empty."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    trouble: str = ""


@dataclass(frozen=True)
class Cuda:
    """What PyTorch can do with GPUs here.

    Attributes:
        build: CUDA version that it was built for; None: built without.
        nccl: version; None: there is none.
        triton: version; None: there is none.
        compiler: of C, that Triton finds; None: there is none.
        devices: GPUs that are visible.
        trouble: why there are none, in the driver's words; or empty.
        is_attached: the system has a GPU of NVIDIA, usable or not.
    """

    build: str | None = None
    nccl: str | None = None
    triton: str | None = None
    compiler: str | None = None
    devices: tuple[Device, ...] = ()
    trouble: str = ""
    is_attached: bool = False


@dataclass(frozen=True)
class Disk:
    """A file system, by a folder on it; `device` tells whether two folders share one."""

    path: str
    device: int
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Machine:
    """What a machine says of itself.

    Attributes:
        host: its name.
        versions: of Python and packages.
        cpus: logical ones.
        open_files: limit of one process, once Ray has raised it; None where there is none.
        shared: shared memory; None where the system has no such folder.
        temp: where states are put while they are restored.
        ray: where Ray spills and logs.
        root_trouble: why the storage root cannot be used from here; empty where it can, or nobody asked.
        missing: paths of the question that are not there.
        cuda: None where nobody asked.
    """

    host: str
    versions: dict[str, str]
    cpus: int
    open_files: int | None
    shared: Disk | None
    temp: Disk
    ray: Disk
    root_trouble: str = ""
    missing: tuple[str, ...] = ()
    cuda: Cuda | None = None


QUESTION, MACHINE = TypeAdapter(Question), TypeAdapter(Machine)


def ask(question: Question, limit_s: float, environment: Mapping[str, str] | None = None) -> Machine:
    """Ask this machine, in a process of its own.

    Args:
        question: what is asked.
        limit_s: the process is ended after so many seconds.
        environment: of the process; None: as here.

    Raises:
        TimeoutError: it did not answer in time.
        RuntimeError: it ended without an answer; with its last words.
    """
    text = QUESTION.dump_json(question).decode()
    return MACHINE.validate_json(run_module(MODULE, text, limit_s, os.environ if environment is None else environment))


def ask_as_task(question: str, limit_s: float) -> str:
    """Ask the machine that a Ray task runs on; its GPUs, too, which Ray hides from a task that takes none."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return MACHINE.dump_json(ask(QUESTION.validate_json(question), limit_s, environment)).decode()


def run_module(module: str, argument: str, limit_s: float, environment: Mapping[str, str]) -> str:
    """Run a module of this very package in a process of its own; return its last line on stdout.

    Raises:
        TimeoutError: it did not end in time, and was killed.
        RuntimeError: it failed; with its last words.
    """
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([source, *filter(None, [environment.get("PYTHONPATH")])])
    return ended_in_time([sys.executable, "-m", module, argument], limit_s, {**environment, "PYTHONPATH": path})


def ended_in_time(command: list[str], limit_s: float, environment: Mapping[str, str]) -> str:
    """Run a process and return its last line on stdout.

    Raises:
        TimeoutError: it did not end in time, and was killed.
        RuntimeError: it failed; with its last words.
    """
    try:
        done = subprocess.run(  # noqa: S603 - a process of this package
            command, capture_output=True, text=True, timeout=limit_s, env=dict(environment), check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer within {limit_s:g} s") from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise RuntimeError(last_words(done.stderr) or f"ended with code {done.returncode}")
    return lines[-1]


def last_words(stderr: str) -> str:
    """Return what ended a process, on one line: its exception and those behind it, last first; else its last line."""
    lines = stderr.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if not starts:
        return lines[-1] if lines else ""
    told = []
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        # Behind the indented frames stands the exception, whose text may have lines of its own.
        message = next((i for i in range(start + 1, stop) if not lines[i].startswith(" ")), stop)
        end = next((i for i in range(message, stop) if lines[i].startswith(BETWEEN)), stop)
        told.append(" ".join(" ".join(lines[message:end]).split()))
    return "; ".join(dict.fromkeys(FRAMES.sub("", words) for words in reversed(told) if words))


def look(question: Question) -> Machine:
    """Look at the machine of this process."""
    return Machine(
        host=socket.gethostname(),
        versions=versions(platform.python_version()),
        cpus=os.cpu_count() or 1,
        open_files=_open_files(),
        shared=disk_of(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None,
        temp=disk_of(Path(tempfile.gettempdir())),
        ray=disk_of(Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"),
        root_trouble=_root_trouble(question.root) if question.root is not None else "",
        missing=tuple(path for path in question.paths if not Path(path).exists()),
        cuda=_cuda() if question.with_gpus else None,
    )


def disk_of(path: Path) -> Disk:
    """Return the file system of a folder, or of the one that it will be made in."""
    there = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
    usage = shutil.disk_usage(there)
    return Disk(str(path), there.stat().st_dev, usage.free, usage.total)


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # no Unix
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard):
        return MOST_OPEN_FILES
    return max(soft, min(hard, MOST_OPEN_FILES))


def _root_trouble(root: str) -> str:
    try:
        Storage(root).patient(0).check_writable()
    except DtiRayError as error:
        return one_line(error)
    return ""


def _cuda() -> Cuda:
    import torch
    from torch.cuda import nccl as collectives

    is_attached = ATTACHED.exists()
    build = torch.version.cuda
    if build is None:
        return Cuda(trouble=f"PyTorch {torch.__version__} is built without CUDA", is_attached=is_attached)
    triton = installed_here("triton")
    nccl = collectives.version() if torch.distributed.is_nccl_available() else ()
    compilers = map(shutil.which, (os.environ.get("CC") or "", "gcc", "clang", "cc"))
    facts = Cuda(
        build, ".".join(map(str, nccl)) or None, triton and triton.version, next(filter(None, compilers), None),
        is_attached=is_attached,
    )  # fmt: skip
    try:
        torch.cuda.init()
        return replace(facts, devices=tuple(_device(number) for number in range(torch.cuda.device_count())))
    except (RuntimeError, AssertionError) as error:
        return replace(facts, trouble=one_line(error))


def _device(number: int) -> Device:
    """Describe a GPU, and multiply two matrices on it: whether its kernels are in this build shows only then."""
    import torch

    properties = torch.cuda.get_device_properties(number)
    capability, free_bytes, trouble = (properties.major, properties.minor), 0, ""
    try:
        free_bytes = torch.cuda.mem_get_info(number)[0]
        ones = torch.ones(64, 64, device=torch.device("cuda", number))
        torch.mm(ones, ones).sum().item()
    except RuntimeError as error:
        trouble = one_line(error)
    return Device(properties.name, properties.total_memory, free_bytes, capability, trouble)


if __name__ == "__main__":
    sys.stdout.write(MACHINE.dump_json(look(QUESTION.validate_json(sys.argv[1]))).decode() + "\n")
