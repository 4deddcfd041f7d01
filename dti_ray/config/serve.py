"""The `serve` section: where answers are given, by how many processes, and every limit of a request.

Stage: configuration. In: plain values. Out: a frozen `ServeConfig`.
Invariant: no secret stands here; a token comes from DTI_RAY_SERVE_TOKEN or from the file that `token_file` names.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dti_ray.config.section import PositiveInt, Section

Positive = Annotated[float, Field(gt=0.0)]


class ServeConfig(Section):
    """How a model is served over HTTP; nothing here changes what it answers."""

    host: str = Field(default="127.0.0.1", min_length=1, description="address that is listened on; 0.0.0.0: all")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(default=8000, description="port that is listened on")
    replicas: PositiveInt = Field(default=1, description="processes that hold the model (count)")
    cpus_per_replica: Positive = Field(default=1, description="CPUs of each of them, and threads of its computations")
    gpus_per_replica: Annotated[float, Field(ge=0.0)] = Field(default=0, description="GPUs of each of them")
    doors: PositiveInt = Field(default=1, description="processes that check requests and write answers (count)")
    batch_requests: PositiveInt = Field(default=32, description="requests that are scored together at most (count)")
    queue_requests: PositiveInt = Field(
        default=128, description="requests of a door that may wait for the model; one more is answered 429 (count)"
    )
    timeout_s: Positive = Field(default=10.0, description="time until a request is given up and answered 504 (s)")
    retry_after_s: PositiveInt = Field(default=1, description="when a client that got 429 may ask again (s)")
    reload_s: Positive | None = Field(
        default=30.0, description="a newer best state or export is looked for every so often (s); null: never"
    )
    token_file: str | None = Field(
        default=None,
        min_length=1,
        description="file with the bearer token; null: DTI_RAY_SERVE_TOKEN, or none is asked",
    )
    max_body_bytes: PositiveInt = Field(default=2**20, description="size of a request; a larger one is answered 413")
    min_history: Annotated[int, Field(ge=0)] = Field(
        default=1, description="interactions of a history at least (count); 0: users without any are scored, too"
    )
    max_history: PositiveInt = Field(
        default=1000, description="interactions of a history at most (count); the last eval.n of them are read"
    )
    max_candidates: PositiveInt = Field(default=1000, description="candidates of a request at most (count)")
    max_text: PositiveInt = Field(default=4000, description="length of an id or a text at most (characters)")

    @model_validator(mode="after")
    def _agree(self) -> ServeConfig:
        if self.min_history > self.max_history:
            raise ValueError("min_history must not be above max_history")
        return self
