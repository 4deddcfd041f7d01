"""The `tune` section: what a sweep searches, how it chooses, when it stops a trial, what it keeps.

Stage: configuration. In: plain values. Out: a frozen `TuneConfig`.
Invariant: a dimension has exactly one kind; its bounds stand in order; what would make trials incomparable is
refused here.

    space:
      packing.k:       {choice: [10, 20, 50]}
      optim.lr:        {loguniform: [3e-4, 3e-3]}
      debias.strength: {uniform: [0.0, 0.1]}
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, field_validator, model_serializer, model_validator

from dti_ray.config.section import PositiveInt, Section

Value = bool | int | float | str | None
Bounds = tuple[FiniteFloat, FiniteFloat]

# Trials are compared by the same targets, scored in the same way, at a place that the base configuration names.
FIXED = {
    "data": "all trials share one prepared data set",
    "eval": "all trials are evaluated under one protocol",
    "storage": "a sweep has one root",
    "cluster": "all trials ask for the same workers",
    "checkpoint": "tune.max_gb and tune.keep_best say what is kept",
    "serve": "it changes who is answered, not what",
    "telemetry": "all trials are followed in one way",
    "tune": "a sweep does not search itself",
    "train.run": "trials are named by the sweep",
    "train.seed": "give tune.seeds: repeats are averaged",
    "optim.targets_per_step": "trials compare at equal targets per optimizer step",
    "optim.epochs": "trials compare at equal targets",
    "packing.min_context": "it changes which targets are trained and evaluated",
    "packing.streams": "it changes the rows of a step, not the method",
}


class Dimension(Section):
    """What one key may be; exactly one of these."""

    choice: tuple[Value, ...] | None = Field(default=None, min_length=1, description="one of these, each as likely")
    grid: tuple[Value, ...] | None = Field(default=None, min_length=1, description="each of these, with all others")
    uniform: Bounds | None = Field(default=None, description="a number between two")
    loguniform: Bounds | None = Field(default=None, description="a number between two, each factor as likely")
    randint: tuple[int, int] | None = Field(default=None, description="an integer from the first to the last")

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"got {given or 'nothing'}; give one of {', '.join(type(self).model_fields)}")
        for name in ("uniform", "loguniform", "randint"):
            bounds = getattr(self, name)
            if bounds is not None and not bounds[0] < bounds[1]:
                raise ValueError(f"{name}: got {bounds[0]:g} and {bounds[1]:g}; the first must be below the second")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform: got {self.loguniform[0]:g}; both bounds must be above 0")
        values = self.choice or self.grid or ()
        if len(set(map(repr, values))) != len(values):
            raise ValueError("a value stands twice")
        return self

    @model_serializer
    def _only_given(self) -> dict[str, object]:
        return {self.kind: getattr(self, self.kind)}

    @property
    def kind(self) -> str:
        """Name of what is given."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)


def _default_space() -> dict[str, Dimension]:
    return {
        "packing.k": Dimension(choice=(10, 20, 50)),
        "optim.lr": Dimension(loguniform=(3e-4, 3e-3)),
        "debias.strength": Dimension(choice=(0.0, 0.01, 0.1)),
    }


class TuneConfig(Section):
    """A sweep: trials that are normal runs with overrides."""

    sweep: str = Field(
        default="sweep",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        max_length=60,
        description="name of the sweep below <root>/sweeps",
    )
    space: dict[str, Dimension] = Field(
        default_factory=_default_space, min_length=1, description="dotted key of a run -> what it may be"
    )
    search: Literal["random", "grid", "tpe"] = Field(
        default="random", description="how configurations are chosen; tpe: Optuna's, needs the extra `search`"
    )
    trials: PositiveInt = Field(
        default=8,
        description="configurations, `first` included, each trained with every seed (count); grid: all combinations",
    )
    first: tuple[dict[str, Value], ...] = Field(
        default=({},),
        description="what random and tpe try before all else, such as today's values; {} is the base itself",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(default=0, description="seed of the search")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(
        default=(0,), min_length=1, description="each configuration is trained with each of these train.seed"
    )
    metric: Literal["auc", "log_loss"] = Field(
        default="auc", description="of validation; auc is maximised, log_loss minimised"
    )
    scheduler: Literal["none", "asha", "median", "pbt"] = Field(
        default="asha", description="what ends a trial early, or changes it, by the targets that it has seen"
    )
    grace_targets: PositiveInt | None = Field(
        default=None, description="no trial is ended before so many targets (count); null: eval.every_targets"
    )
    reduction: Annotated[int, Field(ge=2)] = Field(
        default=3, description="asha: one trial in so many passes a rung, and rungs grow by this factor"
    )
    perturb_targets: PositiveInt | None = Field(
        default=None, description="pbt: compared every so many targets (count); null: eval.every_targets"
    )
    max_concurrent: PositiveInt = Field(default=1, description="trials at the same time, at most (count)")
    max_failures: PositiveInt = Field(default=3, description="a trial that failed so often is given up (count)")
    keep_best: PositiveInt = Field(default=1, description="configurations whose runs and checkpoints stay (count)")
    max_gb: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="budget of all states of a sweep at any time (GB, 10^9 bytes)"
    )

    @field_validator("space", mode="after")
    @classmethod
    def _comparable(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        for key in space:
            section = key.partition(".")[0]
            reason = FIXED.get(key) or FIXED.get(section)
            if reason is not None:
                raise ValueError(f"{key} cannot be searched: {reason}")
        return space

    @model_validator(mode="after")
    def _agree(self) -> TuneConfig:
        kinds = {key: dimension.kind for key, dimension in self.space.items()}
        endless = [key for key, kind in kinds.items() if kind in ("uniform", "loguniform", "randint")]
        if self.search == "grid" and endless:
            raise ValueError(f"search: grid needs choice or grid for every key, not {kinds[endless[0]]} ({endless[0]})")
        for key in dict.fromkeys(key for configuration in self.first for key in configuration):
            if key not in self.space:
                raise ValueError(f"first: {key} is not searched; put it into tune.space, or change the base")
        if self.scheduler == "pbt" and "optim.lr" not in self.space:
            raise ValueError("scheduler: pbt changes the learning rate; put optim.lr into tune.space")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: one stands twice")
        return self
