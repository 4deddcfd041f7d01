"""The whole examination: groups in order, one cause is one failure, and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dti_ray.cli import main
from dti_ray.doctor.check import Check, Status
from dti_ray.doctor.examine import NO_CLUSTER, NO_ROOT, STORAGE_S, examine
from tests.builders import make_config, write_dataset

REPOSITORY = Path(__file__).parents[3]
GROUPS = ["environment", "storage", "data and model", "Ray", "machines", "GPUs"]


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def checks_of(root: str, *overrides: str, with_cluster: bool = True) -> dict[str, Check]:
    config = make_config(f"storage.root={root}", "data.name=tiny", "packing.n=4", *overrides)
    groups = examine(config, with_cluster)
    assert [group.title for group in groups] == GROUPS
    checks = [check for group in groups for check in group.checks]
    assert len({check.name for check in checks}) == len(checks), "a name stands once"
    return {check.name: check for check in checks}


@pytest.mark.slow
def test_sound_configuration_passes_what_a_launch_would_check(tmp_path: Path) -> None:
    write_dataset(tmp_path, [30, 25, 41])
    found = checks_of(str(tmp_path))
    assert [name for name, check in found.items() if check.status is Status.FAIL] == []
    assert {found[name].status for name in ("data set", "tokenizer", "model", "run")} == {Status.PASS}
    assert found["gpus"].status is Status.SKIP
    assert sorted(path.name for path in tmp_path.iterdir()) == ["datasets"], "nothing is left behind"


@pytest.mark.slow
def test_root_that_does_not_work_is_one_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    found = checks_of(str(tmp_path / "file" / "root"), with_cluster=False)
    assert [name for name, check in found.items() if check.status is Status.FAIL] == ["storage"]
    assert {found[name].found for name in ("data set", "run")} == {NO_ROOT}
    assert found["ray address"] == Check("ray address", Status.SKIP, NO_CLUSTER)


@pytest.mark.slow
def test_root_of_an_unknown_kind_is_one_failure() -> None:
    found = checks_of("ftp://host/x", "cluster.address=127.0.0.1:9", "model.name_or_path=/nowhere")
    assert [name for name, check in found.items() if check.status is Status.FAIL] == [
        "storage", "tokenizer", "ray address",
    ]  # fmt: skip
    assert "is no place that can be opened" in found["storage"].found


@pytest.mark.slow
def test_address_that_nobody_listens_at_is_one_failure(tmp_path: Path) -> None:
    found = checks_of(str(tmp_path), "cluster.address=127.0.0.1:9")
    assert [name for name, check in found.items() if check.status is Status.FAIL] == ["ray address"]
    assert {found[name].status for name in ("cluster", "resources", "machine")} == {Status.SKIP}
    found = checks_of(str(tmp_path), "cluster.address=127.0.0.1:9", with_cluster=False)
    assert Status.FAIL not in {check.status for check in found.values()}


@pytest.mark.slow
def test_gpus_that_are_asked_for_and_not_here_fail_unless_a_cluster_has_them(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    found = checks_of(str(tmp_path), "cluster.gpus_per_worker=1")
    assert found["gpus"].status is Status.FAIL
    assert found["nccl"].status is Status.SKIP
    found = checks_of(str(tmp_path), "cluster.gpus_per_worker=1", with_cluster=False)
    assert found["gpus"].status is Status.SKIP
    assert "--no-cluster" in found["gpus"].found


@pytest.mark.slow
def test_states_of_workers_are_wanted_only_where_workers_will_run(tmp_path: Path) -> None:
    write_dataset(tmp_path, [30, 25, 41])
    large = ("model.hidden_size=65536", "model.layers=2")
    here = checks_of(str(tmp_path), *large)["disk"]
    assert here.status is Status.FAIL
    assert "a state for each of 2 workers" in here.found
    heads_pod = checks_of(str(tmp_path), *large, with_cluster=False)["disk"]
    assert "for each of" not in heads_pod.found
    assert "4 states that are kept" in heads_pod.found, "the root is a folder of this machine"


@pytest.mark.slow
def test_command_ends_with_2_and_a_line_for_a_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("content")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--no-cluster", "--json", "--root", str(tmp_path / "file")])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    tree = json.loads(out)
    assert (tree["ok"], tree["failed"]) == (False, ["storage"])
    assert {"group": "storage", "name": "clock"}.items() <= tree["checks"][4].items()
    assert "checks failed: storage" in err.splitlines()[-1]


@pytest.mark.slow
def test_command_ends_though_a_client_of_s3_hangs(tmp_path: Path) -> None:
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        root = f"s3://bucket/x?endpoint_override=http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "dti_ray.cli", "doctor", "--no-cluster", "--json", "--root", root]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["failed"] == ["storage"]
    assert f"no answer within {STORAGE_S:g} s" in done.stderr
