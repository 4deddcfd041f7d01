"""What is checked before the first trial of a sweep: its space, its budget, its name, its cluster.

Stage: tune, before all trials. In: a `RunConfig` with a `tune` section; the nodes of a cluster. Out: a `Sweep`, and how
many trials train at once.
Invariant: every bound and choice was applied to the base configuration, rows and model included, so that a sweep which
starts does not end over a value that nobody tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dti_ray.config import RunConfig
from dti_ray.data.pipeline import TrainingRows
from dti_ray.errors import ConfigError, Fault, InputError
from dti_ray.model.shape import build_shape
from dti_ray.storage import Storage
from dti_ray.telemetry.trackers import check_trackers
from dti_ray.train.identity import check_same_base
from dti_ray.train.inputs import Inputs, anywhere, check_fits, open_inputs, shares_inputs
from dti_ray.tune.keeper import config_of
from dti_ray.tune.ledger import RunState
from dti_ray.tune.retention import states_gb
from dti_ray.tune.search import check_plan, plan_ahead, plan_first
from dti_ray.tune.space import check_space, check_together, corners

STATE_BYTES_PER_WEIGHT = 12  # the weight and AdamW's two moments, fp32


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


def check_sweep(config: RunConfig) -> Sweep:
    """Check all that can be checked without a cluster: every bound and choice, applied to the base configuration.

    Raises:
        ConfigError: a key, bound or choice does not fit, or the budget is too small for one state.
        InputError: the data set is not prepared, or the sweep's name is taken by another base configuration.
        StorageError: the root cannot be reached or written.
    """
    config = anywhere(config)
    check_trackers(config.telemetry)
    check_plan(config.tune)
    check_space(config, config.tune.space)
    first = plan_first(config, [])
    planned = [*first, *plan_ahead(config.tune, first)]
    check_together(config, [trial.params for trial in planned])
    storage = Storage(config.storage.root)
    storage.check_writable()
    _check_same_base(config, storage)
    inputs = open_inputs(config, storage)
    _check_trials_fit(config, inputs)
    if config.tune.max_gb is not None:
        _check_budget(config, inputs, config.tune.max_gb, max(len(planned), config.tune.trials))
    total = TrainingRows(inputs.dataset, inputs.table, config, through_ray=False).total_targets
    _check_milestones(config, total)
    return Sweep(config, storage, inputs, total)


def concurrency(config: RunConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """Return how many trials a cluster can train at once, at most `tune.max_concurrent`.

    A worker lies on one node; beside its workers each trial needs one CPU for packing.

    Args:
        config: of the sweep.
        nodes: CPUs and GPUs of each node.

    Raises:
        ConfigError: it cannot hold one trial.
    """
    cluster = config.cluster
    needs = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    needs = {name: need for name, need in needs.items() if need}
    places = sum(min(int(node.get(name, 0.0) // need) for name, need in needs.items()) for node in nodes)
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    of_a_trial = cluster.workers * cluster.cpus_per_worker + 1
    faults: list[Fault] = []
    if places < cluster.workers:
        each = " and ".join(f"{need:g} {name}s" for name, need in needs.items())
        have = ", ".join(" and ".join(f"{node.get(name, 0.0):g} {name}s" for name in needs) for node in nodes)
        faults.append(
            Fault(
                "cluster.workers", f"a trial needs {cluster.workers} workers with {each} each",
                f"at most {places}, as the cluster's nodes have {have}", "lower it, or join a larger cluster",
            )
        )  # fmt: skip
    elif cpus < of_a_trial:
        problem = f"a trial needs {of_a_trial:g} CPUs: those of its workers, and one for packing"
        faults.append(Fault("cluster.cpus_per_worker", problem, f"at most {cpus:g}, as the cluster has"))
    if faults:
        raise ConfigError(*faults)
    at_once = min(config.tune.max_concurrent, places // cluster.workers, int(cpus // of_a_trial))
    if config.tune.scheduler == "pbt" and at_once == 1:
        problem = "pbt compares trials that train at once, and the cluster holds one"
        raise ConfigError(Fault("tune.scheduler", problem, hint="join a larger cluster, or use asha"))
    return at_once


def _check_same_base(config: RunConfig, storage: Storage) -> None:
    if not storage.exists(f"sweeps/{config.tune.sweep}/config.yaml"):
        _check_no_old_runs(config, storage)
    check_same_base("tune.sweep", config.tune.sweep, config, storage)


def _check_trials_fit(config: RunConfig, inputs: Inputs) -> None:
    """Refuse bounds and choices whose rows or models do not fit, and a budget that holds no state."""
    faults: list[Fault] = []
    for key, value in corners(config.tune.space):
        run = RunState("corner", 0, config.tune.seeds[0])
        changed = config_of(config, {key: value}, run, config.tune.trials)
        try:
            own = inputs if shares_inputs(config, changed) else open_inputs(changed, inputs.dataset.storage)
            check_fits(changed, own)
        except (ConfigError, InputError) as error:
            faults.extend(Fault(f"tune.space {key}={value}", str(fault)) for fault in error.faults)
    if faults:
        raise ConfigError(*faults)


def _check_no_old_runs(config: RunConfig, storage: Storage) -> None:
    """Refuse a new sweep whose runs would meet those of a deleted one."""
    of_sweep = re.compile(rf"{re.escape(config.tune.sweep)}-\d{{4,}}-s\d+(-g\d+)?")
    names = [path.rpartition("/")[2] for path in storage.list("runs")]
    old = [name for name in names if of_sweep.fullmatch(name)]
    if old:
        hint = "delete them, or choose another tune.sweep"
        raise InputError(
            Fault(storage.display("runs", old[0]), f"is one of {len(old)} runs without a ledger", hint=hint)
        )


def _check_milestones(config: RunConfig, total_targets: int) -> None:
    """Refuse a scheduler that would have nothing to compare before the end."""
    needed = {
        "eval.every_targets": (config.tune.scheduler != "none", config.eval.every_targets),
        "tune.grace_targets": (config.tune.scheduler in ("asha", "median"), config.tune.grace_targets),
        "tune.perturb_targets": (config.tune.scheduler == "pbt", config.tune.perturb_targets),
    }
    faults = [
        Fault(
            name, f"got {value:,}, and a run has {total_targets:,} targets",
            f"less, so that tune.scheduler={config.tune.scheduler} has something to compare before the end",
        )
        for name, (is_used, value) in needed.items()
        if is_used and value is not None and value >= total_targets
    ]  # fmt: skip
    if faults:
        raise ConfigError(*faults)


def _check_budget(config: RunConfig, inputs: Inputs, max_gb: float, trials: int) -> None:
    trained = sum(weight.numel() for weight in build_shape(config, inputs.table).parameters() if weight.requires_grad)
    state_gb, share_gb = trained * STATE_BYTES_PER_WEIGHT / 1e9, states_gb(config.tune, trials)
    if state_gb > share_gb:
        raise ConfigError(
            Fault(
                "tune.max_gb", f"got {max_gb:g}, of which each run's states may take {share_gb:.3g}",
                f"at least {max_gb * state_gb / share_gb:.3g}, as one state has about {state_gb:.3g}",
                "raise it, or lower tune.keep_best, tune.max_concurrent or the number of seeds",
            )
        )  # fmt: skip
