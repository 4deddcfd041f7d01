from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.config import Dimension, TuneConfig
from dti_ray.report.sweep import build_sweep_page, write_sweep_report
from dti_ray.report.sweep_scale import cost_unit, limits, metric_scale, scale_of
from dti_ray.report.sweep_tables import duration, plain
from dti_ray.storage import Storage
from dti_ray.tune.ledger import Change, Report, RunState, Status, SweepState, Trial, run_name
from dti_ray.tune.results import pareto, results

SECTIONS = ("headline", "trials", "quality", "cost", "configurations", "learning", "failures", "protocol", "best")
FATES = {2: Status.STOPPED, 5: Status.STOPPED, 6: Status.FAILED, 7: Status.RUNNING}
KS = (1, 10, 20, 50, "all")
FACTS = {"data set": "ml-100k", "protocol": "sliding, n = 10"}


def one_run(trial: int, seed: int, k: int | str, status: Status) -> RunState:
    """Make a run that learns better and costs more the smaller k is."""
    size, last = (120 if k == "all" else int(k)), 6 if status is Status.DONE else 2
    rate = 0.001 + 0.01 / size
    top = 0.78 - 0.0002 * size + 0.001 * seed - 0.001 * trial
    reports = tuple(Report(1000 * i, top - 0.1 / i, 1.3 - top + 0.1 / i, 1000 * i * rate) for i in range(1, last + 1))
    failures = ("worker 0: <b>out of memory</b>", "the loss is not finite") if status is Status.FAILED else ()
    return RunState(
        run_name("sweep", trial, seed), trial, seed, status, reports, failures, starts=1,
        targets=1000 * last, seconds=1000 * last * rate, flops_per_target=2e9 + 3e10 / size,
    )  # fmt: skip


def sweep(trials: int, seeds: int = 2) -> SweepState:
    params = {
        i: {"packing.k": KS[i % 5], "optim.lr": 3e-4 * 1.3**i, "debias.strength": 0.1 * (i % 2)} for i in range(trials)
    }
    runs = [
        one_run(i, seed, KS[i % 5], FATES.get(i, Status.DONE)) for i in range(trials) for seed in range(seeds)
    ]  # fmt: skip
    return SweepState({i: Trial(i, values) for i, values in params.items()}, {run.name: run for run in runs})


def tune(**changes: object) -> TuneConfig:
    return TuneConfig.model_validate({"seeds": (0, 1), "trials": 10, **changes})


def page_of(state: SweepState, config: TuneConfig | None = None, best_yaml: str | None = "packing:\n  k: 1\n") -> str:
    return build_sweep_page("sweep", state, config or tune(), FACTS, best_yaml)


def section(page: str, name: str) -> str:
    return page.partition(f'<section id="{name}">')[2].partition("</section>")[0]


