"""The log that a run learnt from: its clicks over time, the lengths of its users, what of it was new.

Stage: report. In: the run's `config.yaml`, which names a data set. Out: `LogView`, two `Plot`s, a list of facts.
Invariant: a page is made in seconds: a large log is not read, and the command that tells of it is named instead.

    data.name: ml-100k    100,000 interactions    read, shown
    data.name: huge       200,000,000             "dti-ray data stats data.name=huge ..."
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dti_ray.config import from_yaml
from dti_ray.data.interactions import SPLITS, open_dataset
from dti_ray.data.stats import SplitStats, Stats, dataset_stats
from dti_ray.errors import ConfigError, InputError, StorageError
from dti_ray.report.plots import COUNTS, HEIGHT_UNITS, WIDTH_UNITS
from dti_ray.report.theme import LIGHT, Plot, draw_svg
from dti_ray.storage import Storage

MOST_INTERACTIONS = 5_000_000  # a page waits for a log of this size for some five seconds
THIN = 0.25  # a bin with less than this share of a split's average is left out: its share of clicks is chance
COLOURS = ("blue", "green", "orange")
DAY_S = 86_400


@dataclass(frozen=True)
class LogView:
    """What the page knows of the log.

    Attributes:
        name: of the data set; None where no configuration says it.
        stats: None where there is nothing to show, for the `reason` given.
    """

    name: str | None
    stats: Stats | None
    reason: str = ""


def read_log(storage: Storage, config: str | None) -> LogView:
    """Read the data set that a stored configuration names, unless it is too large to read for a page."""
    try:
        name = None if config is None else from_yaml(config).data.name
    except ConfigError:  # of another version
        name = None
    if name is None:
        return LogView(None, None, "No configuration says which log this run learnt from.")
    try:
        dataset = open_dataset(storage, name)
        if dataset.interactions > MOST_INTERACTIONS:
            return LogView(name, None, f"{dataset.interactions:,} interactions are too many to read for a page.")
        return LogView(name, dataset_stats(dataset))
    except (InputError, StorageError) as error:
        return LogView(name, None, f"The log cannot be read ({error}).")


def plot_click_rate(stats: Stats) -> Plot:
    """Share of clicks over time, split by split, with the number of interactions below."""
    starts = np.array([part.start_s for part in stats.timeline], float)
    shown, clicks = (np.array([getattr(part, name) for part in stats.timeline]) for name in ("interactions", "clicks"))
    is_told = shown > THIN * shown.mean(axis=0)
    share = np.divide(100 * clicks, shown, where=is_told, out=np.full(shown.shape, np.nan))
    ends = [split.last_s for split in stats.splits if split.last_s is not None]
    edges, unit = _time(np.append(starts, 1.0 + max(ends)))
    middle = (edges[1:] + edges[:-1]) / 2

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
        for split, colour in enumerate(COLOURS):
            upper.plot(middle, share[:, split], "o-", color=LIGHT[colour], markersize=4)
        upper.set(ylabel="share of clicks (%)")
        upper.set_ylim(bottom=0)
        upper.tick_params(bottom=False)
        lower.stairs(shown.sum(axis=1), edges, fill=True, color=LIGHT["grey"])
        began = str(np.datetime64(int(starts[0]), "s")).partition("T")[0]
        lower.set(xlabel=f"{unit} since {began}", ylabel="rows", xlim=edges[[0, -1]])
        lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        lower.yaxis.set_major_formatter(COUNTS)
        figure.align_ylabels()

    caption = (
        "A level line is easy to learn from; a step is a change of the product, and what lies before it misleads. "
        "Parts with less than a quarter of a split's average are left out."
    )
    legend = (*zip(COLOURS, SPLITS, strict=True), ("grey", "interactions (bars)"))
    return Plot("Share of clicks over time", caption, draw_svg("click_rate", WIDTH_UNITS, HEIGHT_UNITS, draw), legend)


def plot_lengths(stats: Stats) -> Plot:
    """Users by their number of interactions, in powers of two."""
    users = stats.lengths.histogram
    lengths = stats.lengths
    powers = range(next(power for power, count in enumerate(users) if count), len(users))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(powers, users[powers[0] :], 0.86, color=LIGHT["blue"])
        axes.set_xticks(powers, [f"{2**power}" if power < 10 else f"{2 ** (power - 10):,}k" for power in powers])
        axes.set(xlabel="interactions of a user, at least", ylabel="users")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(COUNTS)

    caption = (
        f"From {lengths.shortest:,} to {lengths.longest:,} interactions, {lengths.mean:,.1f} on average; half of "
        f"the users have at most {lengths.median:,}. A context longer than most histories is empty for most users."
    )
    svg = draw_svg("lengths", WIDTH_UNITS, HEIGHT_UNITS, draw)
    return Plot("How long histories are", caption, svg, (("blue", "users; each bar up to the next number"),))


def log_facts(stats: Stats) -> dict[str, str]:
    """Return what the page says in words, one line each."""
    valid, test = stats.splits[1:]
    return {
        "data set": stats.name,
        "interactions": f"{stats.interactions:,}",
        "users": f"{stats.users:,}",
        "items, seen of them": f"{stats.items:,}, {stats.seen_items:,}",
        "share of clicks": f"{stats.label_rate:.1%}",
        "with the top 1 % of the items": f"{stats.top_share:.1%}",
        "in the second of the one before": f"{stats.tied_share:.1%}",
        "split": stats.split_rule,
        "targets of new users": _cold(valid, test, "cold_user_targets"),
        "targets of new items": _cold(valid, test, "cold_item_targets"),
        **{check.name: "pass" if check.passed else f"violated {check.violations:,} times" for check in stats.checks},
    }


def _cold(valid: SplitStats, test: SplitStats, field: str) -> str:
    shares = (f"{getattr(part, field) / max(part.interactions, 1):.1%} {part.split}" for part in (valid, test))
    return ", ".join(shares)


def _time(seconds: np.ndarray) -> tuple[np.ndarray, str]:
    """Return times since the first one, in the unit that reads best."""
    since = seconds - seconds[0]
    return (since / DAY_S, "days") if since[-1] > 3 * DAY_S else (since / 3600, "hours")
