"""Reading from a real S3 server what is written anew at the same time."""

from __future__ import annotations

from itertools import cycle
from threading import Event, Thread

import pytest

from dti_ray.storage import Storage
from tests.seaweed import Seaweed

pytestmark = pytest.mark.integration

SIZE = 3 << 20  # several times what Arrow's streams ask for at once
READS = 30


def test_file_that_is_written_anew_is_read_as_it_was_or_as_it_is_and_never_as_two_halves(seaweed: Seaweed) -> None:
    storage = Storage(seaweed.root("anew"))
    storage.write("file", bytes(SIZE))
    stop = Event()

    def replace() -> None:
        for value in cycle((1, 2)):
            if stop.is_set():
                return
            storage.write("file", bytes([value]) * SIZE)

    writer = Thread(target=replace)
    writer.start()
    try:
        kinds = [set(storage.read("file")) for _ in range(READS)]
    finally:
        stop.set()
        writer.join()
    assert all(len(kind) == 1 for kind in kinds), "bytes of one version only"
    assert len(set(map(frozenset, kinds))) > 1, "it was written anew meanwhile"
