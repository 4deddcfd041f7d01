"""The full form: every fault several times, then a soak, and the table.

python -m tests.chaos.table --times 3 --soak 600 --to docs/benchmarks/chaos_<machine>_<yyyymm>.md [ROW ...]
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from tests.chaos import stage as stages
from tests.chaos.rows import RESIZED, ROWS, Outcome, can_mount
from tests.chaos.stage import RUN, Run, Stage, kill

FAULT_EVERY_S = 30
# More steps than ten minutes have, so that no fault finds the run at its end.
SOAKED = ["optim.epochs=40", "train.max_failures=1000", "checkpoint.every_steps=3"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--soak", type=float, default=600, help="seconds; 0: none")
    parser.add_argument("--to", type=Path, help="file of the table; none: stdout alone")
    parser.add_argument("rows", nargs="*", help="words of the names of the rows wanted; none: all")
    wanted = parser.parse_args()
    names = [name for name in (*ROWS, *RESIZED) if not wanted.rows or any(word in name for word in wanted.rows)]
    found: dict[str, list[Outcome | str]] = {}
    with stages.stage() as stage:
        for name in names:
            found[name] = [once(stage, name, seed) for seed in range(wanted.times if name in ROWS else 1)]
        soaked = soak(stage, wanted.soak) if wanted.soak else None
    text = "\n".join(
        [heading(wanted.times), *(line(name, outcomes) for name, outcomes in found.items()), *tail(soaked)]
    )
    sys.stdout.write(text + "\n")
    if wanted.to is not None:
        wanted.to.write_text(text + "\n")
    good = all(isinstance(one, Outcome) and one.is_good for outcomes in found.values() for one in outcomes)
    return 0 if good and (soaked is None or soaked[1]) else 1


def once(stage: Stage, name: str, seed: int) -> Outcome | str:
    if name == "local disk full" and not can_mount():
        return "no small file system can be mounted here"
    started = time.monotonic()
    try:
        outcome: Outcome | str = {**ROWS, **RESIZED}[name](stage, seed)
    except Exception:  # noqa: BLE001 - the other rows are still wanted
        outcome = traceback.format_exc()
    stages.end_all()
    stage.proxy.rule = stages.pass_on
    sys.stderr.write(f"{name}, {seed}: {outcome} ({time.monotonic() - started:.0f} s)\n")
    return outcome


def soak(stage: Stage, seconds: float) -> tuple[int, bool]:
    """Train while a random fault happens every half minute; return (faults, whether the end is right)."""
    whole = stage.start(None, None, *SOAKED)
    assert whole.wait() == 0, whole.told()
    expected = stage.losses()
    rng, faults, ends_at = random.Random(0), 0, time.monotonic() + seconds
    run = stage.start({"pause_s": 1.0}, None, *SOAKED)
    while time.monotonic() < ends_at:
        time.sleep(FAULT_EVERY_S)
        fault = rng.choice(["worker", "driver", "term", "server"])
        faults += 1
        sys.stderr.write(f"soak: {fault} at step {run.newest_step()}\n")
        run = strike(stage, run, fault, rng)
    run.process.terminate()
    run.wait(120)
    run = stage.start(None, stage.name, *SOAKED)
    while run.wait() != 0:
        run = stage.start(None, stage.name, *SOAKED)
    return faults, stage.losses() == expected and not stage.litter()


def strike(stage: Stage, run: Run, fault: str, rng: random.Random) -> Run:
    """Make a fault happen; return the run that goes on: this one, or what the same command starts."""
    if fault == "worker":
        with suppress(ProcessLookupError, FileNotFoundError):  # it is being started again from the fault before
            kill(run.pid(rng.randrange(2)))
        return run
    if fault == "server":
        stage.s3.kill()
        time.sleep(5)
        stage.start_s3()
        return run
    if fault == "driver":
        run.process.kill()
    else:
        run.process.terminate()
    run.wait(120)
    return stage.start({"pause_s": 1.0}, stage.name, *SOAKED)


def heading(times: int) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "deepspeed", "pyarrow"))
    return (
        f"# Faults and what came of them\n\n"
        f"{times} runs of each row, one of those that change the number of workers, on {os.cpu_count()} CPUs "
        f"({platform.machine()}), Python {platform.python_version()}, {packages}; commit {commit}; "
        f"`python -m tests.chaos.table`.\n"
        f"Two workers on two local Ray nodes, ZeRO 2, fp32, SeaweedFS; settings: `{' '.join(RUN)}`.\n\n"
        "Equal: the losses and target counts of all steps are bit for bit those of an undisturbed run, so every\n"
        "target was trained exactly once.\n\n"
        "| fault | promise | kept | seconds to recover (median, longest) | losses equal | litter |\n"
        "|---|---|---|---|---|---|"
    )


def line(name: str, outcomes: list[Outcome | str]) -> str:
    good = [one for one in outcomes if isinstance(one, Outcome)]
    if not good:
        return f"| {name} | not run | {str(outcomes[0]).strip().splitlines()[-1]} | | | |"
    seconds = [one.seconds for one in good]
    return (
        f"| {name} | {good[0].promise} | {sum(one.is_kept for one in good)}/{len(outcomes)} | "
        f"{statistics.median(seconds):.0f}, {max(seconds):.0f} | "
        f"{sum(one.are_losses_equal for one in good)}/{len(outcomes)} | {sum(len(one.litter) for one in good)} |"
    )


def tail(soaked: tuple[int, bool] | None) -> list[str]:
    if soaked is None:
        return []
    faults, is_right = soaked
    return [
        "",
        f"Soak: {faults} random faults, one every {FAULT_EVERY_S} s; the end was {'right' if is_right else 'WRONG'}.",
    ]


if __name__ == "__main__":
    sys.exit(main())
