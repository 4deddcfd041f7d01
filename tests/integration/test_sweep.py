"""Whole sweeps on real parts: Ray Tune, Ray Train, DeepSpeed, an S3 server."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dti_ray.cli import main
from dti_ray.config import load_config
from dti_ray.errors import ConfigError, InputError
from dti_ray.storage import Storage
from dti_ray.train.checkpoint import list_checkpoints
from dti_ray.tune.checks import check_sweep
from dti_ray.tune.ledger import Status, SweepState
from dti_ray.tune.sweep import run_sweep
from tests.processes import living
from tests.ray_nodes import start_nodes
from tests.seaweed import Seaweed
from tests.sweeps import command, config_of, content, lay_out, read_ledger, start, write_space

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

MAX_GB = 0.01
SWEEP_S = 900  # of a small sweep at most, on a machine that is busy with other things
SPACE = {"packing.k": {"grid": [2, 4]}}
LONG = ["optim.epochs=12", "eval.every_targets=300", "train.log_targets=32"]


def kill_a_worker() -> bool:
    """Kill a training worker of this process's Ray, if there is one."""
    for process in living("RayTrainWorker"):
        process.kill()
        return True
    return False


@pytest.mark.usefixtures("ray_cluster")
def test_sweep_survives_a_dead_worker_and_a_hopeless_trial_and_leaves_the_best_run_alone(
    tmp_path: Path, seaweed: Seaweed
) -> None:
    lay_out(tmp_path / "local")
    root = seaweed.root("sweep")
    storage = Storage(root)
    storage.upload(tmp_path / "local", "")
    space = {"optim.lr": {"grid": [3e-3, 1e30]}}  # the second gives losses that are not finite
    config = config_of(tmp_path, root, *LONG, space=space, search="grid", max_gb=MAX_GB, max_failures=2)
    killed, sizes, said = [], [], list[str]()

    def look(state: SweepState, texts: list[str]) -> None:
        said.extend(texts)
        sizes.append(sum(info.size or 0 for info in storage.infos(storage.list("runs", recursive=True))))
        if not killed and state.runs["s-0000-s0"].reports and kill_a_worker():
            killed.append(state.runs["s-0000-s0"].targets)

    finished = run_sweep(check_sweep(config), look)

    good, bad = finished.state.runs["s-0000-s0"], finished.state.runs["s-0001-s0"]
    assert (good.status, good.failures, good.starts) == (Status.DONE, (), 1)
    assert killed
    assert any(text.startswith("s-0000-s0: restored step") for text in said), "its worker was killed and came back"
    assert (bad.status, len(bad.failures), bad.starts) == (Status.FAILED, 2, 2)
    assert all("not finite" in reason for reason in bad.failures)
    assert finished.best is not None
    assert finished.best.params == {"optim.lr": 3e-3}
    assert max(sizes) <= MAX_GB * 1e9, "the budget holds at any time"

    left = storage.list("runs")
    assert left == ["runs/s-0000-s0"]
    assert len(list_checkpoints(storage, left[0])) <= 2
    names = {path.rpartition("/")[2] for path in storage.list("sweeps/s")}
    assert names == {"best.yaml", "config.yaml", "failures", "ledger.jsonl", "trials.csv", "trials.parquet"}
    assert storage.list("sweeps/s/failures") == ["sweeps/s/failures/s-0001-s0.txt"]

    ledger = storage.read("sweeps/s/ledger.jsonl")
    again = run_sweep(check_sweep(config), look)
    assert again.state == finished.state
    assert again.reruns == 0
    added = storage.read("sweeps/s/ledger.jsonl").removeprefix(ledger).decode().splitlines()
    assert [json.loads(line)["event"] for line in added] == ["session"], "nothing was run again"

    other = config_of(tmp_path, root, *LONG, "packing.n=2", space=space, search="grid", max_gb=MAX_GB, max_failures=2)
    with pytest.raises(InputError, match=r"another base configuration[\s\S]*packing\.n: got 2; expected 3"):
        check_sweep(other)


