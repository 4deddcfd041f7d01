"""One trial under Ray Tune: a normal launch, whose validations the keeper judges.

Stage: tune, in a small process of its own. In: the name of a run. Out: its events, told to the keeper.
Invariant: a trial that is ended early saves its state and ends by itself, so none of its workers is left over; a
failure is told, not raised, so Ray Tune never restarts what the keeper counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import ray
from ray.actor import ActorProxy
from transformers import PreTrainedTokenizerBase

from dti_ray.config import RunConfig, config_hash
from dti_ray.data.interactions import Dataset
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError, DtiRayError, Fault, InputError, RunError, StoppedError
from dti_ray.estimate import flops_per_target
from dti_ray.telemetry import Line, read_lines
from dti_ray.train.checkpoint import adopt, list_checkpoints
from dti_ray.train.inputs import Inputs, shares_inputs
from dti_ray.train.launch import Launch, check_launch, launch
from dti_ray.tune.keeper import Job, Keeper


class Given(TypedDict):
    """What Ray Tune knows of a trial."""

    run: str


@dataclass(frozen=True)
class TrialParts:
    """What all trials share.

    Attributes:
        base: configuration that trials change.
        keeper: of the sweep.
        dataset: opened and verified.
        tokenizer: of the base configuration.
        table: its tokens, in the object store.
    """

    base: RunConfig
    keeper: ActorProxy[Keeper]
    dataset: Dataset
    tokenizer: PreTrainedTokenizerBase
    table: ray.ObjectRef[TokenTable]


def run_trial(given: Given, parts: TrialParts) -> None:
    """Train one run to its end, or until the keeper ends it."""
    name = given["run"]
    try:
        _run(name, ray.get(parts.keeper.job.remote(name)), parts)
    except DtiRayError as error:
        would_fail_again = isinstance(error, (ConfigError, InputError))
        ray.get(parts.keeper.fail.remote(name, "; ".join(map(str, error.faults)), would_fail_again))
    except Exception as error:  # noqa: BLE001 - one trial must not end the others; the ledger says what it was
        ray.get(parts.keeper.fail.remote(name, f"{type(error).__name__}: {error}", False))


def _run(name: str, job: Job, parts: TrialParts) -> None:
    keeper, is_shared = parts.keeper, shares_inputs(parts.base, job.config)
    inputs = Inputs(parts.dataset, ray.get(parts.table), parts.tokenizer) if is_shared else None
    checked = check_launch(job.config, inputs)
    ray.get(keeper.cost.remote(name, flops_per_target(checked.config, checked.dataset, checked.table)))
    take_over(checked, job.sources)

    def on_line(kind: str, line: Line) -> bool:
        return kind == "valid" and ray.get(keeper.report.remote(name, line)).kind != "go on"

    def on_text(text: str) -> None:
        keeper.say.remote(f"{name}: {text}")

    if any(on_line("valid", line) for line in unreported(checked, job.reported)):
        ray.get(keeper.settle.remote(name))
        return
    try:
        progress = launch(checked, on_line, on_text, parts.table if is_shared else None)
    except StoppedError:
        ray.get(keeper.settle.remote(name))
    else:
        ray.get(keeper.end.remote(name, progress))


def unreported(checked: Launch, reported: int) -> list[Line]:
    """Return the validations that a run has behind it, and that its trial could not tell before it died."""
    states = list_checkpoints(checked.storage, checked.folder)
    validated = states[-1].progress.validated if states else 0
    lines = read_lines(checked.storage, checked.folder, "valid")
    return [line for line in lines if reported < line["targets"] <= validated]


def take_over(checked: Launch, sources: Sequence[str]) -> None:
    """Copy to a run that has no state the newest one of the first source that has some left to train.

    Raises:
        RunError: none of them has.
    """
    storage = checked.storage
    if not sources or list_checkpoints(storage, checked.folder):
        return
    for source in sources:
        states = list_checkpoints(storage, f"runs/{source}")
        usable = [one for one in states if one.progress.targets < checked.total_targets]
        if usable:
            adopt(storage, usable[-1], checked.folder, config_hash(checked.config))
            return
    raise RunError(Fault(checked.folder, f"no state is left to take over in {', '.join(sources)}"))
