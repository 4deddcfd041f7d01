"""Load on a server of its own, on loopback: below its limit, above it, and while it takes a newer state.

    python -m tests.load --seconds 15 [--locust PATH]

Starts `dti-ray serve` with a model of the demo's shape and random weights, has locust ask it, prints one row a case.
Exit code 1 tells that somebody was answered neither 200 nor 429, or that somebody below the limit was refused.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.scoring import write_run
from tests.serving import free_port, write_state

MODEL = [
    "model.layers=2", "model.hidden_size=128", "model.heads=4", "model.kv_heads=4", "model.intermediate_size=352",
    "packing.n=20", "packing.k=20", "packing.window=off",
]  # fmt: skip
LIMITS = {"batch_requests": 16, "queue_requests": 32, "reload_s": 1, "timeout_s": 20}
MOST = LIMITS["queue_requests"]  # in flight: Serve counts a request as waiting until a replica has it
START_S = 180


@dataclass(frozen=True)
class Row:
    """What one case measured; latencies are those of answers, in ms."""

    case: str
    clients: int
    answered_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    refused_429: int
    failed: int


def main() -> int:
    """Measure all cases."""
    parser = argparse.ArgumentParser(prog="python -m tests.load")
    parser.add_argument("--locust", default="locust", help="locust's command")
    parser.add_argument("--seconds", type=int, default=15, help="of each case")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dti-ray-load-") as folder:
        config = write_run(Path(folder), *MODEL)
        url = f"http://127.0.0.1:{free_port()}"
        limits = [f"serve.{name}={value}" for name, value in LIMITS.items()]
        where = ["--root", folder, "--port", url.rpartition(":")[2]]
        server = subprocess.Popen([sys.executable, "-m", "dti_ray.cli", "serve", config.train.run, *where, *limits])
        try:
            wait(url, server)
            rows = [
                measure("one client", 1, url, options),
                measure("below the limit", MOST // 2, url, options),
                measure("at the limit", MOST, url, options),
                measure("above the limit", 6 * MOST, url, options),
            ]
            newer = threading.Timer(options.seconds / 3, write_state, (config, 2, 5))
            newer.start()
            rows.append(measure("a newer state is taken", MOST // 2, url, options))
            newer.join()
            state = ready(url)
        finally:
            server.terminate()
            code = server.wait(120)
    for row in rows:
        print(json.dumps(asdict(row)))  # noqa: T201 - a command
    is_good = all(row.failed == 0 for row in rows) and not any(row.refused_429 for row in rows if row.clients <= MOST)
    print(json.dumps({"state": state, "server_exit_code": code, "is_good": is_good, "most": MOST, **LIMITS}))  # noqa: T201
    return 0 if is_good and code == 0 and state == "step-00000002-test" else 1


def measure(case: str, clients: int, url: str, options: argparse.Namespace) -> Row:
    """Have locust ask for some seconds."""
    with tempfile.TemporaryDirectory(prefix="dti-ray-locust-") as folder:
        command = [options.locust, "-f", str(Path(__file__).with_name("users.py")), "--headless", "--only-summary",
                   "--host", url, "-u", str(clients), "-r", str(clients), "-t", f"{options.seconds}s",
                   "--stop-timeout", "30", "--csv", f"{folder}/found", "--loglevel", "WARNING"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds + 90)
        assert done.returncode == 0, done.stderr
        with open(f"{folder}/found_stats.csv", newline="") as file:
            found = {line["Name"]: line for line in csv.DictReader(file)}
        if int(found["Aggregated"]["Failure Count"]):
            print(Path(f"{folder}/found_failures.csv").read_text(), file=sys.stderr)  # noqa: T201
    right, refused = found["200"], found.get("429", {"Request Count": 0})
    p50, p95, p99 = (float(right[name]) for name in ("50%", "95%", "99%"))
    failed = int(found["Aggregated"]["Failure Count"])
    return Row(case, clients, float(right["Requests/s"]), p50, p95, p99, int(refused["Request Count"]), failed)


def wait(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            ready(url)
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise SystemExit("the server did not come up")


def ready(url: str) -> str:
    """Return the state that answers."""
    with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
        return json.loads(answer.read())["state"]


if __name__ == "__main__":
    sys.exit(main())
