"""The driver of a run under test: as `dti-ray train`, with faults in its workers and JSON lines on stdout.

python -m tests.chaos.driver RAY_ADDRESS overrides ...      local: a cluster of its own
DTI_CHAOS   see `faults`; {"fill": PATH, "step": N} fills the disk below PATH after step N, until the run ends
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import ray

from dti_ray.config import load_config
from dti_ray.errors import DtiRayError
from dti_ray.train import launch
from tests.chaos import faults


def tell(**what: object) -> None:
    sys.stdout.write(json.dumps({"at": time.time(), **what}) + "\n")
    sys.stdout.flush()


def main() -> int:
    address, *overrides = sys.argv[1:]
    fault = json.loads(os.environ["DTI_CHAOS"])
    names = ("DTI_CHAOS", "PYTHONPATH", "OMP_NUM_THREADS", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    env = {name: os.environ[name] for name in names if name in os.environ}
    where = {"address": address, **({"num_cpus": 6} if address == "local" else {})}
    ray.init(**where, runtime_env={"env_vars": env}, log_to_driver=False, logging_level="ERROR")
    launch.enter = faults.worker
    filler = Path(fault["fill"]) / "filler" if "fill" in fault else None

    def on_line(kind: str, line: dict[str, float]) -> None:
        tell(kind=kind, **line)
        if filler is not None and line["step"] >= fault["step"] and not filler.exists():
            fill(filler)

    try:
        progress = launch.launch(launch.check_launch(load_config([], overrides)), on_line, lambda text: tell(text=text))
    except DtiRayError as error:
        tell(error=str(error), type=type(error).__name__)
        return error.exit_code
    finally:
        if filler is not None:
            filler.unlink(missing_ok=True)
    tell(done=progress.targets)
    return 0


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            tell(text="the disk is full")


if __name__ == "__main__":
    sys.exit(main())
