"""What is checked before the first run of a study: its rows, its rows' models and prompts, its name.

Stage: study, before all runs. In: a `RunConfig` with a `study` section. Out: a `Study`.
Invariant: whatever can be told to be wrong without training is told here, all of it at once, with the row's name;
nothing has been written then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dti_ray.config import RunConfig, with_values
from dti_ray.data.interactions import TEST
from dti_ray.data.pipeline import TrainingRows, tokens_per_target
from dti_ray.errors import ConfigError, Fault, InputError
from dti_ray.storage import Storage
from dti_ray.study.plan import IN_ONE_PROCESS, PlannedRun, plan_study
from dti_ray.study.rivals import check_installed
from dti_ray.train.host import training_device
from dti_ray.train.identity import check_same_base, check_same_run
from dti_ray.train.inputs import Inputs, anywhere, check_fits, open_inputs, shares_inputs
from dti_ray.tune.ledger import Ledger
from dti_ray.tune.space import identity


@dataclass(frozen=True, eq=False)
class Study:
    """A study that has passed every check.

    Attributes:
        base: configuration that rows change.
        storage: the root.
        runs: in the order in which they are trained.
        inputs: of each row.
        device: where all of it runs.
    """

    base: RunConfig
    storage: Storage
    runs: tuple[PlannedRun, ...]
    inputs: Mapping[str, Inputs]
    device: torch.device

    @property
    def name(self) -> str:
        """Name below `<root>/sweeps`."""
        return self.base.study.name

    @property
    def folder(self) -> str:
        """Path below the root."""
        return f"sweeps/{self.name}"

    @property
    def reference(self) -> str:
        """Row that all others are compared with."""
        return self.base.study.reference or next(iter(self.base.study.rows))

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that some row is evaluated on."""
        return ("valid", "test") if any("test" in run.splits for run in self.runs) else ("valid",)

    def of_row(self, row: str) -> list[PlannedRun]:
        """Return the runs of a row, by its seeds."""
        return [run for run in self.runs if run.row == row]

    def total_targets(self, run: PlannedRun) -> int:
        """Return the targets that a run trains, over all epochs."""
        return self._rows(run).total_targets

    def tokens(self, run: PlannedRun) -> float:
        """Estimate the tokens that a run trains, from the length of its prompts."""
        rows, tail = self._rows(run), run.config.optim.sliding_tail
        streamed, alone = (tokens_per_target(spec, rows.table) for spec in (rows.spec, rows.spec.sliding()))
        return ((1 - tail) * streamed + tail * alone) * rows.total_targets

    def _rows(self, run: PlannedRun) -> TrainingRows:
        inputs = self.inputs[run.row]
        return TrainingRows(inputs.dataset, inputs.table, run.config, through_ray=False)


def check_study(config: RunConfig) -> Study:
    """Check all that can be checked without training.

    Raises:
        ConfigError: a row's key or value is wrong, its rows or model do not fit, or a package of the extra is missing.
        InputError: the data set is not prepared, or the study's name was used for something else.
        StorageError: the root cannot be reached or written.
    """
    if config.study.classical:
        check_installed()
    device = training_device()
    here = {**IN_ONE_PROCESS, "cluster.gpus_per_worker": int(device.type == "cuda")}
    base = anywhere(with_values(config, here))
    runs = plan_study(base)
    storage = Storage(base.storage.root)
    storage.check_writable()
    check_same_base("study.name", base.study.name, base, storage)
    _check_same_rows(base, Ledger(storage, base.study.name), runs)
    inputs = _open_all(runs, storage)
    _check_fit(runs, inputs)
    for run in runs:
        check_same_run(run.config, storage)
    study = Study(base, storage, runs, inputs, device)
    dataset = inputs[study.reference].dataset
    if "test" in study.splits and dataset.targets[TEST] == 0:
        final = next(name for name, row in base.study.rows.items() if row.final)
        expected, hint = f"some, as row {final} is final", "check data.split, or leave `final` out"
        raise InputError(Fault(f"data set {dataset.name}", "has no test targets", expected, hint))
    return study


def _check_same_rows(base: RunConfig, ledger: Ledger, runs: Sequence[PlannedRun]) -> None:
    """Refuse rows that mean something else than when they were run; rows and seeds may be added."""
    if ledger.events and not any("study" in event for event in ledger.events):
        where = ledger.storage.display(ledger.path)
        raise InputError(Fault(where, "is the ledger of a sweep", "one of a study", "choose another study.name"))
    state, faults = ledger.state(), dict[str, Fault]()
    for run in runs:
        if run.name not in state.runs:
            continue
        before, now = state.trials[state.runs[run.name].trial].params, base.study.rows[run.row].change
        if identity(before) != identity(now):
            got, expected = (json.dumps(dict(change)) for change in (now, before))
            hint = "give the row a new name; what was run stays what it was"
            faults[run.row] = Fault(f"study.rows.{run.row}.change", f"got {got}", f"{expected} as it was run", hint)
    if faults:
        raise InputError(*faults.values())


def _open_all(runs: Iterable[PlannedRun], storage: Storage) -> dict[str, Inputs]:
    """Open the inputs of each row; rows that read the same tokens share them."""
    opened: list[tuple[RunConfig, Inputs]] = []
    by_row: dict[str, Inputs] = {}
    for run in runs:
        if run.row in by_row:
            continue
        found = next((inputs for config, inputs in opened if shares_inputs(config, run.config)), None)
        if found is None:
            found = open_inputs(run.config, storage)
            opened.append((run.config, found))
        by_row[run.row] = found
    return by_row


def _check_fit(runs: Iterable[PlannedRun], inputs: Mapping[str, Inputs]) -> None:
    """Refuse rows whose prompts or models do not fit, with the longest context that they will be asked with."""
    faults: list[Fault] = []
    for run in {run.row: run for run in runs}.values():
        asked = [run.config, with_values(run.config, {"eval.n": max(run.contexts)})]
        try:
            for config in asked:
                check_fits(config, inputs[run.row])
        except ConfigError as error:
            faults.extend(replace(fault, where=f"row {run.row}: {fault.where}") for fault in error.faults)
    if faults:
        raise ConfigError(*faults)
