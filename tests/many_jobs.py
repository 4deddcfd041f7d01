"""Many small jobs sent to one local cluster, some of them twice at once: is any lost, is any doubled?

python -m tests.many_jobs [--jobs 100] [--at-once 4]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dti_ray.storage import Storage
from dti_ray.telemetry import read_lines
from tests.builders import write_dataset
from tests.jobs import RUN, JobCluster, job_cluster

LENGTHS = [12, 15, 18]
TWIN_EVERY = 10  # of these jobs, one is sent by two people in the same moment


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=4)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, job_cluster({}) as cluster:
        write_dataset(Path(root), LENGTHS)
        started = time.monotonic()
        with ThreadPoolExecutor(wanted.at_once) as people, ThreadPoolExecutor(wanted.at_once) as twins:
            sent = [people.submit(send, cluster, root, number, twins) for number in range(wanted.jobs)]
            seconds = [one.result() for one in sent]
        _, told = cluster.call("jobs", "list", "--json")
        jobs = json.loads(told.strip().splitlines()[-1])["jobs"]
        ends = {steps(root, number) for number in range(wanted.jobs)}
    names = Counter(job["id"] for job in jobs)
    expected = {f"train.r{number:03}" for number in range(wanted.jobs)}
    found = {
        "jobs": wanted.jobs, "at_once": wanted.at_once, "seconds": round(time.monotonic() - started),
        "median_s": round(statistics.median(seconds)), "longest_s": round(max(seconds)),
        "lost": len(expected - names.keys()), "doubled": len(names.keys() - expected),
        "failed": sum(job["status"] != "SUCCEEDED" for job in jobs), "different_ends": len(ends) - 1,
        "cpus": os.cpu_count(),
    }  # fmt: skip
    sys.stdout.write(json.dumps(found) + "\n")
    return int(any(found[name] for name in ("lost", "doubled", "failed", "different_ends")))


def send(cluster: JobCluster, root: str, number: int, twins: ThreadPoolExecutor) -> float:
    """Send one job, and follow it; return how long that took (s)."""
    command = [
        "submit", "train", "--root", root, *RUN, f"train.run=r{number:03}", "optim.epochs=1", "cluster.workers=1",
        "train.engine=torch",
    ]  # fmt: skip
    started = time.monotonic()
    twin = twins.submit(cluster.call, *command) if number % TWIN_EVERY == 0 else None
    code, told = cluster.call(*command)
    seconds = time.monotonic() - started
    sys.stderr.write(f"{number}: exit code {code}, {seconds:.0f} s\n")
    assert code == 0, told
    assert twin is None or twin.result()[0] == 0
    return seconds


def steps(root: str, number: int) -> tuple[float, ...]:
    """Return the steps that a run reported; twice trained, a step would stand twice."""
    found = [line["step"] for line in read_lines(Storage(root), f"runs/r{number:03}", "train")]
    assert found == sorted(set(found)), found
    return tuple(found)


if __name__ == "__main__":
    sys.exit(main())
