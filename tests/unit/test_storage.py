"""Storage: roots, files that appear whole, manifests that are written last and held against what lies there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs

from dti_ray import storage as storage_module
from dti_ray.errors import Fault, StorageError
from dti_ray.storage import MANIFEST, FileEntry, Storage

FOLDER = "datasets/tiny"
UNREACHABLE = "s3://bucket/prefix?endpoint_override=http://127.0.0.1:9"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


def complete(storage: Storage) -> list[FileEntry]:
    entries = []
    for name, content in (("a.bin", b"alpha"), ("below/b.bin", b"beta" * 100)):
        written = storage.write(f"{FOLDER}/{name}", content)
        entries.append(FileEntry(name, written.size_bytes, written.sha256))
    storage.write_manifest(FOLDER, entries, {"schema_version": 1})
    return entries


def test_path_and_file_uri_name_the_same_root(tmp_path: Path) -> None:
    Storage(str(tmp_path)).write("a/b", b"content")
    assert Storage(f"file://{tmp_path}").read("a/b") == b"content"
    assert Storage(f"{tmp_path}/").read("a/b") == b"content"
    assert (tmp_path / "a" / "b").read_bytes() == b"content"


def test_relative_root_is_fixed_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("outputs")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    storage.write("x", b"1")
    assert (tmp_path / "outputs" / "x").exists()


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Storage("~/outputs").write("x", b"1")
    assert (tmp_path / "outputs" / "x").exists()


def test_display_is_what_a_user_would_type() -> None:
    assert Storage("outputs/").display("runs", "demo") == "outputs/runs/demo"


def test_write_returns_size_and_hash_and_leaves_no_other_file(storage: Storage) -> None:
    entry = storage.write("a/b.bin", b"abc")
    assert entry == FileEntry("a/b.bin", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert storage.list("", recursive=True) == ["a/b.bin"]


def test_failed_write_keeps_the_old_content(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write("a", b"old")

    def full(_self: Path, _content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(StorageError, match="No space left"):
            storage.write("a", b"new")
    assert storage.read("a") == b"old"


def test_reader_meets_the_old_content_or_the_new_one_while_it_is_written(storage: Storage) -> None:
    contents = (b"x" * 2**20, b"y" * 2**20)
    storage.write("a", contents[0])
    with storage.filesystem.open_input_stream(storage.path("a")) as stream:
        start = stream.read(10)
        storage.write("a", contents[1])
        assert start + stream.read() == contents[0]
    assert storage.read("a") == contents[1]


def test_list_is_sorted_relative_and_empty_where_nothing_is(storage: Storage) -> None:
    complete(storage)
    assert storage.list(FOLDER) == [f"{FOLDER}/{name}" for name in ("a.bin", "below", MANIFEST)]
    assert storage.list(FOLDER, recursive=True) == [f"{FOLDER}/{name}" for name in ("a.bin", "below/b.bin", MANIFEST)]
    assert storage.list("nowhere") == []


def test_delete_takes_files_and_folders_and_nothing_is_no_fault(storage: Storage) -> None:
    complete(storage)
    storage.delete(f"{FOLDER}/a.bin")
    assert not storage.exists(f"{FOLDER}/a.bin")
    assert storage.exists(f"{FOLDER}/below/b.bin")
    storage.delete(FOLDER)
    assert not storage.exists(FOLDER)
    storage.delete(FOLDER)


def test_missing_file_is_a_storage_error_that_names_it(storage: Storage) -> None:
    with pytest.raises(StorageError, match="root/nothing: cannot be read"):
        storage.read("nothing")


def test_folder_without_manifest_is_incomplete(storage: Storage) -> None:
    storage.write(f"{FOLDER}/a.bin", b"alpha")
    assert storage.read_manifest(FOLDER) is None


def test_manifest_gives_back_files_and_body(storage: Storage) -> None:
    entries = complete(storage)
    assert storage.read_manifest(FOLDER) == (entries, {"schema_version": 1})
    storage.verify(FOLDER, entries)


def test_manifest_names_files_that_all_lie_there(storage: Storage) -> None:
    complete(storage)
    tree = json.loads(storage.read(f"{FOLDER}/{MANIFEST}"))
    assert all(storage.exists(f"{FOLDER}/{entry['path']}") for entry in tree["files"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": [{"name": 1}]}', b"{}", b"\xff"])
def test_damaged_manifest_is_a_storage_error(storage: Storage, content: bytes) -> None:
    storage.write(f"{FOLDER}/{MANIFEST}", content)
    with pytest.raises(StorageError, match=MANIFEST):
        storage.read_manifest(FOLDER)


@pytest.mark.parametrize("content", [b"alphb", b"alph", b""])
def test_changed_file_does_not_verify(storage: Storage, content: bytes) -> None:
    entries = complete(storage)
    storage.write(f"{FOLDER}/a.bin", content)
    with pytest.raises(StorageError, match=r"datasets/tiny/a\.bin: has hash"):
        storage.verify(FOLDER, entries)


def test_missing_file_does_not_verify(storage: Storage) -> None:
    entries = complete(storage)
    storage.delete(f"{FOLDER}/below/b.bin")
    with pytest.raises(StorageError, match=r"below/b\.bin: cannot be read"):
        storage.verify(FOLDER, entries)


def test_upload_and_download_bring_back_the_same_files(storage: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "below").mkdir(parents=True)
    (source / "a").write_bytes(b"1")
    (source / "below" / "b").write_bytes(b"22")
    entries = storage.upload(source, "copies")
    assert [(entry.path, entry.size_bytes) for entry in entries] == [("a", 1), ("below/b", 2)]
    storage.download("copies", entries, target)
    assert (target / "a").read_bytes() == b"1"
    assert (target / "below" / "b").read_bytes() == b"22"


def test_download_writes_nothing_of_a_changed_file(storage: Storage, tmp_path: Path) -> None:
    entries = complete(storage)
    storage.write(f"{FOLDER}/a.bin", b"other")
    with pytest.raises(StorageError, match=r"a\.bin: has hash"):
        storage.download(FOLDER, entries, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_writable_root_keeps_no_probe(storage: Storage) -> None:
    storage.check_writable()
    assert storage.list("") == []


def test_root_below_a_regular_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    storage = Storage(str(tmp_path / "file" / "root"))
    with pytest.raises(StorageError, match="cannot be written"):
        storage.check_writable()


@pytest.mark.parametrize("root", ["ftp://host/x", "S5://x", "hdfs:///x"])
def test_unknown_scheme_is_refused_with_the_known_ones(root: str) -> None:
    with pytest.raises(StorageError, match=f"'{root}': is no place that can be opened; expected a folder, .* s3://"):
        Storage(root)


@pytest.mark.parametrize("root", ["s3://", "s3:///prefix", "gs://", "file://outputs/x"])
def test_uri_without_bucket_or_with_a_host_for_a_file_is_refused(root: str) -> None:
    with pytest.raises(StorageError, match=f"'{root}': names (no bucket|a host); expected "):
        Storage(root)


def test_s3_root_takes_endpoint_bucket_and_prefix_from_the_uri() -> None:
    storage = Storage(UNREACHABLE)
    assert isinstance(storage.filesystem, fs.S3FileSystem)
    assert storage.path("runs", "demo") == "bucket/prefix/runs/demo"
    assert storage.display("runs", "demo") == "s3://bucket/prefix/runs/demo"


def test_error_of_the_operating_system_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    with pytest.raises(StorageError) as caught:
        Storage(str(tmp_path)).write("file/below", b"")
    (fault,) = caught.value.faults
    assert os.linesep not in str(fault)


def failing(*errors: Exception) -> tuple[Callable[[], str], list[str]]:
    """Return an operation that raises these errors one after the other, then works; and the list of its calls."""
    left, calls = list(errors), []

    def operation() -> str:
        calls.append("called")
        if left:
            raise left.pop(0)
        return "done"

    return operation, calls


def test_what_fails_on_an_object_store_is_tried_again_after_each_delay(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    storage.retry_after_s = (0.02, 0.05)
    operation, calls = failing(OSError("connection\nrefused"), OSError("HTTP 503"))
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert storage.attempt("read", "a", operation) == "done"
    assert time.monotonic() - began >= 0.07
    assert len(calls) == 3
    assert len(caplog.messages) == 2, "each wait is told"
    assert all(f"{storage.display('a')} cannot be read" in message for message in caplog.messages)


def test_after_the_last_delay_the_error_says_what_was_tried_and_what_to_do(storage: Storage) -> None:
    storage.retry_after_s = (0, 0.01)
    operation, calls = failing(*(OSError("connection\n refused") for _ in range(9)))
    with pytest.raises(StorageError) as error:
        storage.attempt("written", "a", operation)
    assert len(calls) == 3
    assert str(error.value) == (
        f"{storage.display('a')}: cannot be written: connection refused; it was tried for 0.01 s; "
        "check that the storage answers, then run the same command: it goes on from here"
    )


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("no such key"),
        PermissionError("no"),
        OSError("AWS Error ACCESS_DENIED during PutObject operation: Access Denied."),
        OSError("AWS Error INVALID_ACCESS_KEY_ID"),
        OSError("When reading: AWS Error SIGNATURE_DOES_NOT_MATCH"),
        StorageError(Fault("a", "has hash 1; expected 2")),
    ],
    ids=str,
)
def test_what_waiting_cannot_help_is_raised_at_once(storage: Storage, error: Exception) -> None:
    storage.retry_after_s = (5, 5)
    operation, calls = failing(error)
    with pytest.raises(StorageError) as caught:
        storage.attempt("read", "a", operation)
    assert len(calls) == 1
    assert "it was tried" not in str(caught.value)


def test_error_of_ours_that_storage_caused_is_tried_again_but_only_by_one(storage: Storage) -> None:
    storage.retry_after_s = (0.001, 0.001)
    caused = StorageError(Fault("s3://log/a.csv", "cannot be read"))
    caused.__cause__ = OSError("connection refused")
    operation, calls = failing(caused, caused)
    assert storage.attempt("read", "a", operation) == "done"
    assert len(calls) == 3

    operation, calls = failing(*(OSError("connection refused") for _ in range(99)))
    with pytest.raises(StorageError, match=r"inner: cannot be written: connection refused; it was tried") as error:
        storage.attempt("read", "outer", lambda: storage.attempt("written", "inner", operation))
    assert len(calls) == 3, "the outer one adds no tries to those of the inner one"
    assert pickle.loads(pickle.dumps(error.value)).is_final, "in another process too"


def test_error_of_ours_that_lasts_says_what_to_do(storage: Storage) -> None:
    storage.retry_after_s = (0.001, 0.001)
    caused = StorageError(Fault("s3://log/a.csv", "cannot be read", hint="check the path"))
    caused.__cause__ = OSError("connection refused")
    with pytest.raises(StorageError, match=r"s3://log/a\.csv: cannot be read; it was tried .* run the same command"):
        storage.attempt("read", "a", failing(*[caused] * 9)[0])


def test_error_of_ours_that_a_wrong_key_caused_is_raised_at_once(storage: Storage) -> None:
    storage.retry_after_s = (5, 5)
    caused = StorageError(Fault("s3://log/a.csv", "cannot be read", hint="check the path"))
    caused.__cause__ = OSError("AWS Error ACCESS_DENIED during GetObject operation")
    with pytest.raises(StorageError, match=r"s3://log/a\.csv: cannot be read; check the path"):
        storage.attempt("read", "a", failing(caused)[0])


def test_other_errors_pass(storage: Storage) -> None:
    storage.retry_after_s = (5, 5)
    operation, calls = failing(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        storage.attempt("read", "a", operation)
    assert len(calls) == 1


def test_local_folder_is_tried_once_and_an_object_store_for_half_a_minute(storage: Storage) -> None:
    assert storage.retry_after_s == ()
    assert Storage(UNREACHABLE).retry_after_s == (1, 2, 4, 8, 16)


def test_patience_is_spent_in_pauses_that_double(storage: Storage) -> None:
    assert storage.patient(31).retry_after_s == (1, 2, 4, 8, 16)
    assert storage.patient(60).retry_after_s == (1, 2, 4, 8, 16, 16, 13)
    assert storage.patient(0.5).retry_after_s == (0.5,)
    assert storage.patient(0).retry_after_s == ()
    assert storage.retry_after_s == (), "the place itself is as it was: a local folder is tried once"


def test_full_local_disk_is_waited_for_by_the_patient(storage: Storage) -> None:
    operation, calls = failing(OSError(28, "No space left on device"))
    assert storage.patient(0.02).attempt("written", "a", operation) == "done"
    assert len(calls) == 2


@pytest.mark.parametrize("root", [".", UNREACHABLE])
def test_copies_in_other_processes_wait_as_long(root: str) -> None:
    storage = Storage(root)
    storage.retry_after_s = (1, 2, 3)
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.retry_after_s == (1, 2, 3)
    assert (copy.root, copy.base, copy.filesystem) == (storage.root, storage.base, storage.filesystem)


def test_unreachable_endpoint_is_tried_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr("dti_ray.storage.S3_MAX_ATTEMPTS", 1)  # of the client, below what is tried again here
    storage = Storage(UNREACHABLE)
    storage.retry_after_s = (0.01,)
    operations = (
        lambda: storage.write("a", b"x"),
        lambda: storage.list("a"),
        lambda: storage.verify("a", [FileEntry("b", 1, "")]),
    )
    for operation in operations:
        caplog.clear()
        with pytest.raises(StorageError, match=r"s3://bucket/prefix/a.*: cannot be .* run the same command"):
            operation()
        assert len(caplog.messages) == 1


def test_large_files_are_verified_in_parts(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "READ_BYTES", 1000)
    contents = {f"{number}.bin": os.urandom(997 * number) for number in range(20)}
    entries = [storage.write(name, content) for name, content in contents.items()]
    assert [entry.sha256 for entry in entries] == [hashlib.sha256(c).hexdigest() for c in contents.values()]
    storage.verify("", entries)
    changed = bytearray(contents["13.bin"])
    changed[5000] ^= 1
    storage.write("13.bin", bytes(changed))
    with pytest.raises(StorageError, match=r"13\.bin: has hash [0-9a-f]{12}… and 12961 bytes; expected .* 12961 bytes"):
        storage.verify("", entries)


def test_infos_are_in_the_order_of_the_paths(storage: Storage) -> None:
    complete(storage)
    infos = storage.infos([f"{FOLDER}/below/b.bin", "nothing", f"{FOLDER}/a.bin", FOLDER])
    assert [info.size for info in infos] == [400, None, 5, None]
    assert [info.type for info in infos] == [
        fs.FileType.File, fs.FileType.NotFound, fs.FileType.File, fs.FileType.Directory,
    ]  # fmt: skip
    assert storage.infos([]) == []
