from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from dti_ray.errors import InputError
from dti_ray.metrics import Predictions, auc, evaluate, gauc, log_loss, paired_difference
from dti_ray.study.compare import Asked, compare
from dti_ray.study.cost import costs
from dti_ray.study.results import Classic
from dti_ray.study.seeds import deviation, pooled_deviation, rerun_interval
from tests.study_results import answer, results, run, said

DRAWS = 100


def asked(row: str, n: int = 20, protocol: str = "sliding", split: str = "valid") -> Asked:
    return Asked(split, row, protocol, n)


def test_gap_of_identical_predictions_is_nothing_with_an_interval_of_nothing() -> None:
    made = results({"a": {}, "b": {}}, [run(row, 0, [answer(said(1.0))]) for row in "ab"])
    gap = compare(made, DRAWS).qualities[asked("b")].gap
    assert gap is not None
    assert (gap.auc.value, gap.auc.low, gap.auc.high) == (0.0, 0.0, 0.0)


def test_reference_that_was_not_asked_with_its_own_context_answers_with_its_shortest() -> None:
    of_reference = [answer(said(3.0), n=100), answer(said(2.0), n=50)]
    made = results({"a": {}, "b": {}}, [run("a", 0, of_reference), run("b", 0, [answer(said(2.0), n=50)])])
    qualities = compare(made, DRAWS).qualities
    gap = next(one.gap for key, one in qualities.items() if key.row == "b")
    assert gap is not None
    assert gap.auc.value == 0.0


def test_gap_is_positive_where_the_row_is_better() -> None:
    made = results({"a": {}, "b": {}}, [run("a", 0, [answer(said(3.0))]), run("b", 0, [answer(said(0.5))])])
    gap = compare(made, DRAWS).qualities[asked("b")].gap
    assert gap is not None
    assert 0 < gap.auc.low <= gap.auc.value <= gap.auc.high


def test_gap_of_one_seed_is_the_paired_difference_of_the_metrics() -> None:
    of, to = said(1.0, 5), said(1.5, 6)
    made = results({"a": {}, "b": {}}, [run("a", 0, [answer(to)]), run("b", 0, [answer(of)])])
    one = compare(made, DRAWS, seed=3).qualities[asked("b")]
    wanted = paired_difference(of, to, DRAWS, seed=3)["auc"]
    assert one.gap is not None
    assert [one.gap.auc.value, one.gap.auc.low, one.gap.auc.high] == pytest.approx(
        [wanted.value, wanted.low, wanted.high]
    )
    alone = evaluate(of, DRAWS, seed=3)
    assert [one.auc.value, one.auc.low, one.auc.high] == pytest.approx([alone.auc.value, alone.auc.low, alone.auc.high])


def test_what_is_told_of_a_row_are_means_over_its_seeds() -> None:
    each = [said(1.0, seed) for seed in range(3)]
    made = results({"a": {}}, [run("a", seed, [answer(one)]) for seed, one in enumerate(each)])
    told = compare(made, DRAWS).qualities[asked("a")]
    aucs = [float(auc(one.label, one.probability)) for one in each]
    assert told.seeds == (0, 1, 2)
    assert told.auc_by_seed == pytest.approx(aucs)
    assert told.auc.value == pytest.approx(statistics.fmean(aucs))
    assert told.auc_sd == pytest.approx(statistics.stdev(aucs))
    assert told.log_loss == pytest.approx(np.mean([log_loss(one.label, one.probability) for one in each]))
    assert told.gauc == pytest.approx(np.mean([gauc(one.user, one.label, one.probability) for one in each]))
    assert (told.seconds_per_million, told.tokens_per_million) == pytest.approx((10_000, 2_000_000))


def test_gap_and_speed_rest_on_the_seeds_that_both_rows_have() -> None:
    theirs = [run("a", seed, [answer(said(1.0, seed))], seconds=1000.0 + 400 * seed) for seed in (0, 1)]
    ours = [run("b", seed, [answer(said(1.2, 10 + seed))], k=50, seconds=100.0) for seed in (1, 2)]
    made = results({"a": {}, "b": {}}, [*theirs, *ours], padded_over_packed=1.1)
    one, price = compare(made, DRAWS).qualities[asked("b")], costs(made)["b"]
    assert one.gap is not None
    assert one.seeds == (1, 2)
    wanted = paired_difference(said(1.2, 11), said(1.0, 1), 0, seed=0)["auc"].value
    assert one.gap.by_seed == pytest.approx((wanted,))
    assert math.isnan(one.gap.sd)
    assert price.speedup_packed == pytest.approx(14.0)
    assert price.speedup_padded == pytest.approx(15.4)
    assert price.token_ratio == pytest.approx(14.0)
    assert price.flop_ratio == pytest.approx(14.0)
    assert price.seconds_per_million == pytest.approx(100_000)


def test_without_a_shared_seed_there_is_neither_gap_nor_speed() -> None:
    made = results({"a": {}, "b": {}}, [run("a", 0, [answer(said(1.0))]), run("b", 1, [answer(said(1.0))])])
    assert compare(made, DRAWS).qualities[asked("b")].gap is None
    assert costs(made)["b"].speedup_packed is None


