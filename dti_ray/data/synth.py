"""A click log that nobody owns: made up, of realistic shape, and with something in it to learn.

Stage: beside sources. In: a `LogShape`. Out: `interactions/part-*.parquet` in the order of time, `items.parquet`,
and `synth.json`, which says how they were made.
Invariants: the files are a function of the shape alone; memory grows with users, items and the rows of one file or
one day, never with the log; a folder is complete or not there at all.

A click is drawn with log-odds = constant + item's bias + user's bias + taste · character. An item's character and most
of its bias come from the words of its title. A user's taste is in part their own for good, in part it drifts by the
week; so what a user did lately says more than what they did long ago, and neither is told by the item alone.

    day 0   user 1 visits twice, 3 rows in all    user_id item_id timestamp  clicked
            user 7 visits once, 1 row             1       12      1704070861 1
                                                  1       3       1704070861 0
                                                  7       12      1704098000 0
                                                  1       40      1704103342 1
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from numpy.random import Generator
from pyarrow import parquet as pq

from dti_ray.data.titles import WORD_VECTOR, make_titles
from dti_ray.errors import ConfigError, Fault, InputError

VERSION = 1  # of what the same shape makes
INTERACTIONS_FOLDER, ITEMS_FILE, SHAPE_FILE = "interactions", "items.parquet", "synth.json"
LOG = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64()), ("clicked", pa.int8())])
ROWS_PER_FILE = 1_000_000
ROW_GROUP_ROWS = 1 << 18

FIRST_SECOND = 1_704_067_200  # 2024-01-01 00:00:00 UTC
DAYS = 180
DAY_S = 86_400
ROWS_PER_VISIT = 8  # on average
TOPIC = 0.8  # share of a visit's rows that are of its topic, a category
SAME_SECOND = 0.25  # share of steps within a visit that take no time
GAP_S = 40.0  # mean of the others
LENGTH_TAIL = 2.2  # exponent of the power law of user lengths
POPULARITY_TAIL = 0.9  # Zipf's exponent
POPULARITY_OFFSET = 10  # ranks over which the most popular items are alike
LATE_ITEMS = 0.3  # share of items, and
LATE_USERS = 0.5  # share of users that are not there from the first day

CLICK_RATE = 0.4
ITEM_BIAS, USER_BIAS, TASTE = 0.8, 0.5, 1.05  # standard deviations in log-odds; with 1.4 in all, AUC 0.80 is the limit
DRIFTING = 0.3  # share of the taste's variance that drifts
DRIFT_DAYS = 21.0  # after so many days, e⁻¹ of the drifting part is left


@dataclass(frozen=True)
class LogShape:
    """All that a log depends on.

    Attributes:
        interactions: rows in all files together.
        users: each of them has at least one row.
        items: of the catalogue; some may never be shown.
        files: of equal length, but for one row.
        seed: of all that is drawn.
    """

    interactions: int
    users: int
    items: int
    files: int
    seed: int


@dataclass(frozen=True, eq=False)
class Interactions:
    """Rows in the order of time, and what nobody outside this file would know: how likely each click was."""

    user: Int[np.ndarray, " rows"]
    item: Int[np.ndarray, " rows"]
    time: Int[np.ndarray, " rows"]
    clicked: Bool[np.ndarray, " rows"]
    probability: Float[np.ndarray, " rows"]


@dataclass(frozen=True, eq=False)
class Catalogue:
    """All items: category by category, and within one in the order in which they come out.

    Attributes:
        table: item_id (from 1), title, category.
        character: unit vectors.
        bias: of log-odds; its mean, weighted by popularity, is 0.
        released: day from which an item is shown.
        begin: first item of each category, and the number of items.
        popularity: cumulative, from 0; so the items of a category that are out by some day are one interval of it.
    """

    table: pa.Table
    character: Float[np.ndarray, "items factors"]
    bias: Float[np.ndarray, " items"]
    released: Int[np.ndarray, " items"]
    begin: Int[np.ndarray, " bounds"]
    popularity: Float[np.ndarray, " bounds"]

    def draw(
        self, day: int, topic: Float[np.ndarray, " visitors"], visitor: Int[np.ndarray, " rows"], rng: Generator
    ) -> Int[np.ndarray, " rows"]:
        """Draw an item for each row, by popularity among those out: of the visit's topic mostly, else of any category.

        Args:
            day: of the visits.
            topic: where each visitor's topic lies on the scale of popularity, 0 to 1.
            visitor: index into `topic` for each row.
            rng: draws.
        """
        out = np.add.reduceat(self.released <= day, self.begin[:-1])
        low, high = self.popularity[self.begin[:-1]], self.popularity[self.begin[:-1] + out]
        share = np.cumsum(high - low) / (high - low).sum()
        is_topic = rng.random(len(visitor)) < TOPIC
        place = np.where(is_topic, topic[visitor], rng.random(len(visitor)))
        category = np.searchsorted(share[:-1], place, side="right")
        drawn = low[category] + rng.random(len(visitor)) * (high - low)[category]
        return np.searchsorted(self.popularity[1:-1], drawn, side="right")


def log_shape(
    interactions: int, users: int, items: int | None = None, files: int | None = None, seed: int = 0
) -> LogShape:
    """Fill in what was not asked for: a catalogue as large as such logs have, files of a million rows.

    MovieLens has 1,682 items for 100,000 ratings and 27,000 for 20 million: about 5 times the square root.

    Raises:
        ConfigError: the numbers contradict each other, one fault each.
    """
    shape = LogShape(
        interactions,
        users,
        round(5 * math.sqrt(max(interactions, 1))) if items is None else items,
        max(1, math.ceil(interactions / ROWS_PER_FILE)) if files is None else files,
        seed,
    )
    least = [Fault(f"--{name}", f"got {getattr(shape, name)}", "at least 1")
             for name in ("interactions", "users", "items", "files") if getattr(shape, name) < 1]  # fmt: skip
    most = [Fault(f"--{name}", f"got {getattr(shape, name)}", f"at most --interactions, {interactions}")
            for name in ("users", "files") if getattr(shape, name) > interactions >= 1]  # fmt: skip
    if seed < 0:
        least.append(Fault("--seed", f"got {seed}", "at least 0"))
    if least or most:
        raise ConfigError(*least, *most)
    return shape


def write_log(shape: LogShape, out: Path, progress: Callable[[int], None]) -> bool:
    """Write the log, unless it is there already.

    Everything is written to a folder beside `out`, which gets its name last.

    Args:
        shape: of the log.
        out: a folder that is empty or not there, or that holds the very same log.
        progress: is told how many rows are written.

    Returns:
        False where there was nothing to do.

    Raises:
        InputError: the folder holds something else.
    """
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_same(shape, out)
        return False
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted attempt left there
    (partial / INTERACTIONS_FOLDER).mkdir(parents=True)
    try:
        catalogue = draw_catalogue(shape)
        pq.write_table(catalogue.table, partial / ITEMS_FILE, compression="zstd")
        _write_files(shape, catalogue, partial / INTERACTIONS_FOLDER, progress)
        (partial / SHAPE_FILE).write_text(json.dumps(_said(shape), indent=1), encoding="utf-8")
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def draw_catalogue(shape: LogShape) -> Catalogue:
    """Draw the items."""
    rng = _generator(shape, "items")
    titles = make_titles(shape.items, rng)
    _, first = np.unique(titles.category, return_index=True)
    popularity = rng.permutation(1 / (POPULARITY_OFFSET + np.arange(shape.items)) ** POPULARITY_TAIL)
    bias = ITEM_BIAS * titles.charm
    late = rng.random(shape.items) < LATE_ITEMS
    late[0] = False  # something is always out
    released = np.where(late, rng.integers(1, DAYS, shape.items), 0)
    released = released[np.lexsort((released, titles.category))]
    categories = [titles.categories[category] for category in titles.category.tolist()]
    columns = {"item_id": np.arange(1, shape.items + 1), "title": titles.texts, "category": categories}
    return Catalogue(
        table=pa.table(columns),
        character=titles.character,
        bias=bias - np.average(bias, weights=popularity),
        released=released,
        begin=np.append(first, shape.items),
        popularity=np.concatenate([[0.0], np.cumsum(popularity)]),
    )


def draw_days(shape: LogShape, catalogue: Catalogue) -> Iterator[Interactions]:
    """Yield the interactions of one day after the other; all of them are as many as the shape says."""
    rng = _generator(shape, "interactions")
    crowd = Crowd(shape, rng)
    for day in range(DAYS):
        visitors, rows = crowd.visit(day, rng)
        taste, bias = crowd.tastes(visitors, day, rng), crowd.bias[visitors]
        visitor = np.repeat(np.arange(len(visitors)), rows)
        item = catalogue.draw(day, rng.random(len(visitors)), visitor, rng)
        match = np.einsum("rf,rf->r", taste[visitor], catalogue.character[item])
        log_odds = _CONSTANT + catalogue.bias[item] + bias[visitor] + TASTE * match
        probability = 1 / (1 + np.exp(-log_odds))
        clicked = rng.random(len(visitor)) < probability
        time = FIRST_SECOND + day * DAY_S + _seconds(rows, item, rng)
        order = np.argsort(time, kind="stable")
        user = visitors[visitor]
        yield Interactions(*(values[order] for values in (user, item, time, clicked, probability)))


# The mean of a sigmoid over a normal variable: probit's closed form, with π/8 for the scale between the two curves.
_CONSTANT = math.log(CLICK_RATE / (1 - CLICK_RATE)) * math.sqrt(
    1 + math.pi / 8 * (ITEM_BIAS**2 + USER_BIAS**2 + TASTE**2)
)


class Crowd:
    """All users: what they have still to do, and what they like by now."""

    def __init__(self, shape: LogShape, rng: Generator) -> None:
        users = shape.users
        self.joined = np.where(rng.random(users) < LATE_USERS, rng.integers(0, DAYS, users), 0)
        weights = rng.pareto(LENGTH_TAIL, users) * (1 - self.joined / DAYS)
        self.rows_left = 1 + rng.multinomial(shape.interactions - users, weights / weights.sum())
        self.visits_left = 1 + (self.rows_left - 1) // ROWS_PER_VISIT
        self.bias = rng.normal(0, USER_BIAS, users).astype(np.float32)
        self.own = rng.standard_normal((users, WORD_VECTOR), np.float32)
        self.drifting = rng.standard_normal((users, WORD_VECTOR), np.float32)
        self.last_day = np.zeros(users, np.int32)

    def visit(self, day: int, rng: Generator) -> tuple[Int[np.ndarray, " visitors"], Int[np.ndarray, " visitors"]]:
        """Return who comes on a day, and their rows of the day.

        Each visit left falls on each day left with equal chance, and has at least one row; on the last day there
        is one chance only, so that nothing is ever left over.
        """
        users = np.flatnonzero((self.visits_left > 0) & (self.joined <= day))
        visits = rng.binomial(self.visits_left[users], 1 / (DAYS - day))
        users, visits = users[visits > 0], visits[visits > 0]
        visits_left = self.visits_left[users]
        rows = visits + rng.binomial(self.rows_left[users] - visits_left, visits / visits_left)
        self.rows_left[users] -= rows
        self.visits_left[users] -= visits
        return users, rows

    def tastes(
        self, users: Int[np.ndarray, " visitors"], day: int, rng: Generator
    ) -> Float[np.ndarray, "visitors factors"]:
        """Return some users' tastes of a day: unit variance, of which the drifting part has moved since last time."""
        kept = np.exp((self.last_day[users] - day) / DRIFT_DAYS, dtype=np.float32)[:, None]
        fresh = rng.standard_normal((len(users), WORD_VECTOR), np.float32)
        self.drifting[users] = kept * self.drifting[users] + np.sqrt(1 - kept**2) * fresh
        self.last_day[users] = day
        return math.sqrt(1 - DRIFTING) * self.own[users] + math.sqrt(DRIFTING) * self.drifting[users]


