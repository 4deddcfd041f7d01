"""The `data` section: which log is prepared, what its columns mean, how a click is defined, how time splits it.

Stage: configuration. In: plain values. Out: a frozen `DataConfig`.
Invariant: the label parses, the time zone is known, and some interactions are left for the test split.
"""

from __future__ import annotations

import zoneinfo
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dti_ray.config.label import parse_label
from dti_ray.config.section import Fraction, OpenFraction, PositiveFraction, PositiveInt, Section


class ColumnsConfig(Section):
    """Which columns of a tabular log and of its catalogue mean what; other sources know their own."""

    user: str = Field(default="user_id", min_length=1, description="column of the user's id")
    item: str = Field(default="item_id", min_length=1, description="column of the item's id")
    time: str = Field(
        default="timestamp", min_length=1, description="column of the time: number, timestamp or ISO 8601"
    )
    catalogue_item: str | None = Field(
        default=None, description="column of the item's id in the catalogue; null: as columns.item"
    )
    text: tuple[str, ...] = Field(
        default=(), description="text columns of the catalogue (of the log, where there is none); empty: all others"
    )

    @field_validator("text", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) and value else value


class DataConfig(Section):
    """Which log is prepared, how a click is defined, and how time splits it."""

    name: str = Field(default="ml-100k", pattern=r"^[A-Za-z0-9._-]+$", description="data set's folder below the root")
    source: Literal["movielens", "amazon", "kuairand", "tabular"] = Field(
        default="movielens", description="reader of the raw files; tabular: Parquet, CSV or JSON Lines by `columns`"
    )
    path: str | None = Field(
        default=None, description="file, folder, zip or URI of the raw log; null: <root>/raw/<name>"
    )
    catalogue: str | None = Field(
        default=None, description="tabular: file, folder or URI of the item catalogue; null: the log holds item texts"
    )
    columns: ColumnsConfig = ColumnsConfig()
    label: str = Field(
        default="rating > 3",
        min_length=1,
        description="a column of 0 and 1, or an expression such as `rating > 3` or `play_ms / video_ms >= 0.5`",
    )
    time_unit: Literal["s", "ms", "us", "ns"] | None = Field(
        default=None, description="unit of numeric times; null: found by their size, mixed units are refused"
    )
    time_zone: str | None = Field(
        default=None,
        description="zone of times that state none, such as Europe/Berlin; null: UTC, unless only some state one",
    )
    split: Literal["user_time", "global_time", "leave_last"] = Field(
        default="user_time",
        description="cut each user's own time line by shares, one time line for all, or off each user's last ones",
    )
    train_fraction: OpenFraction = Field(default=0.8, description="share of the oldest interactions, for training")
    valid_fraction: OpenFraction = Field(default=0.1, description="share after those, for validation; the rest is test")
    leave_last: PositiveInt = Field(
        default=1, description="split leave_last: a user's last ones for test, as many before for validation (count)"
    )
    min_interactions: PositiveInt = Field(
        default=5, description="users with fewer interactions go to quarantine (count)"
    )
    user_fraction: PositiveFraction | None = Field(
        default=None, description="share of the users, drawn by a hash of their ids, to try things on; null: all"
    )
    max_bad_fraction: Fraction = Field(
        default=0.1, description="share of rows that may be malformed; short users and duplicates do not count"
    )
    on_bad_file: Literal["fail", "quarantine"] = Field(
        default="fail", description="stop at a file that cannot be read, or leave all of it out and say so"
    )
    segment_interactions: PositiveInt | None = Field(
        default=None,
        description="interactions of one row group: the unit that is read, shuffled and resumed (count); null: 1,024, "
        "and up to 16,384 in a log so long that there are a thousand of them",
    )
    shard_interactions: PositiveInt = Field(
        default=4_000_000, description="interactions of one Parquet shard; 4 million are 56 MB uncompressed (count)"
    )

    @model_validator(mode="after")
    def _some_test_is_left(self) -> DataConfig:
        if self.train_fraction + self.valid_fraction >= 1.0:
            raise ValueError("train_fraction + valid_fraction must stay below 1, or no test split is left")
        return self

    @model_validator(mode="after")
    def _mapping_is_read(self) -> DataConfig:
        if self.source != "tabular" and (self.catalogue is not None or self.columns != ColumnsConfig()):
            raise ValueError(f"catalogue and columns are for source tabular; {self.source} knows its own files")
        if self.source == "tabular" and self.path is None:
            raise ValueError("source tabular needs path, the file, folder or URI of the log")
        return self

    @field_validator("label")
    @classmethod
    def _label_is_an_expression(cls, value: str) -> str:
        parse_label(value)
        return value

    @field_validator("time_zone")
    @classmethod
    def _zone_is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in zoneinfo.available_timezones():
            raise ValueError(f"{value!r} is no time zone of the IANA list, such as UTC or Europe/Berlin")
        return value
