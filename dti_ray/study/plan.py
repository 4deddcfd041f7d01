"""Rows times seeds become runs: what a study trains, in which order, and what it asks of each.

Stage: study; first step. In: a `RunConfig` with a `study` section. Out: `PlannedRun`s.
Invariant: every row was applied to the base configuration and is valid; all rows are trained with one seed before the
next seed begins, so that a machine which grows slower does so for all rows alike.

    rows sliding, dti-50, seeds 0, 1      study-sliding-s0, study-dti-50-s0, study-sliding-s1, study-dti-50-s1
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dti_ray.config import RunConfig, StudyConfig, StudyRow, TuneConfig, with_values
from dti_ray.errors import ConfigError, Fault

# A study compares in one process: what a row costs is then the row's, not a cluster's.
IN_ONE_PROCESS = {"train.engine": "torch", "cluster.workers": 1}


@dataclass(frozen=True)
class PlannedRun:
    """One row with one seed.

    Attributes:
        row: its name.
        seed: `train.seed`.
        config: of the run, complete.
        contexts: context at inference of each evaluation (interactions).
        splits: that are evaluated.
    """

    row: str
    seed: int
    config: RunConfig
    contexts: tuple[int, ...]
    splits: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name below `<root>/runs`."""
        return self.config.train.run

    @property
    def again(self) -> PlannedRun:
        """Return the same under a name of its own, for somebody who wants to see it with their own eyes."""
        return replace(self, config=with_values(self.config, {"train.run": f"{self.name}-again"}))


def plan_study(base: RunConfig) -> tuple[PlannedRun, ...]:
    """Return all runs of a study, in the order in which they are trained.

    Args:
        base: what rows change.

    Raises:
        ConfigError: there is no row, or a key or value of one is wrong; one fault each, with the row's name.
    """
    study = base.study
    if not study.rows:
        hint = "name a file with one, as in -c configs/study_smoke.yaml"
        raise ConfigError(Fault("study.rows", "holds nothing", "name -> a way of training", hint))
    faults = [fault for name, row in study.rows.items() for fault in _faults(base, name, row)]
    if faults:
        raise ConfigError(*faults)
    return tuple(
        _planned(base, name, row, seed)
        for seed in _seeds(study)
        for name, row in study.rows.items()
        if seed in (row.seeds or study.seeds)
    )


def run_name(study: str, row: str, seed: int) -> str:
    """Return the name of a row's run with one seed."""
    return f"{study}-{row}-s{seed}"


def _seeds(study: StudyConfig) -> list[int]:
    """Return each seed once, those of the study first."""
    return list(dict.fromkeys([*study.seeds, *(seed for row in study.rows.values() for seed in row.seeds or ())]))


def _faults(base: RunConfig, name: str, row: StudyRow) -> list[Fault]:
    """Return what is wrong with a row; its seeds change nothing of it."""
    ours = [key for key in row.change if key in IN_ONE_PROCESS]
    if ours:
        expected = "other keys: a study trains in one process"
        return [Fault(f"row {name}: {key}", "is set by the study", expected) for key in ours]
    try:
        _planned(base, name, row, (row.seeds or base.study.seeds)[0])
    except ConfigError as error:
        return [replace(fault, where=f"row {name}: {fault.where}") for fault in error.faults]
    return []


def _planned(base: RunConfig, name: str, row: StudyRow, seed: int) -> PlannedRun:
    own = {
        "train.run": run_name(base.study.name, name, seed),
        "train.seed": seed,
        "telemetry.group": base.telemetry.group or base.study.name,
    }
    config = with_values(base, {**row.change, **IN_ONE_PROCESS, **own})
    config = config.model_copy(update={"study": StudyConfig(), "tune": TuneConfig()})
    contexts = tuple(dict.fromkeys(row.contexts)) or (config.eval_n,)
    return PlannedRun(name, seed, config, contexts, ("valid", "test") if row.final else ("valid",))
