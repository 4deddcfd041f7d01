"""Whoever follows a study: a person at a terminal, or nobody.

Stage: study, beside all steps. In: nothing. Out: a `Follow` that shows nothing; the command line has one that does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a wrong option must not wait for torch
    from dti_ray.study.plan import PlannedRun
    from dti_ray.telemetry import Line


class Follow:
    """A study calls these while it works; none may wait."""

    def say(self, text: str) -> None:
        """Tell something."""

    def begin(self, run: PlannedRun, number: int, runs: int, total_targets: int) -> None:
        """Say which run begins: the how-manieth of how many, and its targets over all epochs."""

    def line(self, kind: str, line: Line) -> None:
        """Show a line of metrics of the run that is trained."""

    def stage(self, what: str, done: int, total: int) -> None:
        """Show how far something else is."""
