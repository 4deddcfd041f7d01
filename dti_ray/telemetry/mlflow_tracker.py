"""MLflow's view of a run.

Stage: beside training, in a courier's thread. In: lines. Out: metrics of one MLflow run, over targets.
Invariant: a run has one MLflow run, found again by the tag `dti_ray.id`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dti_ray.telemetry.courier import Entry, TrackedRun
from dti_ray.telemetry.sinks import LINES

if TYPE_CHECKING:  # an extra: imported by the courier's thread
    from mlflow.entities import Metric, Run  # pyright: ignore[reportMissingImports]

EXPERIMENT = "dti_ray"
TAG = "dti_ray.id"
GROUP = "dti_ray.group"
MOST_METRICS, MOST_PARAMS = 1000, 100  # of one request, by MLflow's limits
# The courier tries again by itself; MLflow alone would wait for minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MlflowTracker:
    """A run on an MLflow server; see `Tracker`.

    Args:
        uri: of the server, or of a database such as sqlite:////home/me/mlflow.db.
        run: whose lines they are.
    """

    def __init__(self, uri: str, run: TrackedRun) -> None:
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        self.client = MlflowClient(tracking_uri=uri)
        found = self._find_or_create(run)
        self.run_id = found.info.run_id
        if not found.data.params:  # MLflow takes no second value of a parameter
            self._describe(run)
        self.client.update_run(self.run_id, status="RUNNING")
        known = found.data.metrics
        self.told = {kind: known[f"{kind}/targets"] for kind in LINES if f"{kind}/targets" in known}

    def send(self, entries: Sequence[Entry]) -> None:
        """See `Tracker`."""
        metrics = [metric for entry in entries for metric in _metrics(entry)]
        for start in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + MOST_METRICS])

    def close(self, is_finished: bool) -> None:
        """See `Tracker`."""
        self.client.set_terminated(self.run_id, "FINISHED" if is_finished else "KILLED")

    def _find_or_create(self, run: TrackedRun) -> Run:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        number = experiment.experiment_id if experiment else self.client.create_experiment(EXPERIMENT)
        found = self.client.search_runs([number], f"tags.`{TAG}` = '{run.id}'")
        tags = {TAG: run.id} if run.group is None else {TAG: run.id, GROUP: run.group}
        return found[0] if found else self.client.create_run(number, run_name=run.name, tags=tags)

    def _describe(self, run: TrackedRun) -> None:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        params = [Param(key, str(value)) for key, value in run.config.items()]
        for start in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(self.run_id, params=params[start : start + MOST_PARAMS])


def _metrics(entry: Entry) -> Iterator[Metric]:
    from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

    for name, value in entry.line.items():
        yield Metric(f"{entry.kind}/{name}", value, int(1000 * entry.at_s), int(entry.line["targets"]))
