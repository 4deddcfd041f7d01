"""Storage that cannot be reached fails in time, and says how long it was tried."""

from __future__ import annotations

import time

import pytest

from dti_ray import storage as storage_module
from dti_ray.errors import StorageError
from dti_ray.storage import Storage

UNREACHABLE = "s3://bucket/prefix?endpoint_override=http://127.0.0.1:9"


@pytest.mark.slow
def test_unreachable_endpoint_fails_with_a_storage_error_within_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    storage = Storage(UNREACHABLE)
    began = time.monotonic()
    with pytest.raises(StorageError, match="s3://bucket/prefix"):
        storage.check_writable()
    assert time.monotonic() - began < 15


def test_probe_of_a_root_waits_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(storage_module, "PROBE_PATIENCE_S", 0.05)
    storage = Storage(UNREACHABLE)
    with pytest.raises(StorageError, match=r"cannot be written.* it was tried for 0\.05 s"):
        storage.check_writable()
    assert storage.retry_after_s == (1, 2, 4, 8, 16)
