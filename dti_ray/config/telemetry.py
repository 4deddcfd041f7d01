"""The `telemetry` section: who hears of a run beside its own folder, and how log records look.

Stage: configuration. In: plain values. Out: a frozen `TelemetryConfig`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dti_ray.config.section import Section


class TelemetryConfig(Section):
    """Who hears of a run beside its own folder; nothing here changes what is learnt."""

    group: str | None = Field(
        default=None, min_length=1, description="name that runs have in common; a sweep gives its own to its trials"
    )
    mlflow: str | None = Field(
        default=None, min_length=1, description="MLflow tracking URI, such as http://mlflow:5000; needs extra `mlflow`"
    )
    wandb: str | None = Field(
        default=None, min_length=1, description="Weights & Biases project; needs extra `wandb` and WANDB_API_KEY"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="log records on the terminal; json: one object a line, remarks and metrics too"
    )
