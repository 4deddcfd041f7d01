"""The series that a run exports while it trains or scores, and a server while it serves, each declared once.

Stage: beside training and serving; what the dashboard, the alert rules and docs/monitoring.md name is held against
these tables by tests. In: nothing. Out: `SERIES` of training, `SCORING`, `SERVING`.
Invariant: a series of training is the value at one key of one kind of line, so files, terminal and scrape show the same
numbers.
Means and sums are over all workers: a line is written once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ENDINGS = {"gauge": "", "counter": "_total", "histogram": "_bucket"}
LATENCY_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
RUN = "run"  # the kind of line that says what holds for a run as a whole; it is in no file


@dataclass(frozen=True)
class Series:
    """One declared series.

    Attributes:
        name: as Ray is told it.
        kind: a gauge is the newest value; a counter adds up the values of all lines; a histogram counts them by size.
        unit: of the value; empty for a plain number.
        line: kind of line that it is read from.
        key: of that line.
        description: one phrase.
        bounds: of a histogram's buckets.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    line: Literal["train", "valid", "run", "request", "batch", "reload"]
    key: str
    description: str
    bounds: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """Name at the endpoint: Ray puts `ray_` in front, Prometheus' format an ending behind all but gauges."""
        return f"ray_{self.name}{ENDINGS[self.kind]}"


SERIES = (
    Series("dti_targets_per_second", "gauge", "targets/s", "train", "targets_per_s", "targets trained a second"),
    Series("dti_tokens_per_second", "gauge", "tokens/s", "train", "tokens_per_s", "tokens trained a second"),
    Series("dti_mfu_ratio", "gauge", "share", "train", "mfu", "model FLOPs over the devices' peak, where it is known"),
    Series("dti_padding_ratio", "gauge", "share", "train", "padding", "positions of a pass that hold no token"),
    Series("dti_loss", "gauge", "nats/target", "train", "loss", "mean training loss since the last line"),
    Series("dti_learning_rate", "gauge", "", "train", "lr", "learning rate of the last step"),
    Series("dti_gradient_norm", "gauge", "", "train", "grad_norm", "norm of the last step's gradient, before clipping"),
    Series("dti_valid_auc", "gauge", "", "valid", "auc", "AUC of the newest validation"),
    Series("dti_valid_log_loss", "gauge", "nats/target", "valid", "log_loss", "log loss of the newest validation"),
    Series("dti_steps", "gauge", "steps", "train", "step", "optimizer steps done"),
    Series("dti_targets", "gauge", "targets", "train", "targets", "targets trained, all epochs"),
    Series("dti_targets_planned", "gauge", "targets", "run", "targets_planned", "targets that the run trains in all"),
    Series("dti_skipped_steps", "gauge", "steps", "train", "skipped", "steps left out: a loss or gradient not finite"),
    Series("dti_restarts", "gauge", "times", "run", "restarts", "times that this command had to start workers again"),
    Series(
        "dti_checkpoint_blocked_seconds", "counter", "s", "train", "checkpoint_s",
        "time for which training waited for a state to be copied or queued",
    ),
    Series("dti_data_wait_ratio", "gauge", "share", "train", "data_wait", "share of the time spent waiting for rows"),
    Series("dti_quarantined_rows", "gauge", "rows", "run", "quarantined_rows", "rows of the log put to quarantine"),
)  # fmt: skip

SCORING = (Series("dti_score_progress_ratio", "gauge", "share", "run", "scored_units", "units of batch scoring done"),)

SERVING = (
    Series("dti_serve_requests", "counter", "requests", "request", "count", "requests answered, by route and status"),
    Series(
        "dti_serve_latency_seconds", "histogram", "s", "request", "seconds",
        "time from a request's arrival at the door to its answer, by route", LATENCY_BOUNDS_S,
    ),
    Series("dti_serve_waiting_requests", "gauge", "requests", "request", "waiting", "requests without an answer yet"),
    Series(
        "dti_serve_batch_requests", "histogram", "requests", "batch", "size", "requests scored together", BATCH_BOUNDS,
    ),
    Series("dti_serve_reloads", "counter", "times", "reload", "taken", "newer states that took an older one's place"),
    Series("dti_serve_failed_reloads", "counter", "times", "reload", "failed", "newer states that could not be used"),
)  # fmt: skip
