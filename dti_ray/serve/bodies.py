"""What is asked and answered, as JSON: one schema that checks a request, describes it in OpenAPI, and names its limits.

Stage: serving. In: the bytes of a body. Out: a `Question`, or one line per fault. Knows neither torch nor Ray.
Invariant: what is not declared is refused; no value is converted (a label "1" is no label); a line that is told names
the place, and what was expected there.

    {"history": [{"item": "242", "label": 1}, {"item": {"text": "Alien (1979)"}, "label": 0}], "candidates": ["51"]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, create_model
from pydantic_core import ErrorDetails

from dti_ray.config import ServeConfig

MOST_LINES = 10  # of an answer that refuses a request
MOST_SHOWN, LONGEST_LINE = 60, 400  # characters of what was got, of a line
LATEST = 2**53  # seconds; the next whole number is no float any more
ID, TEXT = "<id>", "<text>"  # branches of an item, in the path of an error; no field has such a name
AN_ITEM = "an id as text, or an object with text"


@dataclass(frozen=True)
class Worded:
    """An item by its text."""

    text: str


@dataclass(frozen=True)
class Question:
    """A request that was checked, but for whether its items exist.

    Attributes:
        history: (id or text, label, time in seconds or None), oldest first.
        candidates: ids and texts.
        time: of the moment (s); None: later than the history.
    """

    history: tuple[tuple[str | Worded, int, int | None], ...]
    candidates: tuple[str | Worded, ...]
    time: int | None


@dataclass(frozen=True)
class Scored:
    """Probabilities of one question's candidates, by one state."""

    state: str
    probabilities: list[float]


@dataclass(frozen=True)
class Refused:
    """Why a question has no answer."""

    lines: tuple[str, ...]


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(strict=True, extra="forbid")


class ItemText(Body):
    """An item that is described; it is read as one of the catalogue with this text would be."""

    text: str


class Interaction(Body):
    """Something that happened."""

    item: str | ItemText
    label: int
    time: int | None


class ScoreRequest(Body):
    """How likely are these clicks, after this?"""

    history: list[Interaction]
    candidates: list[str | ItemText]
    time: int | None

    def question(self) -> Question:
        """Return what is asked."""
        history = tuple((_plain(one.item), one.label, one.time) for one in self.history)
        return Question(history, tuple(map(_plain, self.candidates)), self.time)


class RankRequest(ScoreRequest):
    """Which of these are the likeliest clicks, after this?"""

    k: int


class ScoreAnswer(BaseModel):
    """Probabilities of a click, all by one state of the model."""

    state: str = Field(description="of the model that answered")
    probabilities: list[float] = Field(description="one per candidate, in their order")


class Ranked(BaseModel):
    """A candidate and its probability."""

    index: int = Field(description="of the candidate in the request")
    item: str | ItemText = Field(description="the candidate, as it was given")
    probability: float


class RankAnswer(BaseModel):
    """The likeliest candidates, likeliest first; equal ones in the order of the request."""

    state: str = Field(description="of the model that answered")
    ranking: list[Ranked]


class Status(BaseModel):
    """How the server is."""

    status: Literal["alive", "ready"]
    state: str | None = Field(default=None, description="of the model that answers")


class Problem(BaseModel):
    """Why there is no answer."""

    errors: list[str] = Field(description="one line per fault: where, what was got, what was expected")


@dataclass(frozen=True)
class Bodies:
    """The requests' schemas with their limits."""

    score: type[ScoreRequest]
    rank: type[RankRequest]


class MalformedError(Exception):
    """A body that cannot be used; `lines` say why.

    Attributes:
        is_json: it can be read, but asks for nothing that can be answered.
    """

    def __init__(self, lines: Sequence[str], is_json: bool) -> None:
        super().__init__(*lines)
        self.lines, self.is_json = list(lines), is_json


def make_bodies(limits: ServeConfig) -> Bodies:
    """Return the requests' schemas under these limits."""
    name = Annotated[str, Field(min_length=1, max_length=limits.max_text, description="id in the catalogue")]
    text = create_model(
        "ItemText", __base__=ItemText,
        text=(Annotated[str, Field(min_length=1, max_length=limits.max_text)], ...),
    )  # fmt: skip
    item: Any = Annotated[Annotated[name, Tag(ID)] | Annotated[text, Tag(TEXT)], Discriminator(_branch)]
    seconds: Any = Annotated[int, Field(ge=-LATEST, le=LATEST)]
    time: Any = seconds | None
    of_all = "seconds since 1970; for all interactions or for none"
    interaction = create_model(
        "Interaction", __base__=Interaction,
        item=(item, Field(description="id in the catalogue, or a text")),
        label=(int, Field(ge=0, le=1, description="1: clicked")),
        time=(time, Field(default=None, description=of_all)),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "history": (
            list[interaction],
            Field(min_length=limits.min_history, max_length=limits.max_history, description="oldest first"),
        ),
        "candidates": (
            list[item],
            Field(min_length=1, max_length=limits.max_candidates, description="what the user might be shown"),
        ),
        "time": (time, Field(default=None, description="of the moment (s since 1970); null: later than the history")),
    }
    best = Field(
        default=min(10, limits.max_candidates),
        ge=1,
        le=limits.max_candidates,
        description="candidates of the answer at most (count)",
    )
    return Bodies(
        score=create_model("ScoreRequest", __base__=ScoreRequest, **fields),
        rank=create_model("RankRequest", __base__=RankRequest, **fields, k=(int, best)),
    )