class Balance(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def full() -> str:
    return page_of(sweep(10))


def test_page_lies_in_the_folder_of_the_sweep(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    path = write_sweep_report(storage, "mine", SweepState(), tune(), FACTS, None)
    assert path == storage.display("sweeps/mine/report/index.html")
    assert storage.read("sweeps/mine/report/index.html").startswith(b"<!doctype html>")


def test_page_is_complete_in_itself_and_well_formed(full: str) -> None:
    for text in ("http://", "https://", "<script", "@import"):
        assert text not in full
    references = re.findall(r"(?:src|href)=\"([^\"]{0,30})|url\(([^)]{0,30})", full)
    assert all((link or url).startswith(("#", "data:")) for link, url in references)
    reader = Balance()
    reader.feed(full)
    assert not reader.open
    identifiers = re.findall(r' id="([^"]*)"', full)
    assert len(identifiers) == len(set(identifiers))
    assert "mathdefault" not in full


def test_sections_stand_in_order_and_nothing_is_missing(full: str) -> None:
    assert re.findall(r'<section id="(\w+)">', full) == list(SECTIONS)
    assert 'class="missing"' not in full
    assert full.count("<figure") == 7
    assert ">nan<" not in full


def test_headline_tells_the_best_trial_with_its_interval(full: str) -> None:
    tiles = section(full, "headline")
    best = results(sweep(10), "auc")[0].auc
    assert best is not None
    assert best.low is not None
    for text in (f"{best.mean:.4f}", f"{best.low:.4f} to", "Trial 0", "packing.k 1 · optim.lr 0.0003", "6 of 10"):
        assert text in tiles
    assert "2 stopped early, 1 failed, 1 to go" in tiles


def test_table_has_all_trials_the_best_first_and_in_bold(full: str) -> None:
    rows = re.findall(r"<tr( class=\"model\")?><td[^>]*>(\d+)</td><td[^>]*>([\d.]+)", section(full, "trials"))
    values = [float(value) for _, _, value in rows]
    assert len(rows) == 10
    assert values == sorted(values, reverse=True)
    assert [number for kind, number, _ in rows if kind] == ["0"]


def test_log_loss_as_the_metric_puts_the_least_first() -> None:
    page = page_of(sweep(10), tune(metric="log_loss"))
    rows = re.findall(r"<tr[^>]*><td[^>]*>\d+</td><td[^>]*>[\d.]+<small>[^<]*</small></td><td[^>]*>([\d.]+)", page)
    assert len(rows) == 10
    assert rows == sorted(rows)
    assert "Best validation log loss" in page


def test_large_sweep_folds_most_of_its_trials() -> None:
    page = page_of(sweep(30, seeds=1))
    assert "5 further trials" in section(page, "trials")
    assert "interval" not in section(page, "trials")


def test_stopped_trial_above_the_best_is_not_chosen() -> None:
    state = sweep(2)
    runs = {name: replace(run, status=Status.STOPPED) if run.trial == 0 else run for name, run in state.runs.items()}
    page = page_of(replace(state, runs=runs))
    assert '<tr class="model"><td class="best">1</td>' in page
    assert re.findall(r"<tr[^>]*><td[^>]*>(\d)</td>", section(page, "trials")) == ["0", "1"]


def test_quality_stands_against_k_with_all_as_its_last_value(full: str) -> None:
    quality = section(full, "quality")
    for text in ("AUC against packing.k", "Log loss against packing.k", ">all</text>", "95% interval"):
        assert text in quality


def test_other_key_takes_the_place_of_k_and_is_named() -> None:
    state = sweep(6)
    trials = {i: Trial(i, {"optim.lr": one.params["optim.lr"]}) for i, one in state.trials.items()}
    space = {"optim.lr": Dimension(loguniform=(1e-4, 1e-2))}
    page = page_of(replace(state, trials=trials), tune(space=space))
    assert "AUC against optim.lr" in section(page, "quality")
    assert "packing.k was not searched" in section(page, "quality")
    assert "two keys that vary" in section(page, "configurations")


def test_front_is_listed_from_cheap_to_dear(full: str) -> None:
    cost = section(full, "cost")
    front = pareto(results(sweep(10), "auc"), "seconds_per_target")
    assert re.findall(r"<tr><td>(\d+)</td>", cost) == [str(one.number) for one in front]
    assert "ms per target" in cost


def test_operations_are_the_cost_where_no_time_is_known() -> None:
    state = sweep(6)
    page = page_of(replace(state, runs={name: replace(run, targets=0) for name, run in state.runs.items()}))
    assert "GFLOP per target" in section(page, "cost")


def test_importance_comes_with_its_caution(full: str) -> None:
    assert "What moved the AUC" in section(full, "configurations")
    assert "With few trials this is a hint" in section(full, "configurations")


def test_failures_are_told_with_every_reason(full: str) -> None:
    failures = section(full, "failures")
    assert "sweep-0006-s0" in failures
    assert "worker 0: &lt;b&gt;out of memory&lt;/b&gt;<br>the loss is not finite" in failures
    assert "No run has failed." in section(page_of(sweep(1)), "failures")


def test_protocol_states_the_facts_and_what_a_validation_score_is_worth(full: str) -> None:
    protocol = section(full, "protocol")
    for text in ("ml-100k", "sliding, n = 10", "random, seed 0", "asha", "flattered by the choice"):
        assert text in protocol


def test_best_configuration_can_be_unfolded(full: str) -> None:
    assert "<details><summary>best.yaml</summary><pre>packing:\n  k: 1\n</pre>" in section(full, "best")


def test_changes_of_the_learning_rate_are_told() -> None:
    state = sweep(2)
    changed = {name: replace(run, changes=(Change(2000, "sweep-0001-s0", 1e-3),)) for name, run in state.runs.items()}
    assert "trial 0 (2 times), trial 1 (2 times)" in section(page_of(replace(state, runs=changed)), "learning")


def test_empty_sweep_says_in_words_what_is_missing() -> None:
    page = page_of(SweepState(), best_yaml=None)
    assert page.count('class="missing"') == 6
    assert "no trial is done yet" in section(page, "headline")
    assert "<svg" not in page


def test_planned_sweep_without_reports_has_its_table() -> None:
    state = sweep(3)
    waiting = {name: RunState(name, run.trial, run.seed) for name, run in state.runs.items()}
    page = page_of(replace(state, runs=waiting), best_yaml=None)
    assert section(page, "trials").count("waiting") == 3
    assert "No trial has been validated yet" in section(page, "quality")


def test_running_sweep_has_pictures_but_neither_a_best_nor_a_front() -> None:
    state = sweep(3)
    running = {name: replace(run, status=Status.RUNNING) for name, run in state.runs.items()}
    page = page_of(replace(state, runs=running), best_yaml=None)
    assert page.count("<figure") == 6
    assert "there is no front" in section(page, "cost")
    assert "No trial is done yet, so none is best." in section(page, "trials")


def test_single_trial_with_one_report_works() -> None:
    state = sweep(1, seeds=1)
    runs = {name: replace(run, reports=run.reports[:1]) for name, run in state.runs.items()}
    page = page_of(replace(state, runs=runs))
    assert "one seed, so how far chance goes is not known" in page
    assert "1 trial over" in page


def test_trial_that_diverged_is_left_out_by_name() -> None:
    state = sweep(10)
    bad = tuple(Report(1000 * i, 0.5, 3.0, float(i)) for i in range(1, 7))
    runs = {name: replace(run, reports=bad) if run.trial == 4 else run for name, run in state.runs.items()}
    page = page_of(replace(state, runs=runs))
    assert page.count("outside the picture: trial 4.") == 3


def test_values_that_are_not_defined_are_no_values() -> None:
    state, undefined = sweep(2), (Report(1000, math.nan, math.nan, 1.0),)
    runs = {name: replace(run, reports=undefined) for name, run in state.runs.items()}
    assert "No trial has been validated yet" in page_of(replace(state, runs=runs))


def test_markup_in_a_sweep_is_escaped() -> None:
    state = sweep(6)
    params = {i: Trial(i, {"model.name": "<u>" + "ab"[i % 2], "optim.lr": 1e-3 * (i + 1)}) for i in range(6)}
    space = {"model.name": Dimension(choice=("<u>a", "<u>b")), "optim.lr": Dimension(uniform=(1e-3, 1e-2))}
    page = build_sweep_page(
        "<i>s", replace(state, trials=params), tune(space=space), {"<s>": "<q>"}, "</pre><script>alert(1)"
    )  # fmt: skip
    for markup in ("<u>", "<i>s", "<s>", "<q>", "<script"):
        assert markup not in page
    assert "&lt;u&gt;a" in page


def test_few_values_with_a_word_among_them_stand_at_equal_distances() -> None:
    scale = scale_of(["all", 50, 10, 10, 1])
    assert scale.ticks == ((0.0, "1"), (pytest.approx(1 / 3), "10"), (pytest.approx(2 / 3), "50"), (1.0, "all"))
    assert scale.is_stepped


def test_many_numbers_of_several_magnitudes_stand_by_their_logarithm() -> None:
    scale = scale_of([1e-4 * 2**i for i in range(9)])
    assert scale.is_log
    assert scale.place(1e-4 * 2**4) == pytest.approx(0.5)
    assert [label for _, label in scale.ticks][:3] == ["0.0001", "0.0002", "0.0005"]


VALUES = st.none() | st.booleans() | st.integers(-999, 999) | st.floats(-1e6, 1e6) | st.text(max_size=3)


@settings(deadline=None, max_examples=50)
@given(st.lists(VALUES, min_size=1, max_size=30))
def test_every_value_has_a_place_and_numbers_stand_in_order_before_words(values: list) -> None:
    scale = scale_of(values)
    numbers = sorted(value for value in values if isinstance(value, int | float) and not isinstance(value, bool))
    words = [value for value in values if value not in numbers or isinstance(value, bool)]
    places = [scale.place(value) for value in numbers]
    assert all(0 <= scale.place(value) <= 1 for value in values)
    assert places == sorted(places)
    assert all(scale.place(word) > max(places, default=-1) for word in words)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place, _ in scale.ticks)


def test_better_end_of_a_metric_is_at_the_top() -> None:
    assert metric_scale([0.7, 0.8], True).place(0.8) > metric_scale([0.7, 0.8], True).place(0.7)
    assert metric_scale([0.5, 0.6], False).place(0.5) > metric_scale([0.5, 0.6], False).place(0.6)


def test_limits_leave_out_what_is_far_worse_and_never_what_is_better() -> None:
    low, high = limits([0.5, 0.76, 0.77, 0.77, 0.78, 0.9], (), True)
    assert 0.5 < low < 0.76
    assert high > 0.9
    low, high = limits([0.4, 0.55, 0.56, 0.56, 0.57, 3.0], (), False)
    assert low < 0.4
    assert 0.57 < high < 3.0


@pytest.mark.parametrize(
    ("cost", "value", "unit"),
    [("seconds_per_target", 2.0, "s"), ("seconds_per_target", 0.002, "ms"), ("seconds_per_target", 2e-6, "µs"),
     ("flops_per_target", 3e12, "TFLOP"), ("flops_per_target", 3e9, "GFLOP"), ("flops_per_target", 3.0, "FLOP")],
)  # fmt: skip
def test_cost_has_the_unit_that_reads_best(cost, value: float, unit: str) -> None:
    assert cost_unit([value], cost)[1] == unit


def test_numbers_are_written_short() -> None:
    assert [plain(value) for value in (0.00080631, 20, True, None, "all")] == ["0.0008063", "20", "true", "null", "all"]
    assert [duration(value) for value in (12, 90, 5400, 200_000)] == ["12 s", "1.5 min", "1.5 h", "2.3 days"]