def test_without_the_reference_there_is_neither_gap_nor_speed() -> None:
    made = results({"a": {}, "b": {}}, [run("b", 0, [answer(said(1.0))])], padded_over_packed=1.1)
    assert compare(made, DRAWS).qualities[asked("b")].gap is None
    assert (costs(made)["b"].speedup_packed, costs(made)["b"].speedup_padded) == (None, None)
    assert list(costs(made)) == ["b"]


def test_every_answer_is_held_against_the_references_own_context_under_sliding_inference() -> None:
    reference = [answer(said(1.0, 1)), answer(said(2.0, 2), n=45)]
    row = [answer(said(1.5, 3), n=45), answer(said(1.6, 4), n=45, protocol="streaming")]
    made = results({"a": {}, "b": {}}, [run("a", 0, reference), run("b", 0, row, k=50)])
    found = compare(made, 0).qualities
    for protocol, own in (("sliding", said(1.5, 3)), ("streaming", said(1.6, 4))):
        gap = found[asked("b", 45, protocol)].gap
        assert gap is not None
        assert gap.auc.value == pytest.approx(paired_difference(own, said(1.0, 1), 0, 0)["auc"].value)
    assert found[asked("a")].gap is None
    assert found[asked("a", 45)].gap is not None


def test_streaming_is_held_against_sliding_of_the_same_context_and_seeds() -> None:
    of, to = said(1.0, 1), said(1.5, 2)
    made = results({"a": {}}, [run("a", 0, [answer(to), answer(of, protocol="streaming")])])
    gaps = compare(made, DRAWS).streaming
    assert list(gaps) == [asked("a")]
    wanted = paired_difference(of, to, DRAWS, 0)["auc"]
    assert [gaps[asked("a")].auc.value, gaps[asked("a")].auc.low] == pytest.approx([wanted.value, wanted.low])


def test_answers_of_other_targets_are_refused() -> None:
    shuffled = said(1.0)
    other = Predictions(shuffled.user[::-1], shuffled.label[::-1], shuffled.probability[::-1])
    made = results({"a": {}, "b": {}}, [run("a", 0, [answer(shuffled)]), run("b", 0, [answer(other)])])
    with pytest.raises(InputError, match="answers of the valid split"):
        compare(made, DRAWS)


def test_auc_of_one_class_is_nan_and_everything_made_of_it() -> None:
    clicks = Predictions(np.array([0, 1]), np.array([1, 1]), np.array([0.2, 0.4]))
    made = results({"a": {}, "b": {}}, [run(row, seed, [answer(clicks)]) for row in "ab" for seed in (0, 1)])
    told = compare(made, DRAWS).qualities[asked("b")]
    assert told.gap is not None
    assert all(math.isnan(value) for value in (told.auc.value, told.auc_sd, told.gauc, told.gap.auc.low, told.gap.sd))


def test_the_default_meets_classics_with_the_context_that_validates_best() -> None:
    splits = ("valid", "test")
    contexts = {20: 2.0, 45: 0.5}
    told = [answer(said(noise, 10 * n + seed), split, n=n) for split in splits for n, noise in contexts.items()
            for seed in (0,)]  # fmt: skip
    classic = Classic("item mean", {split: said(1.0, 7) for split in splits}, 0.1, "")
    made = results({"a": {}}, [run("a", 0, told)], [classic], default="a")
    found = compare(made, DRAWS).classics
    assert [one.split for one in found] == ["valid", "test"]
    wanted = paired_difference(said(0.5, 450), said(1.0, 7), DRAWS, 0)["auc"]
    assert list(found[1].default) == [("sliding", 45)]
    gap = found[1].default["sliding", 45].auc
    assert [gap.value, gap.low, gap.high] == pytest.approx([wanted.value, wanted.low, wanted.high])


def test_main_context_is_that_of_the_reference_else_the_rows_own() -> None:
    rows = {"a": {}, "long": {}, "many": {}}
    made = results(rows, [
        run("a", 0, [answer(said(1.0))]),
        run("long", 0, [answer(said(1.0), n=45)], n=45),
        run("many", 0, [answer(said(1.0), n=n) for n in (70, 20, 45)], n=45),
    ])  # fmt: skip
    found = compare(made, 0)
    assert [found.main_context(row) for row in rows] == [20, 45, 20]
    assert [one.asked.n for one in found.of("many", "valid", "sliding")] == [20, 45, 70]
    assert found.main_context("nobody") is None


def test_a_rerun_lies_within_students_prediction_interval() -> None:
    low, high = rerun_interval(0.8, seeds=3, pooled_sd=0.001, freedom=4)
    assert (high - 0.8, 0.8 - low) == pytest.approx((2.776445 * 0.001 * math.sqrt(4 / 3),) * 2)


def test_deviations_are_pooled_within_rows_and_one_seed_has_none() -> None:
    assert pooled_deviation([(1.0, 3.0), (10.0, 10.0, 13.0), (99.0,)]) == pytest.approx((math.sqrt(8 / 3), 3))
    assert math.isnan(pooled_deviation([(1.0,)])[0])
    assert math.isnan(deviation((1.0,)))
