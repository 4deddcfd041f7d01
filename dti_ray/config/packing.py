"""The `packing` section: how many targets a prompt has, what they see, and how prompts fill rows.

Stage: configuration. In: plain values. Out: a frozen `PackingConfig`.
Invariant: with the data set and the seed it decides the prompt of every target.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dti_ray.config.section import PositiveInt, Section


class Window(StrEnum):
    """How far back a token sees; `interactions` is the paper's rule."""

    INTERACTIONS = "interactions"
    TOKENS = "tokens"
    OFF = "off"


class PackingConfig(Section):
    """How targets share a prompt, and prompts a row."""

    k: PositiveInt | Literal["all"] = Field(default=50, description="targets of one prompt; 1 is the sliding window")
    k_min: PositiveInt | None = Field(
        default=None,
        description="train with a mixture: the targets of each prompt are drawn log-uniformly from k_min to k, anew in "
        "every epoch; null: each has k",
    )
    n: PositiveInt = Field(default=50, description="interactions before the first target of a prompt (context)")
    window: Window = Field(default=Window.OFF, description="how far a token sees back within its prompt")
    window_tokens: PositiveInt = Field(default=256, description="reach of `window: tokens` (tokens)")
    min_context: Annotated[int, Field(ge=0)] = Field(
        default=0, description="targets with fewer interactions before them are left out (count)"
    )
    row_tokens: PositiveInt = Field(default=8192, description="capacity of a row, [SUM] included (tokens)")
    mix_segments: PositiveInt = Field(
        default=8, description="segments of a stream whose prompts are shuffled together (count)"
    )
    streams: PositiveInt = Field(
        default=4, description="virtual streams of an epoch; a multiple of every worker count that may train"
    )

    @model_validator(mode="after")
    def _mixture_has_bounds(self) -> PackingConfig:
        if self.k_min is not None and self.k == "all":
            raise ValueError(f"k_min={self.k_min} draws from k_min to k, which is all: set packing.k to a number")
        if self.k_min is not None and self.k_min > int(self.k):
            raise ValueError(f"k_min={self.k_min} is above k={self.k}: lower packing.k_min or raise packing.k")
        return self
