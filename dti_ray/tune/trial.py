"""One trial under Ray Tune: a normal launch, whose validations the keeper judges.

Stage: tune, in a small process of its own. In: the name of a run. Out: its events, told to the keeper.
Invariant: a trial that is ended early saves its state and ends by itself, so none of its workers is left over; a
failure is told, not raised, so Ray Tune never restarts what the keeper counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import ray
from ray.actor import ActorProxy

from dti_ray.config import RunConfig, config_hash
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError, DtiRayError, InputError, StoppedError
from dti_ray.estimate import flops_per_target
from dti_ray.telemetry import Line
from dti_ray.train.checkpoint import adopt, list_checkpoints
from dti_ray.train.launch import Inputs, Launch, check_launch, launch
from dti_ray.tune.decide import Decision
from dti_ray.tune.keeper import Job, Keeper
from dti_ray.tune.ledger import Status


class Given(TypedDict):
    """What Ray Tune knows of a trial."""

    run: str


@dataclass(frozen=True)
class TrialParts:
    """What all trials share.

    Attributes:
        base: configuration that trials change.
        keeper: of the sweep.
        inputs: in the object store: the data set, opened, and its tokens.
        table: the tokens alone, which workers take from there.
    """

    base: RunConfig
    keeper: ActorProxy[Keeper]
    inputs: ray.ObjectRef[Inputs]
    table: ray.ObjectRef[TokenTable]


def run_trial(given: Given, parts: TrialParts) -> None:
    """Train one run to its end, or until the keeper ends it."""
    job = ray.get(parts.keeper.job.remote(given["run"]))
    try:
        _run(job, parts)
    except DtiRayError as error:
        would_fail_again = isinstance(error, (ConfigError, InputError))
        ray.get(parts.keeper.fail.remote(job.name, "; ".join(map(str, error.faults)), would_fail_again))


def _run(job: Job, parts: TrialParts) -> None:
    is_shared = shares_inputs(parts.base, job.config)
    checked = check_launch(job.config, ray.get(parts.inputs) if is_shared else None)
    flops = flops_per_target(checked.config, checked.dataset, checked.table)
    ray.get(parts.keeper.cost.remote(job.name, flops))
    if job.source is not None:
        _take_over(checked, job.source)
    decision: Decision | None = None

    def on_line(kind: str, line: Line) -> bool:
        nonlocal decision
        if kind == "valid":
            found = ray.get(parts.keeper.report.remote(job.name, line))
            decision = found if found.kind != "go on" else None
        return decision is not None

    def on_text(text: str) -> None:
        parts.keeper.say.remote(f"{job.name}: {text}")

    try:
        progress = launch(checked, on_line, on_text, parts.table if is_shared else None)
    except StoppedError:
        if decision is None:
            raise
        progress = list_checkpoints(checked.storage, checked.folder)[-1].progress
        if decision.kind == "change":
            ray.get(parts.keeper.change.remote(job.name, decision))
        else:
            ray.get(parts.keeper.end.remote(job.name, Status.STOPPED, progress, decision.reason))
    else:
        ray.get(parts.keeper.end.remote(job.name, Status.DONE, progress, ""))


def shares_inputs(base: RunConfig, config: RunConfig) -> bool:
    """Say whether two runs read the same tokens."""
    names = ("name_or_path", "gguf_file")
    are_same_models = all(getattr(base.model, name) == getattr(config.model, name) for name in names)
    return base.prompt == config.prompt and are_same_models


def _take_over(checked: Launch, source: str) -> None:
    """Copy the newest state of another run, unless this one has a state."""
    storage = checked.storage
    if list_checkpoints(storage, checked.folder):
        return
    states = list_checkpoints(storage, f"runs/{source}")
    if states:
        adopt(storage, states[-1], checked.folder, config_hash(checked.config))
