"""From a configuration to a finished sweep: everything is checked on the driver, then Ray Tune runs the trials.

Stage: tune, its entry. In: a `RunConfig` with a `tune` section. Out: `sweeps/<name>/`: ledger, tables, the best
configuration; below `runs/` the runs of the best trials alone.
Invariant: the same command again goes on from the ledger: what has ended is not run again. Another base
configuration under the same name is refused.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from pyarrow import csv
from pyarrow import parquet as pq
from ray import tune
from ray.actor import ActorProxy
from ray.tune.search import Searcher

from dti_ray.config import RunConfig, differences, from_yaml, to_yaml
from dti_ray.data.pipeline import TrainingRows
from dti_ray.errors import ConfigError, Fault, InputError
from dti_ray.model.shape import build_shape
from dti_ray.storage import Storage
from dti_ray.train.launch import Inputs, anywhere, check_fits, open_inputs
from dti_ray.tune.keeper import Keeper, Turn, config_of
from dti_ray.tune.ledger import Ledger, RunState, SweepState, count_reruns
from dti_ray.tune.results import TrialResult, best, results, table
from dti_ray.tune.retention import states_gb
from dti_ray.tune.search import check_plan, plan_ahead, plan_first
from dti_ray.tune.space import check_space, check_together, corners
from dti_ray.tune.trial import TrialParts, run_trial, shares_inputs

TRIAL_CPUS = 0.1  # of the process that waits for the workers of a trial
LOOK_S = 1.0
STATE_BYTES_PER_WEIGHT = 12  # the weight and AdamW's two moments, fp32
QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}  # the ledger is the log

OnLook = Callable[[SweepState, list[str]], None]


@dataclass(frozen=True)
class Sweep:
    """A sweep that has passed every check that needs no cluster.

    Attributes:
        base: configuration that trials change.
        total_targets: of one run.
    """

    base: RunConfig
    storage: Storage
    inputs: Inputs
    total_targets: int

    @property
    def folder(self) -> str:
        """Path of the sweep below the root."""
        return f"sweeps/{self.base.tune.sweep}"


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


def check_sweep(config: RunConfig) -> Sweep:
    """Check all that can be checked without a cluster: every bound and choice, applied to the base configuration.

    Raises:
        ConfigError: a key, bound or choice does not fit, or the budget is too small for one state.
        InputError: the data set is not prepared, or the sweep's name is taken by another base configuration.
        StorageError: the root cannot be reached or written.
    """
    config = anywhere(config)
    check_plan(config.tune)
    check_space(config, config.tune.space)
    first = plan_first(config, [])
    check_together(config, [trial.params for trial in [*first, *plan_ahead(config.tune, first)]])
    storage = Storage(config.storage.root)
    storage.check_writable()
    _check_same_base(config, storage)
    inputs = open_inputs(config, storage)
    _check_trials_fit(config, inputs)
    total = TrainingRows(inputs.dataset, inputs.table, config, through_ray=False).total_targets
    if config.tune.scheduler != "none" and config.eval.every_targets >= total:
        raise ConfigError(
            Fault(
                "eval.every_targets", f"got {config.eval.every_targets:,}, and a run has {total:,} targets",
                f"less, so that tune.scheduler={config.tune.scheduler} has something to compare before the end",
            )
        )  # fmt: skip
    return Sweep(config, storage, inputs, total)


def concurrency(config: RunConfig, have: Mapping[str, float]) -> int:
    """Return how many trials a cluster can train at once, at most `tune.max_concurrent`.

    Args:
        config: of the sweep.
        have: CPUs and GPUs of the cluster.

    Raises:
        ConfigError: it cannot hold one trial.
    """
    cluster, spare = config.cluster, 1.0  # without a spare CPU Ray cannot replace a dead worker
    needs = {
        "CPU": cluster.workers * cluster.cpus_per_worker + TRIAL_CPUS,
        "GPU": cluster.workers * cluster.gpus_per_worker,
    }
    free = {"CPU": have.get("CPU", 0.0) - spare, "GPU": have.get("GPU", 0.0)}
    faults = [
        Fault(
            f"cluster.{name.lower()}s_per_worker", f"a trial needs {need:g} {name}s",
            f"at most {free[name]:g}, as the cluster has {have.get(name, 0.0):g}"
            + (" and one must stay to spare" if name == "CPU" else ""),
            "lower cluster.workers, or join a larger cluster with cluster.address",
        )
        for name, need in needs.items() if need > free[name]
    ]  # fmt: skip
    if faults:
        raise ConfigError(*faults)
    return min(config.tune.max_concurrent, *(int(free[name] // need) for name, need in needs.items() if need))


def run_sweep(sweep: Sweep, on_look: OnLook) -> Finished:
    """Run what is left of a sweep, and write its results.

    Args:
        sweep: from `check_sweep`; Ray must be running.
        on_look: called about once a second with where the sweep stands and what there is to say.

    Raises:
        ConfigError: the cluster cannot hold one trial.
        InputError: another process works on the sweep.
    """
    at_once = concurrency(sweep.base, ray.cluster_resources())
    if not sweep.storage.exists(f"{sweep.folder}/config.yaml"):
        sweep.storage.write(f"{sweep.folder}/config.yaml", to_yaml(sweep.base).encode())
    keeper = ray.remote(num_cpus=0)(Keeper).remote(sweep.base, sweep.total_targets)
    parts = TrialParts(sweep.base, keeper, ray.put(sweep.inputs), ray.put(sweep.inputs.table))
    with _looking(keeper, on_look), tempfile.TemporaryDirectory(prefix="dti-ray-tune-") as folder:
        os.environ.update(QUIET)
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, parts=parts), {"CPU": TRIAL_CPUS}),
            tune_config=tune.TuneConfig(search_alg=FromKeeper(keeper), num_samples=-1, max_concurrent_trials=at_once),
            run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0),
        ).fit()
    ray.get(keeper.clean.remote())
    return write_results(sweep)


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
        storage.write(f"{sweep.folder}/best.yaml", best_yaml(sweep.base, winner).encode())
        best_config = storage.display(sweep.folder, "best.yaml")
    return Finished(
        state, tuple(found), winner, best_config, storage.display(ledger.path), count_reruns(ledger.events)
    )  # fmt: skip


def best_yaml(base: RunConfig, winner: TrialResult) -> str:
    """Return a trial's configuration under the first of its seeds, for `dti-ray train -c`."""
    run = RunState(f"{base.tune.sweep}-best", winner.number, winner.seeds[0])
    config = config_of(base, winner.params, run)
    return to_yaml(config.model_copy(update={"checkpoint": base.checkpoint}))


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
            reason = "the process of the trial died; Ray's logs tell why"
            ray.get(self.keeper.fail.remote(self.given[trial_id], reason, False))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is the searcher's state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the ledger is the searcher's state."""


@contextmanager
def _looking(keeper: ActorProxy[Keeper], on_look: OnLook) -> Iterator[None]:
    """Call `on_look` beside the block, and once when it ends."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            on_look(*ray.get(keeper.look.remote()))

    thread = threading.Thread(target=look, daemon=True, name="look")
    thread.start()
    try:
        yield
        on_look(*ray.get(keeper.look.remote()))
    finally:
        ended.set()
        thread.join()