def _seconds(
    rows: Int[np.ndarray, " visitors"], item: Int[np.ndarray, " interactions"], rng: Generator
) -> Int[np.ndarray, " interactions"]:
    """Return each row's second of the day: a visitor begins somewhere, goes on in small steps, ends by midnight.

    The same item twice in a row takes time: of rows with equal user, item and second, one only is an interaction.
    """
    last = np.cumsum(rows) - 1
    first = last - rows + 1
    is_tied = (rng.random(len(item)) < SAME_SECOND) & (np.diff(item, prepend=-1) != 0)
    steps = np.where(is_tied, 0, 1 + rng.exponential(GAP_S, len(item)).astype(np.int64))
    since = np.cumsum(steps)
    since -= np.repeat(since[first], rows)
    lasts = since[last]
    room = DAY_S - 1
    since = np.where(np.repeat(lasts, rows) > room, since * room // np.repeat(np.maximum(lasts, 1), rows), since)
    begin = (rng.random(len(rows)) * (room - np.minimum(lasts, room) + 1)).astype(np.int64)
    return np.repeat(begin, rows) + since


def _write_files(shape: LogShape, catalogue: Catalogue, folder: Path, progress: Callable[[int], None]) -> None:
    ends = [(file + 1) * shape.interactions // shape.files for file in range(shape.files)]
    held, file, written = LOG.empty_table(), 0, 0
    for day in draw_days(shape, catalogue):
        columns = [day.user + 1, day.item + 1, day.time, day.clicked]
        held = pa.concat_tables([held, pa.table(columns, names=LOG.names).cast(LOG)])
        while file < shape.files and written + len(held) >= ends[file]:
            rows = ends[file] - written
            path = folder / f"part-{file:05d}.parquet"
            pq.write_table(held.slice(0, rows), path, compression="zstd", row_group_size=ROW_GROUP_ROWS)
            held, file, written = held.slice(rows), file + 1, ends[file]
            progress(written)
    assert file == shape.files, "every user's rows are spread over the days to the last one"


def _said(shape: LogShape) -> dict[str, int]:
    return {"version": VERSION, **asdict(shape)}


def _check_same(shape: LogShape, out: Path) -> None:
    """Refuse a folder in use, unless this very log lies there."""
    said, file = _said(shape), out / SHAPE_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise InputError(Fault(f"--out {out}", "holds other files", "an empty folder, or one that is not there"))
    faults = [
        Fault(f"--{name}" if name != "version" else str(file), f"got {said[name]}",
              f"{found.get(name)} as in {file}", "choose another --out, or delete the folder")
        for name in said if found.get(name) != said[name]
    ]  # fmt: skip
    if faults:
        raise InputError(*faults)


def _generator(shape: LogShape, purpose: str) -> Generator:
    return np.random.default_rng([shape.seed, *purpose.encode()])
