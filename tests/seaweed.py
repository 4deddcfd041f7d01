"""A real S3 server on this machine, which tests may kill and start again on the same folder."""

from __future__ import annotations

import os
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


class Seaweed:
    """SeaweedFS with one bucket.

    Args:
        folder: where it keeps what is written, also from one start to the next.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

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
        command = [weed, "mini", f"-dir={self.folder}", "-ip=127.0.0.1", f"-s3.port={self.port}", f"-bucket={BUCKET}"]
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
