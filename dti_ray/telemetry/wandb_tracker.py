"""Weights & Biases' view of a run.

Stage: beside training, in a courier's thread. In: lines. Out: the history of one W&B run, over targets.
Invariant: a run has one W&B run, found again by its id.
"""

from __future__ import annotations

from collections.abc import Sequence

from dti_ray.errors import Fault
from dti_ray.telemetry.courier import Entry, TrackedRun
from dti_ray.telemetry.sinks import LINES

INIT_TIMEOUT_S = 30.0


class WandbTracker:
    """A run at Weights & Biases; see `Tracker`.

    With WANDB_MODE=offline nothing is known of what earlier commands have told, so each of them writes the run's whole
    history into a folder of its own, below WANDB_DIR.

    Args:
        project: that the run belongs to.
        run: whose lines they are.
    """

    def __init__(self, project: str, run: TrackedRun) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - an extra

        self.run = wandb.init(
            project=project, id=run.id, name=run.name, group=run.group, config=dict(run.config),
            resume="allow", allow_val_change=True, reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, disable_git=True, init_timeout=INIT_TIMEOUT_S
            ),
        )  # fmt: skip
        for kind in LINES:
            self.run.define_metric(f"{kind}/*", step_metric=f"{kind}/targets")
        known = {kind: self.run.summary.get(f"{kind}/targets") for kind in LINES}
        self.told = {kind: float(targets) for kind, targets in known.items() if targets is not None}

    def send(self, entries: Sequence[Entry]) -> None:
        """See `Tracker`."""
        for entry in entries:
            self.run.log({f"{entry.kind}/{name}": value for name, value in entry.line.items()})

    def close(self, is_finished: bool) -> None:
        """See `Tracker`."""
        self.run.finish(exit_code=0 if is_finished else 1)


def check_key() -> Fault | None:
    """Return what is wrong with the key for W&B's server, unless nothing shall be sent; never asks a person."""
    import wandb  # pyright: ignore[reportMissingImports]

    try:
        mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
        problem = None if mode != "online" or wandb.login(prompt=False, verify=False) else "no API key is set"
    except wandb.Error as error:
        problem = " ".join(str(error).split())
    hint = "set WANDB_API_KEY, or run `wandb login`, or set WANDB_MODE=offline"
    return None if problem is None else Fault("telemetry.wandb", problem, hint=hint)