def parse(body: type[ScoreRequest], content: bytes) -> ScoreRequest:
    """Return what a body says.

    Raises:
        MalformedError: it is not JSON, or not of this schema.
    """
    try:
        return body.model_validate_json(content)
    except ValidationError as error:
        details = error.errors(include_url=False)
        is_json = all(detail["type"] != "json_invalid" for detail in details)
        raise MalformedError([_line(detail, body) for detail in details], is_json) from None


def answer_score(state: str, probabilities: Sequence[float]) -> ScoreAnswer:
    """Return the answer to a request for scores."""
    return ScoreAnswer(state=state, probabilities=list(probabilities))


def answer_rank(request: RankRequest, state: str, probabilities: Sequence[float]) -> RankAnswer:
    """Return the answer to a request for a ranking."""
    order = sorted(range(len(probabilities)), key=lambda index: -probabilities[index])[: request.k]
    items = request.candidates
    ranking = [Ranked(index=i, item=_copied(items[i]), probability=probabilities[i]) for i in order]
    return RankAnswer(state=state, ranking=ranking)


def shortened(lines: Sequence[str]) -> list[str]:
    """Return the first lines, none too long, and how many there are beside them."""
    rest = len(lines) - MOST_LINES
    kept = [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in lines[:MOST_LINES]]
    return [*kept, *([f"... and {rest:,} more faults"] if rest > 0 else [])]


def _plain(item: str | ItemText) -> str | Worded:
    return item if isinstance(item, str) else Worded(item.text)


def _copied(item: str | ItemText) -> str | ItemText:
    return item if isinstance(item, str) else ItemText(text=item.text)


def _branch(item: object) -> str:
    """Say which kind of item is meant; only its faults are told."""
    return TEXT if isinstance(item, dict | ItemText) else ID


def _line(detail: ErrorDetails, body: type[ScoreRequest]) -> str:
    kind, where, limits, keys = (
        detail["type"],
        _where(detail["loc"]),
        detail.get("ctx", {}),
        ", ".join(body.model_fields),
    )
    if kind == "json_invalid":
        return f"body: is not JSON ({limits['error']}); expected an object with {keys}"
    if kind == "missing":
        return f"{where}: is missing"
    if kind == "extra_forbidden":
        return f"{where}: is no known key" + (f"; expected {keys}" if len(detail["loc"]) == 1 else "")
    if kind in ("too_long", "too_short"):
        size = "more" if limits["actual_length"] is None else f"{limits['actual_length']:,}"
        return f"{where}: has {size} entries; expected {_bound(limits)}"
    if kind in ("string_too_long", "string_too_short"):
        return f"{where}: has {len(str(detail['input'])):,} characters; expected {_bound(limits)}"
    shown = repr(detail["input"])
    shown = shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."
    return f"{where}: got {shown}; expected {_expected(detail)}"


def _bound(limits: Mapping[str, Any]) -> str:
    return f"at most {limits['max_length']:,}" if "max_length" in limits else f"at least {limits['min_length']:,}"


def _expected(detail: ErrorDetails) -> str:
    if ID in detail["loc"]:
        return AN_ITEM
    if detail["loc"][-1:] == ("label",):
        return "0 or 1"
    return detail["msg"].removeprefix("Input should be ")


def _where(path: Sequence[int | str]) -> str:
    """Return a path as it would be written: history[3].label."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path if part not in (ID, TEXT)]
    return "".join(parts).removeprefix(".") or "body"


def openapi_schemas(bodies: Bodies) -> Mapping[str, Any]:
    """Return the requests' schemas as OpenAPI's components name them."""
    from pydantic.json_schema import models_json_schema

    pairs = [(body, "validation") for body in (bodies.score, bodies.rank)]
    return models_json_schema(pairs, ref_template="#/components/schemas/{model}")[1]["$defs"]  # type: ignore[arg-type]
