"""Which runs of a sweep stay on storage, and how much of it each may take.

Stage: tune; pure decisions. In: the state of a sweep, the folders below `runs/`. Out: those to delete.
Invariant: a run that has not ended stays, and so do the runs of the best trials; nothing of another sweep is named.

    keep_best 1, trials 0 (0.70), 1 (0.72), 2 running:   the runs of trial 0 go
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dti_ray.config import TuneConfig
from dti_ray.tune.ledger import SweepState
from dti_ray.tune.results import ranked, results

GENERATION = re.compile(r"-g\d+$")  # of a run that took over another one's state
UNFINISHED_STATES = 2  # parts of a run's share: one holds what is kept, one the state that is being written


def to_delete(state: SweepState, tune: TuneConfig, folders: Sequence[str]) -> list[str]:
    """Return the folders of a sweep's runs that need not stay.

    Args:
        state: of the sweep.
        tune: its configuration.
        folders: names of all that lies below `runs/`.
    """
    runs = state.runs.values()
    if tune.scheduler == "pbt" and not all(run.status.is_final for run in runs):
        # Any run may still be taken over; what a run has left behind is wanted until its follower has started.
        stay = {folder for run in runs for folder in (run.folder, *run.sources)}
    else:
        best = {trial.number for trial in ranked(results(state, tune.metric), tune.metric)[: tune.keep_best]}
        ended = {number for number in state.trials if all(run.status.is_final for run in state.of_trial(number))}
        stay = {run.folder for run in runs if run.trial not in ended or run.trial in best}
    return [folder for folder in folders if GENERATION.sub("", folder) in state.runs and folder not in stay]


def states_gb(tune: TuneConfig, trials: int) -> float:
    """Return what the kept states of one run may take of a sweep's budget (GB).

    Runs that may lie there at once: those of the best trials and of the trials at work. Half of a run's share is
    left for the state that is being written.

    Args:
        tune: of the sweep.
        trials: known ones; a population keeps all their states until its end, and those that are being left.
    """
    assert tune.max_gb is not None, "asked only where there is a budget"
    at_once = 2 * trials if tune.scheduler == "pbt" else tune.keep_best + tune.max_concurrent
    return tune.max_gb / (at_once * len(tune.seeds)) / UNFINISHED_STATES
