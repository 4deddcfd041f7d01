"""The page of a sweep: what was found, at what cost, and how far it can be trusted.

Stage: report of a sweep. In: its `SweepState`, its configuration, facts. Out: `sweeps/<sweep>/report/index.html`.
Invariant: the file is complete in itself; every text from outside is escaped; what is not there yet is said in words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from dti_ray.config import TuneConfig
from dti_ray.report.layout import figure, header, missing, page, plots, section
from dti_ray.report.sweep_plots import (
    METRICS,
    plot_against,
    plot_configurations,
    plot_cost,
    plot_importance,
    plot_learning,
)
from dti_ray.report.sweep_tables import counted, failures_table, front_table, sweep_tiles, trials_table
from dti_ray.report.tables import pairs
from dti_ray.storage import Storage
from dti_ray.tune.ledger import Status, SweepState
from dti_ray.tune.results import FEWEST_TRIALS, Cost, TrialResult, best, importance, pareto, results, varied_keys

FIRST_KEY = "packing.k"  # the question that a sweep is there for: how large may it be
RULES = """
td.words,th.words{white-space:normal;text-align:left;min-width:16em;overflow-wrap:anywhere}
#trials th{white-space:normal}
#trials th,#trials td{padding-left:14px}
#trials th:first-child,#trials td:first-child{padding-left:0}
tr.model td:first-child{color:var(--blue);font-weight:650}
td:first-child{position:sticky;left:0;background:var(--card)}
section>.card+.card,section>.card+.missing{margin-top:18px}
.card>h3+.scroll{margin-top:14px}
.card>details{border:0;padding:0;background:none}
"""


@dataclass(frozen=True)
class Sweep:
    """What the page is made of.

    Attributes:
        trials: results by number.
        chosen: the best one; None while none is done.
        facts: how trials were trained and evaluated.
    """

    name: str
    state: SweepState
    tune: TuneConfig
    trials: Sequence[TrialResult]
    chosen: TrialResult | None
    facts: Mapping[str, str]
    best_yaml: str | None

    @property
    def has_reports(self) -> bool:
        """Whether any trial has a value of the metric."""
        return any(one.mean(self.tune.metric) is not None for one in self.trials)

    @property
    def best_number(self) -> int | None:
        """Number of the best trial."""
        return None if self.chosen is None else self.chosen.number


def write_sweep_report(
    storage: Storage, sweep: str, state: SweepState, tune: TuneConfig, facts: Mapping[str, str], best_yaml: str | None
) -> str:
    """Write the page of a sweep.

    Args:
        storage: where the sweep lies.
        sweep: its name below `sweeps/`.
        state: what its ledger amounts to.
        tune: how it searches.
        facts: what the page says of data, model, budget and evaluation protocol, name -> text.
        best_yaml: the best configuration, as `dti-ray train -c` takes it; None while there is none.

    Returns:
        The page's path, as a user would type it.
    """
    path = f"sweeps/{sweep}/report/index.html"
    storage.write(path, build_sweep_page(sweep, state, tune, facts, best_yaml).encode())
    return storage.display(path)


def build_sweep_page(
    name: str, state: SweepState, tune: TuneConfig, facts: Mapping[str, str], best_yaml: str | None
) -> str:
    """Return the page as text."""
    trials = results(state, tune.metric)
    sweep = Sweep(name, state, tune, trials, best(trials, tune.metric), facts, best_yaml)
    sections = (
        _header(sweep),
        f'<section id="headline">{sweep_tiles(state, trials, sweep.chosen, tune.metric)}</section>',
        _trials(sweep),
        _quality(sweep),
        _cost(sweep),
        _configurations(sweep),
        _learning(sweep),
        _failures(sweep),
        _protocol(sweep),
        _best(sweep),
    )
    footer = "Every number on this page is read from the ledger of the sweep, or computed from it."
    return page(f"{name} · dti_ray sweep", sections, footer, RULES)


def _header(sweep: Sweep) -> str:
    words = (
        f"{counted(len(sweep.trials), 'trial')} over {', '.join(_keys(sweep))}",
        f"{counted(len(sweep.tune.seeds), 'seed')} each",
        f"search: {sweep.tune.search}",
        f"scheduler: {sweep.tune.scheduler}",
    )
    return header("Report of one sweep", sweep.name, " · ".join(words))


def _trials(sweep: Sweep) -> str:
    metric = METRICS[sweep.tune.metric]
    lead = f"Every configuration, the best {metric} first. A run counts with the best of its validations."
    if not sweep.trials:
        return section("trials", "Trials", lead, missing("No trial has been planned yet."))
    body = trials_table(sweep.trials, _keys(sweep), sweep.tune.metric, sweep.chosen)
    return section("trials", "Trials", lead, body)


def _quality(sweep: Sweep) -> str:
    key = FIRST_KEY if FIRST_KEY in _keys(sweep) else _keys(sweep)[0]
    title = "How large may k be?" if key == FIRST_KEY else f"Quality against {key}"
    lead = "A larger k trains faster; these pictures show what it costs in quality."
    if key != FIRST_KEY:
        lead = f"{FIRST_KEY} was not searched, so the first key that was stands on the axis."
    return section("quality", title, lead, _quality_plots(sweep, key))


def _quality_plots(sweep: Sweep, key: str) -> str:
    if not sweep.has_reports:
        return missing("No trial has been validated yet, so there is nothing to draw.")
    shown = [metric for metric in METRICS if any(one.mean(metric) for one in sweep.trials)]
    return plots([plot_against(sweep.trials, key, metric, sweep.best_number) for metric in shown])


def _cost(sweep: Sweep) -> str:
    lead = "What each point of AUC costs: the front holds the trials that no other beats in both."
    cost: Cost = "seconds_per_target"
    if not any(one.auc is not None and one.seconds_per_target is not None for one in sweep.trials):
        cost = "flops_per_target"
    if not any(one.auc is not None and getattr(one, cost) is not None for one in sweep.trials):
        return section("cost", "Quality against cost", lead, missing("No trial has both an AUC and a cost yet."))
    front = pareto(sweep.trials, cost)
    picture = plot_cost(sweep.trials, front, cost, sweep.best_number)
    words = "No trial is done yet, so there is no front: unfinished trials could still move."
    other = front_table(front, cost, _keys(sweep)) if front else missing(words)
    return section("cost", "Quality against cost", lead, plots([picture], other))


def _configurations(sweep: Sweep) -> str:
    lead = "Which keys matter, and which values go well together."
    told = [one for one in sweep.trials if one.mean(sweep.tune.metric) is not None]
    if len(told) < 2 or not varied_keys(one.params for one in told):
        words = "Fewer than two different configurations have been validated yet, so none can be compared."
        return section("configurations", "What mattered", lead, missing(words))
    body = figure(plot_configurations(told, sweep.tune.metric))
    shares = importance(sweep.trials, sweep.tune.metric)
    if shares is None:
        words = (
            f"The importance of keys is not estimated: that takes {FEWEST_TRIALS} trials that are done or stopped, "
            "and two keys that vary among them."
        )
        return section("configurations", "What mattered", lead, body + missing(words))
    return section("configurations", "What mattered", lead, body + figure(plot_importance(shares, sweep.tune.metric)))


def _learning(sweep: Sweep) -> str:
    lead = "Trials are compared, and ended, at equal numbers of targets seen, so that every k is treated alike."
    if not sweep.has_reports:
        return section("learning", "Learning curves", lead, missing("No trial has been validated yet."))
    shown = [metric for metric in METRICS if any(one.mean(metric) for one in sweep.trials)]
    body = plots([plot_learning(sweep.state, metric, sweep.chosen) for metric in shown])
    changes = Counter(run.trial for run in sweep.state.runs.values() for _ in run.changes)
    if changes:
        each = ", ".join(f"trial {number} ({count} times)" for number, count in sorted(changes.items()))
        body += f'<p class="note">The learning rate was changed on the way, so the table shows where it began: {each}.'
        body += "</p>"
    return section("learning", "Learning curves", lead, body)


def _failures(sweep: Sweep) -> str:
    lead = "What went wrong. A run that fails is started again, up to tune.max_failures times in all."
    failed = [run for run in sweep.state.runs.values() if run.failures or run.status is Status.FAILED]
    body = failures_table(failed) if failed else '<p class="note">No run has failed.</p>'
    return section("failures", "Failures", lead, body)


def _protocol(sweep: Sweep) -> str:
    tune = sweep.tune
    values = {
        "metric": f"{METRICS[tune.metric]} on the validation split",
        "seeds": ", ".join(map(str, tune.seeds)),
        "search": f"{tune.search}, seed {tune.seed}",
        "scheduler": tune.scheduler,
        **sweep.facts,
    }
    lead = "How the trials were trained and evaluated, the same for all of them."
    words = (
        "The best configuration was chosen on the validation split, so its validation score is flattered by the "
        "choice, the more so the more trials there were; only the test split says how good it is."
    )
    body = f'<div class="card">{pairs(values)}<p class="note">{words}</p></div>'
    return section("protocol", "Protocol", lead, body)


def _best(sweep: Sweep) -> str:
    lead = "The best configuration, complete: dti-ray train -c takes the file as it is."
    if sweep.best_yaml is None:
        return section("best", "Best configuration", lead, missing("No configuration has been chosen yet."))
    body = f"<details><summary>best.yaml</summary><pre>{escape(sweep.best_yaml)}</pre></details>"
    return section("best", "Best configuration", lead, body)


def _keys(sweep: Sweep) -> list[str]:
    """Return the searched keys, those of earlier spaces of the sweep last."""
    earlier = (key for one in sweep.trials for key in one.params)
    return list(dict.fromkeys([*sweep.tune.space, *earlier]))
