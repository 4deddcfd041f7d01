"""The faults, one function each: make it happen to a run, let the run recover, say what came of it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from dti_ray.train.checkpoint import list_checkpoints
from tests.chaos.proxy import HoldUpload, one_in
from tests.chaos.stage import RUN, TIMEOUT_S, Run, Stage, kill, pass_on, spawn

FAULT_STEP = 18
DOWN_S = 30
RESTART_S = 120  # of a group of workers, on a machine that is busy with other things


@dataclass(frozen=True)
class Outcome:
    """What came of one fault.

    Attributes:
        promise: what was promised.
        is_kept: whether it was so.
        seconds: from the fault, or from the command that was given again, to the first new step.
        are_losses_equal: of every step, to those of the undisturbed run.
        litter: paths that no reader will ever want.
    """

    promise: str
    is_kept: bool
    seconds: float
    are_losses_equal: bool
    litter: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        return self.is_kept and self.are_losses_equal and not self.litter


Row = Callable[[Stage, int], Outcome]


def sigkill_of_a_worker_in_mid_step(stage: Stage, seed: int) -> Outcome:
    run = stage.start({"pause_s": 0.1})
    run.wait_for_step(FAULT_STEP + seed)
    at, step = kill(run.pid(seed % 2)), run.newest_step()
    return settled(stage, run, "restarts by itself", at, step)


def sigkill_of_a_worker_during_upload(stage: Stage, seed: int) -> Outcome:
    hold = HoldUpload(f"moments-0000{seed % 2}", after=2)
    stage.proxy.rule = hold
    run = stage.start({"pause_s": 0.1})
    assert hold.held.wait(120), run.told()
    at, step = kill(run.pid(seed % 2)), run.newest_step()
    hold.go.set()
    stage.proxy.rule = pass_on
    return settled(stage, run, "restarts from the state before", at, step)


def sigkill_of_the_driver(stage: Stage, seed: int) -> Outcome:
    run = stage.start({"pause_s": 0.1})
    run.wait_for_step(FAULT_STEP + seed)
    step = run.newest_step()
    kill(run.process.pid)
    run.wait()
    again = stage.start(None, stage.name)
    return settled(stage, again, "the same command goes on", time.time(), step)


def node_removed_and_another_added(stage: Stage, seed: int) -> Outcome:
    run = stage.start({"pause_s": 0.1})
    run.wait_for_step(FAULT_STEP + seed)
    at, step = time.time(), run.newest_step()
    stage.cluster.remove_node(stage.nodes.pop(seed % 2), allow_graceful=False)
    stage.nodes.append(stage.add_node())
    return settled(stage, run, "restarts on the other nodes", at, step)


def s3_server_down(stage: Stage, seed: int) -> Outcome:
    run = stage.start({"pause_s": 0.1}, None, "train.max_failures=20")
    run.wait_for_step(FAULT_STEP + seed)
    stage.s3.kill()
    time.sleep(DOWN_S)
    stage.start_s3()
    return settled(stage, run, "waits, or restarts, and goes on", time.time(), run.newest_step())


def s3_errors_to_one_request_in_five(stage: Stage, seed: int) -> Outcome:
    stage.proxy.rule = one_in(5, seed)
    try:
        run = stage.start(None, None, "train.max_failures=20")
        at = time.time()
        run.wait()
    finally:
        stage.proxy.rule = pass_on
    return settled(stage, run, "goes on", at, 0)


def newest_state_with_a_flipped_byte(stage: Stage, seed: int) -> Outcome:
    _stop_with_two_states(stage, seed)
    newest = list_checkpoints(stage.storage, f"runs/{stage.name}")[-1]
    file = random.Random(seed).choice(newest.files)
    path = f"{newest.path}/{file.path}"
    content = bytearray(stage.storage.read(path))
    content[random.Random(seed).randrange(len(content))] ^= 1
    stage.storage.write(path, bytes(content))
    return _refused(stage, newest.path, "has hash")


def newest_state_half_uploaded(stage: Stage, seed: int) -> Outcome:
    _stop_with_two_states(stage, seed)
    newest = list_checkpoints(stage.storage, f"runs/{stage.name}")[-1]
    stage.storage.delete(f"{newest.path}/manifest.json")
    stage.storage.delete(f"{newest.path}/moments-0000{seed % 2}.safetensors")
    return _refused(stage, newest.path, "has no manifest")


def local_disk_full(stage: Stage, seed: int) -> Outcome:
    """A run on a folder of a small file system of its own, which is filled up and emptied again."""
    stage.runs += 1
    stage.name = f"run-{stage.runs}"
    folder = stage.folder / stage.name
    (folder / "disk").mkdir(parents=True)
    driver = f"{sys.executable} -m tests.chaos.driver local storage.root={folder}/disk train.run={stage.name}"
    train = f"{driver} {' '.join(RUN)}"
    inner = (
        f"mount -t tmpfs -o size=24m none {folder}/disk && cp -r {stage.folder}/local/. {folder}/disk && "
        f"{train} checkpoint.patience_s=5 train.max_failures=1; code=$?; "
        f'export DTI_CHAOS=\'{{"folder": "{folder}"}}\'; {train}; again=$?; '
        f"cp -r {folder}/disk/runs {folder}/kept; test $code = 2 -o $code = 3 && exit $again"
    )
    fault = {"fill": str(folder / "disk"), "step": FAULT_STEP + seed, "pause_s": 0.1}
    run = spawn(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inner], folder, fault)
    code = run.wait()
    stage.storage.upload(folder / "kept", "runs")
    at = next((one["at"] for one in run.said if one.get("text") == "the disk is full"), 0.0)
    is_kept = code == 0 and "No space left" in run.error
    return Outcome(
        "ends and says so; with space again the same command goes on", is_kept,
        run.seconds_to_recover(at, FAULT_STEP + seed) if is_kept else 0.0,
        stage.losses() == stage.expected, tuple(stage.litter()),
    )  # fmt: skip


def sigterm(stage: Stage, seed: int) -> Outcome:
    run = stage.start({"pause_s": 0.1})
    run.wait_for_step(FAULT_STEP + seed)
    step = run.newest_step()
    kill(run.process.pid, signal.SIGTERM)
    code = run.wait(60)
    newest = list_checkpoints(stage.storage, f"runs/{stage.name}")[-1].progress
    ended_well = code == 3 and newest.step >= step and "the same command goes on" in run.error
    again = stage.start(None, stage.name)
    outcome = settled(stage, again, "saves at the next step, says how to go on", time.time(), newest.step)
    return replaced(outcome, ended_well and any(f"restored step {newest.step}," in text for text in again.texts()))


def sigterm_to_a_worker(stage: Stage, seed: int) -> Outcome:
    run = stage.start({"pause_s": 0.1}, None, "checkpoint.every_steps=1000", "checkpoint.keep_last=9")
    run.wait_for_step(FAULT_STEP + seed)
    step = run.newest_step()
    at = kill(run.pid(seed % 2), signal.SIGTERM)
    run.wait_for_step(step + 6)
    kill(run.pid(seed % 2))
    outcome = settled(stage, run, "saves at the next step and goes on", at, step)
    restored = [int(text.split()[2].rstrip(",")) for text in run.texts() if text.startswith("restored step")]
    return replaced(outcome, bool(restored) and step <= restored[0] <= step + 5)


def one_rank_raising(stage: Stage, seed: int) -> Outcome:
    fault = {"kind": "raise", "step": FAULT_STEP + seed, "rank": seed % 2}
    run = stage.start(fault, None, "train.max_failures=0")
    run.wait()
    is_named = f"rank {seed % 2}: ValueError: this rank has had enough" in run.error
    trace = stage.storage.read(f"runs/{stage.name}/failure.txt").decode()
    again = stage.start(fault, stage.name)
    outcome = settled(stage, again, "its own traceback; the same command goes on", time.time(), FAULT_STEP)
    return replaced(outcome, is_named and "faults.py" in trace and "happen" in trace)


def one_rank_hanging(stage: Stage, seed: int) -> Outcome:
    run = stage.start({"kind": "hang", "step": FAULT_STEP + seed, "rank": seed % 2})
    return _after_hang(stage, run, FAULT_STEP + seed - 1)


def one_rank_frozen(stage: Stage, seed: int) -> Outcome:
    run = stage.start({"pause_s": 0.1})
    run.wait_for_step(FAULT_STEP + seed)
    kill(run.pid(seed % 2), signal.SIGSTOP)
    return _after_hang(stage, run, run.newest_step())


def nan_at_a_step(stage: Stage, seed: int) -> Outcome:
    fault = {"kind": "nan", "step": FAULT_STEP + seed, "rank": seed % 2}
    run = stage.start(fault)
    run.wait()
    is_named = "its loss is not finite; rows of users user " in run.error and run.error.count("\n") == 0
    again = stage.start(fault, stage.name)
    outcome = settled(stage, again, "ends at once and names the users", time.time(), FAULT_STEP)
    return replaced(outcome, is_named and len([t for t in run.texts() if t.startswith("restored")]) == 0)


def corrupt_shard_in_mid_run(stage: Stage, seed: int) -> Outcome:
    overrides = ["optim.epochs=10"]  # rows are packed epochs ahead: what is in memory is not read again
    whole = stage.start(None, None, *overrides)
    assert whole.wait() == 0, whole.told()
    expected = stage.losses()
    shard = "datasets/tiny/interactions/part-00000.parquet"
    good = stage.storage.read(shard)
    run = stage.start({"pause_s": 0.1}, None, *overrides, "train.max_failures=1")
    run.wait_for_step(4 + seed)
    stage.storage.write(shard, good[:4] + bytes(len(good) - 8) + good[-4:])
    run.wait()
    stage.storage.write(shard, good)
    is_named, step = "part-00000.parquet" in run.error, run.newest_step()
    again = stage.start(None, stage.name, *overrides)
    outcome = settled(stage, again, "names the shard; once it is mended the same command goes on", time.time(), step)
    are_equal = stage.losses() == expected
    return Outcome(outcome.promise, outcome.is_kept and is_named, outcome.seconds, are_equal, outcome.litter)


def two_one_two_workers(zero_stage: int) -> Row:
    """Return a row: the run is stopped twice, and goes on with another number of workers each time."""

    def row(stage: Stage, seed: int) -> Outcome:
        overrides = [f"train.zero_stage={zero_stage}", "model.dropout=0"]  # dropout draws by rank
        whole = stage.start(None, None, *overrides)
        assert whole.wait() == 0, whole.told()
        expected, name = stage.losses(), None
        for workers, step in ((2, FAULT_STEP + seed), (1, 2 * FAULT_STEP + seed)):
            # slow enough that a signal, which takes a second or two to arrive, stops it before its last step
            run = stage.start({"pause_s": 0.5}, name, *overrides, f"cluster.workers={workers}")
            name = stage.name
            run.wait_for_step(step)
            reached = run.newest_step()
            kill(run.process.pid, signal.SIGTERM)
            run.wait(120)
        again = stage.start(None, name, *overrides)
        outcome = settled(stage, again, "equal to 1e-5, relative", time.time(), reached)
        found = stage.losses()
        are_close = found.keys() == expected.keys() and all(
            targets == expected[step][1] and abs(loss - expected[step][0]) <= 1e-5 * abs(loss)
            for step, (loss, targets) in found.items()
        )
        is_cut = any("written by 1 workers" in text for text in again.texts())
        return Outcome(outcome.promise, outcome.is_kept and is_cut, outcome.seconds, are_close, outcome.litter)

    return row


ROWS: dict[str, Row] = {
    "SIGKILL of a worker in mid-step": sigkill_of_a_worker_in_mid_step,
    "SIGKILL of a worker during upload": sigkill_of_a_worker_during_upload,
    "SIGKILL of the driver, then the same command": sigkill_of_the_driver,
    "a Ray node removed, another added": node_removed_and_another_added,
    f"the S3 server down for {DOWN_S} s": s3_server_down,
    "S3 errors to one request in five": s3_errors_to_one_request_in_five,
    "newest state with one flipped byte": newest_state_with_a_flipped_byte,
    "newest state half uploaded": newest_state_half_uploaded,
    "local disk full": local_disk_full,
    "SIGTERM to the driver": sigterm,
    "SIGTERM to a worker, SIGKILL later": sigterm_to_a_worker,
    "one rank raising": one_rank_raising,
    "one rank hanging": one_rank_hanging,
    "one rank frozen (SIGSTOP)": one_rank_frozen,
    "NaN at a step": nan_at_a_step,
    "a corrupt shard in mid-run": corrupt_shard_in_mid_run,
}
RESIZED: dict[str, Row] = {f"2, 1, 2 workers, ZeRO {stage}": two_one_two_workers(stage) for stage in (1, 2, 3)}


def can_mount() -> bool:
    """Say whether a small file system of one's own can be had here."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def settled(stage: Stage, run: Run, promise: str, at: float, step: int) -> Outcome:
    """Wait for the end of a run and compare it with the undisturbed one."""
    code = run.wait()
    if code != 0:
        sys.stderr.write(f"exit code {code}: {run.error}\n")
    seconds = run.seconds_to_recover(at, step) if code == 0 and run.newest_step() > step else 0.0
    if os.environ.get("DTI_CHAOS_TELL"):
        sys.stderr.write(run.told() + "\n")
    return Outcome(promise, code == 0, seconds, stage.losses() == stage.expected, tuple(stage.litter()))


