"""What all sections of the configuration have in common.

Stage: below the schema. In: plain values. Out: the base class of a section, and the ranges that several use.
Invariant: a section is frozen, and a key that is not declared is a fault.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Base of all sections: frozen, and a key that is not declared is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid")