@pytest.mark.long
def test_sweep_whose_driver_is_killed_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    file = write_space(tmp_path, space=SPACE, search="grid", keep_best=2)
    for name in ("whole", "killed"):
        lay_out(tmp_path / name)
    whole = start(command(file, str(tmp_path / "whole"), *LONG), tmp_path / "whole.log")
    out, _ = whole.communicate(timeout=SWEEP_S)
    assert whole.returncode == 0, (tmp_path / "whole.log").read_text()
    told = json.loads(out.splitlines()[-1])
    assert (told["trials"], told["finished"], told["failed"], told["rerun"]) == (2, 2, 0, 0)

    first = start(command(file, str(tmp_path / "killed"), *LONG), tmp_path / "killed.log")
    deadline = time.monotonic() + SWEEP_S
    while not any(e["event"] == "report" and e["run"] == "s-0001-s0" for e in read_ledger(tmp_path / "killed")):
        assert time.monotonic() < deadline
        assert first.poll() is None, (tmp_path / "killed.log").read_text()
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert first.stdout is not None
    first.stdout.close()
    before = read_ledger(tmp_path / "killed")
    assert [e["run"] for e in before if e["event"] == "done"] == ["s-0000-s0"]

    second = start(command(file, str(tmp_path / "killed"), *LONG), tmp_path / "killed.log")
    out, _ = second.communicate(timeout=SWEEP_S)
    assert second.returncode == 0, (tmp_path / "killed.log").read_text()
    told = json.loads(out.splitlines()[-1])
    assert (told["trials"], told["finished"], told["rerun"]) == (2, 2, 0)
    events = read_ledger(tmp_path / "killed")
    assert [e["run"] for e in events[len(before) :] if e["event"] == "start"] == ["s-0001-s0"]
    assert content(events) == content(read_ledger(tmp_path / "whole"))
    assert "s-0001-s0: restored step" in (tmp_path / "killed.log").read_text()

    best = load_config([tmp_path / "killed/sweeps/s/best.yaml"])
    assert (best.train.run, best.packing.k) == (
        f"s-best-{told['best']['trial']:04d}",
        told["best"]["params"]["packing.k"],
    )


@pytest.mark.long
def test_trials_of_a_cluster_are_placed_on_both_of_its_nodes(tmp_path: Path) -> None:
    lay_out(tmp_path)
    file = write_space(tmp_path, space=SPACE, search="grid", max_concurrent=2)
    cluster, _ = start_nodes(2, cpus=3)
    try:
        overrides = [*LONG, f"cluster.address={cluster.address}", "cluster.cpus_per_worker=2"]
        sweep = start(command(file, str(tmp_path), *overrides), tmp_path / "log")
        out, _ = sweep.communicate(timeout=SWEEP_S)
    finally:
        cluster.shutdown()
    log = (tmp_path / "log").read_text()
    assert sweep.returncode == 0, log
    assert json.loads(out.splitlines()[-1])["finished"] == 2
    places = {line.split()[0]: line.split(" on ")[1] for line in log.splitlines() if " workers on " in line}
    assert len(places) == 2
    assert len(set(places.values())) == 2, places


@pytest.mark.parametrize(
    ("tune", "overrides", "told"),
    [
        ({"space": {"packing.kk": {"choice": [1]}}}, [], r"packing\.kk.*packing\.k\b"),
        ({"space": {"packing.n": {"choice": [2]}}}, [], r"eval\.n"),
        ({"space": {"model.dropout": {"uniform": [0.0, 1.5]}}}, [], r"model\.dropout.*1\.5"),
        ({"space": {"packing.k": {"choice": []}}}, [], r"packing\.k"),
        ({"space": SPACE, "metric": "f1"}, [], r"tune\.metric.*'f1'.*'auc' or 'log_loss'"),
        ({"space": {"packing.k": {"choice": [4, 9000]}}}, ["packing.row_tokens=64"], r"packing\.k"),
        ({"space": SPACE, "scheduler": "asha"}, ["eval.every_targets=999999"], r"eval\.every_targets: got 999,999"),
        ({"space": SPACE, "max_gb": 1e-6}, [], r"tune\.max_gb: got 1e-06.*at least"),
    ],
)  # fmt: skip
def test_sweep_that_cannot_work_is_refused_before_its_first_trial(
    tmp_path: Path, tune: dict[str, object], overrides: list[str], told: str
) -> None:
    lay_out(tmp_path)
    with pytest.raises(ConfigError, match=told):
        check_sweep(config_of(tmp_path, str(tmp_path), *overrides, **tune))


@pytest.mark.usefixtures("ray_cluster")
def test_trial_that_no_cluster_of_this_size_can_hold_is_refused_with_both_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(tmp_path)
    arguments = command(write_space(tmp_path, space=SPACE), str(tmp_path))[3:]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "cluster.gpus_per_worker=8"])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "a trial needs 1 workers with 1 CPUs and 8 GPUs each" in told
    assert "at most 0, as the cluster's nodes have 4 CPUs and 0 GPUs" in told


def test_damaged_line_of_a_ledger_is_named_and_the_rest_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dti_ray.cli.sweeps import tell_start

    lay_out(tmp_path)
    config = config_of(tmp_path, str(tmp_path), space=SPACE)
    plan = {"event": "trial", "trial": 0, "params": {"packing.k": 2}, "runs": {"s-0000-s0": 0}}
    Storage(str(tmp_path)).write("sweeps/s/ledger.jsonl", f"{json.dumps(plan)}\n{{half\n".encode())
    tell_start(check_sweep(config))
    told = capsys.readouterr().err
    assert "ledger.jsonl: line 2 is left out" in told
    assert "0 of 1 known runs have ended" in told
