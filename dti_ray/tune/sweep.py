"""From a configuration to a finished sweep: everything is checked on the driver, then Ray Tune runs the trials.

Stage: tune, its entry. In: a `RunConfig` with a `tune` section. Out: `sweeps/<name>/`: ledger, tables, the best
configuration; below `runs/` the runs of the best trials alone.
Invariant: the same command again goes on from the ledger: what has ended is not run again. Another base
configuration under the same name is refused.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions
from pyarrow import csv
from pyarrow import parquet as pq
from ray import tune
from ray.actor import ActorProxy
from ray.tune.search import Searcher

from dti_ray.cluster import this_node
from dti_ray.config import RunConfig, to_yaml
from dti_ray.errors import Fault, RunError
from dti_ray.tune.checks import Sweep, concurrency
from dti_ray.tune.keeper import Keeper, Turn, config_of
from dti_ray.tune.ledger import Ledger, RunState, SweepState, count_reruns
from dti_ray.tune.results import TrialResult, best, results, table
from dti_ray.tune.trial import TrialParts, run_trial

TRIAL_CPUS = 0.1  # of the process that waits for the workers of a trial
LOOK_S = 1.0
# The ledger is the log; and Ctrl-C ends the command: Tune would take it for the end of the sweep.
TUNE_SETTINGS = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}

OnLook = Callable[[SweepState, list[str]], None]


@dataclass(frozen=True)
class Finished:
    """What came of a sweep.

    Attributes:
        best: None where no trial saw all its targets.
        best_config: path of its configuration, as a user would type it.
        reruns: runs that were started although they had ended: none, or the sweep is wrong.
    """

    state: SweepState
    results: tuple[TrialResult, ...]
    best: TrialResult | None
    best_config: str | None
    ledger: str
    reruns: int


def run_sweep(sweep: Sweep, on_look: OnLook) -> Finished:
    """Run what is left of a sweep, and write its results.

    Args:
        sweep: from `check_sweep`; Ray must be running.
        on_look: called about once a second with where the sweep stands and what there is to say.

    Raises:
        ConfigError: the cluster cannot hold one trial.
        InputError: another process works on the sweep.
        RunError: the keeper of the ledger was lost.
    """
    at_once = concurrency(sweep.base, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if not sweep.storage.exists(f"{sweep.folder}/config.yaml"):
        sweep.storage.write(f"{sweep.folder}/config.yaml", to_yaml(sweep.base).encode())
    keeper = (
        ray.remote(num_cpus=0)(Keeper).options(scheduling_strategy=this_node()).remote(sweep.base, sweep.total_targets)
    )
    if at_once < (wanted := sweep.base.tune.max_concurrent):
        keeper.say.remote(f"at most {at_once} of {wanted} trials train at once: the cluster holds no more")
    inputs = sweep.inputs
    parts = TrialParts(sweep.base, keeper, inputs.dataset, inputs.tokenizer, ray.put(inputs.table))
    try:
        with _looking(keeper, on_look), tempfile.TemporaryDirectory(prefix="dti-ray-tune-") as folder:
            _run_trials(parts, at_once, folder)
        ray.get(keeper.clean.remote())
    except ray.exceptions.RayActorError as error:
        hint = "the same command goes on from the ledger"
        raise RunError(Fault(f"sweep {sweep.base.tune.sweep}", f"lost its keeper: {error}", hint=hint)) from error
    return write_results(sweep)


def _run_trials(parts: TrialParts, at_once: int, folder: str) -> None:
    os.environ.update(TUNE_SETTINGS)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, parts=parts), {"CPU": TRIAL_CPUS}),
        tune_config=tune.TuneConfig(search_alg=FromKeeper(parts.keeper), num_samples=-1, max_concurrent_trials=at_once),
        run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0),
    )
    with redirect_stdout(io.StringIO()):  # Tune prints a banner whatever its verbosity; stdout is for `--json`
        tuner.fit()


def write_results(sweep: Sweep) -> Finished:
    """Write what a sweep's ledger amounts to: tables of all runs, the configuration of the best trial."""
    ledger, storage, metric = Ledger(sweep.storage, sweep.base.tune.sweep), sweep.storage, sweep.base.tune.metric
    state = ledger.state()
    found = results(state, metric)
    winner, best_config = best(found, metric), None
    rows = table(state, metric)
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    storage.write(f"{sweep.folder}/trials.parquet", sink.getvalue().to_pybytes())
    sink = pa.BufferOutputStream()
    csv.write_csv(rows, sink)
    storage.write(f"{sweep.folder}/trials.csv", sink.getvalue().to_pybytes())
    if winner is not None:
        storage.write(f"{sweep.folder}/best.yaml", best_yaml(sweep.base, winner, state.runs[winner.runs[0]]).encode())
        best_config = storage.display(sweep.folder, "best.yaml")
    return Finished(
        state, tuple(found), winner, best_config, storage.display(ledger.path), count_reruns(ledger.events)
    )  # fmt: skip


def best_yaml(base: RunConfig, winner: TrialResult, run: RunState) -> str:
    """Return the configuration of a trial's first run, for `dti-ray train -c`; its last learning rate after pbt."""
    config = config_of(base, winner.params, run, 1)
    train = config.train.model_copy(update={"run": f"{base.tune.sweep}-best-{winner.number:04d}"})
    return to_yaml(config.model_copy(update={"checkpoint": base.checkpoint, "train": train}))


class FromKeeper(Searcher):
    """Lets Ray Tune ask the keeper for the next run."""

    def __init__(self, keeper: ActorProxy[Keeper]) -> None:
        super().__init__()
        self.keeper, self.given = keeper, dict[str, str]()

    def suggest(self, trial_id: str) -> Any:
        """Return the next run; None: ask again later; FINISHED: none is left."""
        found = ray.get(self.keeper.next.remote())
        if found in (Turn.WAIT, Turn.END):
            return None if found == Turn.WAIT else Searcher.FINISHED
        self.given[trial_id] = found
        return {"run": found}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:  # noqa: ARG002
        """Take note of a trial whose process died."""
        if error:
            ray.get(self.keeper.lose.remote(self.given[trial_id]))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is the searcher's state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the ledger is the searcher's state."""


@contextmanager
def _looking(keeper: ActorProxy[Keeper], on_look: OnLook) -> Iterator[None]:
    """Call `on_look` beside the block, and once behind it."""
    ended = threading.Event()

    def look_once() -> None:
        with suppress(ray.exceptions.RayActorError):  # whoever waits for the trials meets it too
            on_look(*ray.get(keeper.look.remote()))

    def look() -> None:
        while not ended.wait(LOOK_S):
            look_once()

    thread = threading.Thread(target=look, daemon=True, name="look")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look_once()
