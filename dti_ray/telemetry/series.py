"""The series that a run exports while it runs, each declared once.

Stage: beside training; what the dashboard, the alert rules and docs/monitoring.md name is held against this table by
tests. In: nothing. Out: `SERIES`.
Invariant: a series is the value at one key of one kind of line, so files, terminal and scrape show the same numbers.
Means and sums are over all workers: a line is written once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RUN = "run"  # the kind of line that says what holds for a run as a whole; it is in no file


@dataclass(frozen=True)
class Series:
    """One declared series.

    Attributes:
        name: as Ray is told it.
        kind: a gauge is the newest value; a counter adds up the values of all lines.
        unit: of the value; empty for a plain number.
        line: kind of line that it is read from.
        key: of that line.
        description: one phrase.
    """

    name: str
    kind: Literal["gauge", "counter"]
    unit: str
    line: Literal["train", "valid", "run"]
    key: str
    description: str

    @property
    def exported(self) -> str:
        """Name at the endpoint: Ray puts `ray_` in front, Prometheus' format `_total` behind a counter."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


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
