"""The storage root: can it be listed, written, read and deleted, how fast, and does its clock agree with ours.

Stage: a check. In: a root. Out: `Check`s. Nothing that it wrote stays there.
"""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from dti_ray.doctor.check import Check, failed, passed, warned
from dti_ray.errors import Fault, StorageError
from dti_ray.storage import Storage

TIMES = 5
VERBS = ("list", "write", "read", "delete")
SLOW_MS = 1_000
STAMP_S = 1.0  # object stores stamp whole seconds
SKEW_S, REFUSED_SKEW_S = 5.0, 900.0  # S3 refuses signatures that are a quarter of an hour off


@dataclass(frozen=True)
class Reach:
    """How a root answered.

    Attributes:
        ms: median of each of `VERBS`, milliseconds.
        skew_s: how far its clock is ahead of ours, as far as its stamps tell; None where it states no time.
    """

    ms: dict[str, float]
    skew_s: float | None


def folder_of(root: str) -> Path | None:
    """Return the folder that a root is, which other machines need not see; None of an object store's."""
    parts = urlsplit(root)
    return Path(parts.path if parts.scheme else root) if parts.scheme in ("", "file") else None


def reach(root: str, times: int = TIMES) -> Reach:
    """List, write, read back and delete a probe, some times; nothing is tried again.

    Raises:
        StorageError: one of them failed.
    """
    storage = Storage(root).patient(0)
    ms: dict[str, list[float]] = {verb: [] for verb in VERBS}
    skews: list[float] = []
    with _tidy(storage):
        for _ in range(times):
            skew_s = _once(storage, ms)
            skews += [] if skew_s is None else [skew_s]
    skew_s = min(skews, key=abs) if skews else None  # what took long is stamped least exactly
    return Reach({verb: statistics.median(taken) for verb, taken in ms.items()}, skew_s)


def check_reach(root: str, found: Reach) -> Check:
    """Say how fast a root answers."""
    told = ", ".join(f"{verb} {found.ms[verb]:.0f} ms" for verb in VERBS)
    told = f"{root.partition('?')[0]}: {told} (medians of {TIMES})"
    slow = [verb for verb in VERBS if found.ms[verb] > SLOW_MS]
    if slow:
        return warned("storage", told, "states and shards wait for this: take a bucket near the machines")
    return passed("storage", told)


def with_endpoint(root: str, refusal: Check, environment: Mapping[str, str]) -> Check:
    """Add to a failed check where an S3 root was looked for."""
    parts = urlsplit(root)
    if parts.scheme != "s3":
        return refusal
    endpoint = parse_qs(parts.query).get("endpoint_override", [environment.get("AWS_ENDPOINT_URL", "")])[0]
    where = endpoint or "Amazon's, as AWS_ENDPOINT_URL is not set"
    return replace(refusal, advice=f"{refusal.advice}; the endpoint is {where}")


def check_clock(skew_s: float | None) -> Check:
    """Judge how far the storage's clock is from ours."""
    name = "clock"
    if skew_s is None:
        return warned(name, "the storage does not say when a file was written", "see that this machine's clock is set")
    found = "agrees with the storage's" if skew_s == 0 else f"{abs(skew_s):,.0f} s {_side(skew_s)} the storage's"
    advice = "set this machine's clock: run an NTP client (chrony, systemd-timesyncd)"
    if abs(skew_s) > REFUSED_SKEW_S:
        return failed(name, f"{found}: object stores refuse such requests", advice)
    return warned(name, found, advice) if abs(skew_s) > SKEW_S else passed(name, found)


def skew(start_s: float, end_s: float, stamp_s: float) -> float:
    """Return how far a stamp lies outside the time in which its file was written; 0 inside.

    Args:
        start_s: our clock before the write.
        end_s: our clock after it.
        stamp_s: the storage's time of the write, perhaps cut to a whole second.
    """
    return max(0.0, stamp_s - end_s) + min(0.0, stamp_s + STAMP_S - start_s)


@contextmanager
def marker(storage: Storage) -> Iterator[str]:
    """Let a file lie below a root that is a folder; yields its full path."""
    path = _probe()
    with _tidy(storage):
        storage.write(path, b"")
        try:
            yield storage.path(path)
        finally:
            storage.delete(path)


def _once(storage: Storage, ms: dict[str, list[float]]) -> float | None:
    path, content = _probe(), uuid.uuid4().bytes
    with _timed(ms["list"]):
        storage.list("")
    before_s = time.time()
    with _timed(ms["write"]):
        storage.write(path, content)
    after_s, stamp = time.time(), storage.infos([path])[0].mtime
    with _timed(ms["read"]):
        read = storage.read(path)
    with _timed(ms["delete"]):
        storage.delete(path)
    if read != content:
        raise StorageError(Fault(storage.display(path), "returned other bytes than were written"))
    return None if stamp is None else skew(before_s, after_s, stamp.timestamp())


@contextmanager
def _timed(to: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    to.append((time.perf_counter() - start) * 1e3)


@contextmanager
def _tidy(storage: Storage) -> Iterator[None]:
    """Remove the folders that a first write makes, if nothing else came into them."""
    base = folder_of(storage.root)
    new = [] if base is None else [folder for folder in (base, *base.parents) if not folder.exists()]
    try:
        yield
    finally:
        for folder in new:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _probe() -> str:
    return f".doctor-{uuid.uuid4().hex}"


def _side(skew_s: float) -> str:
    return "behind" if skew_s > 0 else "ahead of"
