"""Which trackers a run has: checked before it starts, opened when it does.

Stage: launch. In: the `telemetry` section. Out: faults, or couriers.
Invariant: a tracker's package is imported only where it is asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from dti_ray.config import RunConfig
from dti_ray.config.telemetry import TelemetryConfig
from dti_ray.errors import ConfigError, Fault
from dti_ray.telemetry.courier import Courier, TrackedRun
from dti_ray.telemetry.mlflow_tracker import MlflowTracker
from dti_ray.telemetry.sinks import Line
from dti_ray.telemetry.wandb_tracker import WandbTracker, check_key

LONGEST_NAME = 100  # W&B takes ids of 128 characters
NOT_TOLD = ("tune", "telemetry")  # sections that say nothing of a single run


def check_trackers(telemetry: TelemetryConfig) -> None:
    """Refuse trackers whose package or key is missing.

    Raises:
        ConfigError: with the command that installs it, or where a key is looked for.
    """
    asked = {"mlflow": telemetry.mlflow, "wandb": telemetry.wandb}
    faults = [
        Fault(f"telemetry.{name}", f"got {value!r}, and the package {name} is not installed", hint=_install(name))
        for name, value in asked.items()
        if value is not None and not _is_installed(name)
    ]
    if faults:
        raise ConfigError(*faults)
    if telemetry.wandb is not None and (fault := check_key()) is not None:
        raise ConfigError(fault)


def open_trackers(
    config: RunConfig, identity: bytes, total_targets: int, earlier: Mapping[str, Sequence[Line]]
) -> Iterator[Courier]:
    """Yield a courier for each tracker that is asked for.

    Args:
        config: of the run; checked.
        identity: bytes that this run has and no other one of its name.
        total_targets: of the whole run.
        earlier: lines of earlier commands, by kind.
    """
    telemetry, name = config.telemetry, config.train.run
    told = dict(_leaves(config.model_dump(mode="json", exclude=set(NOT_TOLD))))
    number = hashlib.sha256(identity).hexdigest()[:8]
    run = TrackedRun(f"{name[:LONGEST_NAME]}-{number}", name, telemetry.group, told, total_targets)
    if telemetry.mlflow is not None:
        yield Courier("MLflow", partial(MlflowTracker, telemetry.mlflow, run), run, earlier)
    if telemetry.wandb is not None:
        yield Courier("Weights & Biases", partial(WandbTracker, telemetry.wandb, run), run, earlier)


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a mere folder of that name, as W&B makes one, has no origin


def _install(name: str) -> str:
    return f"pip install 'dti-ray[{name}]'"


def _leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
