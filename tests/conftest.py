"""Fixtures that several tests share: a real local Ray, a real S3 server, and raw files in RecBole's layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.seaweed import KEYS, Seaweed

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.update(KEYS)  # before Ray starts, so that its workers have them

# A test that is slow on a busy machine is no fault of the code: speed is measured by benchmarks.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

INTER_HEADING = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ITEM_HEADING = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"

WriteRaw = Callable[..., Path]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    ray.init(
        address="local",  # and not what else may run on this machine
        num_cpus=4,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        namespace="tests",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def running_seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    server = Seaweed(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def seaweed(running_seaweed: Seaweed) -> Iterator[Seaweed]:
    """A real S3 server, which a test may kill."""
    running_seaweed.wait()
    yield running_seaweed
    running_seaweed.start()


@pytest.fixture
def write_raw(tmp_path: Path) -> WriteRaw:
    """Return a function that writes interactions and items as raw files and returns their folder."""

    def write(
        interactions: Sequence[Sequence[object]],
        items: Sequence[Sequence[object]] = (),
        name: str = "tiny",
        inter_heading: str = INTER_HEADING,
        item_heading: str = ITEM_HEADING,
    ) -> Path:
        folder = tmp_path / "raw" / name
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, heading, rows in (("inter", inter_heading, interactions), ("item", item_heading, items)):
            lines = [heading, *("\t".join(map(str, row)) for row in rows)]
            (folder / f"{name}.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return write