def _check_same_base(config: RunConfig, storage: Storage) -> None:
    path = f"sweeps/{config.tune.sweep}/config.yaml"
    if not storage.exists(path):
        return
    stored = from_yaml(storage.read(path).decode())
    found = differences(stored, config)
    if found:
        raise InputError(
            Fault(
                f"tune.sweep={config.tune.sweep}", "exists with another base configuration",
                hint="choose another tune.sweep, or use the stored values:",
            ),
            *found,
        )  # fmt: skip


def _check_trials_fit(config: RunConfig, inputs: Inputs) -> None:
    """Refuse bounds and choices whose rows or models do not fit, and a budget that holds no state."""
    faults: list[Fault] = []
    for key, value in corners(config.tune.space):
        run = RunState("corner", 0, config.tune.seeds[0])
        changed = config_of(config, {key: value}, run)
        try:
            own = inputs if shares_inputs(config, changed) else open_inputs(changed, inputs.dataset.storage)
            check_fits(changed, own)
        except (ConfigError, InputError) as error:
            faults.extend(Fault(f"tune.space {key}={value}", str(fault)) for fault in error.faults)
    if faults:
        raise ConfigError(*faults)
    if config.tune.max_gb is not None:
        _check_budget(config, inputs, config.tune.max_gb)


def _check_budget(config: RunConfig, inputs: Inputs, max_gb: float) -> None:
    trained = sum(weight.numel() for weight in build_shape(config, inputs.table).parameters() if weight.requires_grad)
    state_gb, share_gb = trained * STATE_BYTES_PER_WEIGHT / 1e9, states_gb(config.tune)
    if state_gb > share_gb:
        raise ConfigError(
            Fault(
                "tune.max_gb", f"got {max_gb:g}, of which each run's states may take {share_gb:.3g}",
                f"at least {max_gb * state_gb / share_gb:.3g}, as one state has about {state_gb:.3g}",
                "raise it, or lower tune.keep_best, tune.max_concurrent or the number of seeds",
            )
        )  # fmt: skip
