"""A very small study for tests: three ways of training a log of eight users."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dti_ray.config import RunConfig, with_values
from dti_ray.study.check import Study, check_study
from dti_ray.study.follow import Follow
from dti_ray.study.plan import PlannedRun
from dti_ray.telemetry import Line
from tests.builders import make_config, write_dataset

LENGTHS = [30, 12, 25, 40, 18, 33, 21, 27]
ROWS: dict[str, object] = {
    "sliding": {"change": {"packing.k": 1}},
    "dti": {"change": {"packing.k": 4}, "final": True, "contexts": [3, 5]},
}


def study_config(root: Path, rows: Mapping[str, object] | None = None, **study: object) -> RunConfig:
    """Return a study's configuration; its data set must be written."""
    base = make_config(
        f"storage.root={root}", "data.name=tiny", "packing.n=3", "packing.streams=2", "packing.row_tokens=256",
        "packing.window=interactions", "optim.targets_per_step=16", "optim.epochs=1", "train.log_targets=32",
        "eval.every_targets=64", "eval.bootstrap=100", "model.layers=1",
    )  # fmt: skip
    section = {"name": "tiny", "classical": False, "seeds": [0, 1], "rows": rows or ROWS, **study}
    return with_values(base, {"study": section})


def tiny_study(root: Path, rows: Mapping[str, object] | None = None, **study: object) -> Study:
    """Write the data set if need be, and return a study that has passed every check."""
    if not (root / "datasets").exists():
        write_dataset(root, LENGTHS)
    return check_study(study_config(root, rows, **study))


class PowerCut(BaseException):
    """Ends the process that runs a study, as far as the study can tell."""


class Notes(Follow):
    """Writes down what a study says, and may end it.

    Args:
        cut: (number of the run, targets) at which the power goes.
    """

    def __init__(self, cut: tuple[int, int] | None = None) -> None:
        self.cut, self.number = cut, 0
        self.runs: list[str] = []
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)

    def begin(self, run: PlannedRun, number: int, runs: int, total_targets: int) -> None:  # noqa: ARG002
        self.number = number
        self.runs.append(run.name)

    def line(self, kind: str, line: Line) -> None:  # noqa: ARG002
        if self.cut is not None and (self.number, line["targets"]) >= self.cut:
            raise PowerCut