def replaced(outcome: Outcome, is_kept: bool) -> Outcome:
    return Outcome(
        outcome.promise, outcome.is_kept and is_kept, outcome.seconds, outcome.are_losses_equal, outcome.litter
    )


def _stop_with_two_states(stage: Stage, seed: int) -> None:
    run = stage.start({"pause_s": 0.1})
    run.wait_for_step(FAULT_STEP + seed)
    kill(run.process.pid)
    run.wait()
    assert len(list_checkpoints(stage.storage, f"runs/{stage.name}")) >= 2


def _refused(stage: Stage, path: str, reason: str) -> Outcome:
    again = stage.start(None, stage.name)
    outcome = settled(stage, again, "refused with its reason, the one before is taken", time.time(), FAULT_STEP)
    return replaced(outcome, any(path in text and reason in text for text in again.texts()))


def _after_hang(stage: Stage, run: Run, step: int) -> Outcome:
    run.wait_for_step(step)
    at = next(one["at"] for one in run.said if one.get("step") == step)
    outcome = settled(stage, run, f"ends after {TIMEOUT_S} s, restarts by itself", at, step)
    restored = [one["at"] for one in run.said if one.get("text", "").startswith("restored")]
    return replaced(outcome, bool(restored) and restored[0] - at < 2 * TIMEOUT_S + RESTART_S)
