"""The `score` section: which log of requests is scored, by which model, and what happens to what cannot be.

Stage: configuration. In: plain values. Out: a frozen `ScoreConfig`.
Invariant: everything but `workers` decides the content of the output, and a name is used with one content only.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dti_ray.config.section import PositiveInt, Section

NOT_IN_CONTENT = ("workers",)
WRITTEN = ("user_id", "time", "candidates", "scores", "item_id", "score", "file", "row")  # columns of the output


class RequestColumnsConfig(Section):
    """Which columns of the log of requests mean what."""

    user: str = Field(default="user_id", min_length=1, description="column of the user's id; null: nobody known")
    candidates: str = Field(
        default="candidates", min_length=1, description="column of item ids: a list (a slate a row), or one a row"
    )
    text: str | None = Field(
        default=None,
        min_length=1,
        description="column of item texts beside the candidates, read where the model does not know the id",
    )
    time: str | None = Field(
        default=None,
        min_length=1,
        description="column of the moment that is asked about: number, timestamp or ISO 8601; null: after all history",
    )
    history: str | None = Field(
        default=None,
        min_length=1,
        description="column of histories, oldest first: a list of {item_id, label[, time in seconds]}; a row whose "
        "value is null takes the data set's",
    )
    keep: tuple[str, ...] = Field(default=(), description="columns that are copied to the output")

    @field_validator("keep", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) and value else value

    @model_validator(mode="after")
    def _names_are_free(self) -> RequestColumnsConfig:
        taken = [name for name in self.keep if name in WRITTEN]
        if taken or len(set(self.keep)) < len(self.keep):
            raise ValueError(f"keep {list(self.keep)}: each once, and none of {', '.join(WRITTEN)}: those are written")
        return self


class ScoreConfig(Section):
    """Batch scoring: a log of (user, candidates) in, as many rows with scores out."""

    name: str = Field(default="scores", pattern=r"^[A-Za-z0-9._-]+$", description="folder below <root>/scores")
    input: str | None = Field(default=None, description="Parquet file, folder or URI of the requests")
    model: str | None = Field(
        default=None, description="folder or URI that `dti-ray export` wrote; null: the best state of run train.run"
    )
    dataset: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="prepared data set that holds the histories; null: the one that the model was trained on",
    )
    columns: RequestColumnsConfig = RequestColumnsConfig()
    no_history: Literal["score", "null", "fail"] = Field(
        default="score", description="users without history before the moment: empty context, null scores, or stop"
    )
    unknown_item: Literal["null", "fail"] = Field(
        default="fail",
        description="candidates that the model does not know and that have no text: null scores, or stop",
    )
    unknown_in_history: Literal["skip", "fail"] = Field(
        default="fail", description="interactions with items that the model does not know: left out, or stop"
    )
    unit_pairs: PositiveInt = Field(
        default=200_000, description="pairs of user and item of one unit of work, which is one output file (count)"
    )
    workers: PositiveInt | None = Field(
        default=None,
        description="scoring actors, each with cluster.gpus_per_worker GPUs, or cluster.cpus_per_worker CPUs where "
        "that is 0 (count); null: cluster.workers",
    )

    @field_validator("no_history", "unknown_item", mode="before")
    @classmethod
    def _null_is_a_word(cls, value: object) -> object:
        return "null" if value is None else value
