"""The `study` section: which runs are compared with which, over which seeds, and in which tables they stand.

Stage: configuration. In: plain values. Out: a frozen `StudyConfig`.
Invariant: every table and the reference name rows that exist; a row changes only what does not move the targets.

    rows:
      sliding:  {change: {packing.k: 1, packing.window: interactions}}
      dti-50:   {change: {packing.k: 50}, final: true, contexts: [20, 45, 70]}
    reference: sliding
    tables:
      - {title: How many targets a prompt may hold, rows: [sliding, dti-50]}
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dti_ray.config.section import PositiveInt, Section
from dti_ray.config.tune import FIXED, Value

# What a study may change beside what a sweep may: each of these is a question of its own.
ALSO_CHANGED = ("optim.epochs", "optim.targets_per_step")
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class StudyRow(Section):
    """One way of training, repeated with several seeds."""

    change: dict[str, Value] = Field(default_factory=dict, description="dotted key of a run -> value for this row")
    seeds: tuple[Seed, ...] | None = Field(
        default=None, min_length=1, description="values of train.seed; null: study.seeds"
    )
    contexts: tuple[PositiveInt, ...] = Field(
        default=(), description="context at inference, one evaluation for each (interactions); empty: eval.n"
    )
    final: bool = Field(default=False, description="also evaluated on the test split, once")
    note: str = Field(default="", description="what a reader should know of it")


class StudyTable(Section):
    """Rows that stand together in the report."""

    title: str = Field(min_length=1, description="heading")
    question: str = Field(default="", description="what the table answers")
    rows: tuple[str, ...] = Field(min_length=1, description="names of rows, in this order")


class StudyConfig(Section):
    """A study: rows trained one after the other in one process, and compared with one of them."""

    name: str = Field(
        default="study",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        max_length=60,
        description="name of the study below <root>/sweeps",
    )
    rows: dict[str, StudyRow] = Field(default_factory=dict, description="name -> a way of training")
    reference: str | None = Field(default=None, description="row that all others are compared with; null: the first")
    default: str | None = Field(
        default=None, description="row whose values are the project's defaults, held against the classical baselines"
    )
    headline: tuple[str, ...] = Field(default=(), description="rows of the first table, in this order")
    tables: tuple[StudyTable, ...] = Field(default=(), description="the other tables, in this order")
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1, description="values of train.seed")
    classical: bool = Field(default=True, description="baselines without a language model too; needs the extra `study`")
    padded: bool = Field(default=True, description="time the sliding window padded too: 16 steps of its training")

    @model_validator(mode="after")
    def _rows_exist(self) -> StudyConfig:
        named = [*self.headline, *(row for table in self.tables for row in table.rows)]
        for name in [*named, *(name for name in (self.reference, self.default) if name)]:
            if name not in self.rows:
                raise ValueError(f"{name!r} is named, but study.rows has only {', '.join(self.rows) or 'nothing'}")
        for name, row in self.rows.items():
            for key in row.change:
                reason = FIXED.get(key) or FIXED.get(key.partition(".")[0])
                if reason is not None and key not in ALSO_CHANGED:
                    raise ValueError(f"row {name}: {key} cannot differ between rows: {reason}")
        return self
