"""A real S3 server on this machine, which tests may kill and start again on the same folder."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from dti_ray.errors import StorageError
from dti_ray.storage import Storage

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret"}
BUCKET = "dti"
START_S = 90
SERVICES = ("s3", "master", "volume", "filer", "admin")
GRPC = 10_000  # a service's second port lies so far above the first


class Seaweed:
    """SeaweedFS with one bucket.

    Args:
        folder: where it keeps what is written, also from one start to the next.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = dict(zip(SERVICES, _free_ports(len(SERVICES)), strict=True))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """Of the S3 interface."""
        return self.ports["s3"]

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find the server."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def root(self, prefix: str) -> str:
        """Return a root that names the server, for processes that know only the keys."""
        return f"s3://{BUCKET}/{prefix}?endpoint_override={self.endpoint}"

    def start(self) -> None:
        """Start it unless it runs, without waiting for it."""
        if self.process is not None:
            return
        weed = Path(sys.executable).with_name("weed")
        command = [
            weed, "mini", f"-dir={self.folder}", "-ip=127.0.0.1", f"-bucket={BUCKET}", "-webdav=false",
            "-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}.port={port}" for name, port in self.ports.items()),
        ]  # fmt: skip
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **KEYS}, stdout=log, stderr=log)

    def wait(self) -> None:
        """Wait until the bucket can be written."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                return Storage(self.root("probe")).check_writable()
            except StorageError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def kill(self) -> None:
        """End it as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _free_ports(count: int) -> list[int]:
    """Return ports that are free and whose gRPC ports are; several servers may then run on one machine."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 50_000)
        if port not in found and _is_free(port) and _is_free(port + GRPC):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
