"""The metrics against scikit-learn, slow loops and hand-computed examples."""

from __future__ import annotations

import json
import math
import pickle
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from dti_ray import metrics
from dti_ray.errors import InputError
from dti_ray.metrics import Metrics, Predictions, bootstrap, evaluate, paired_difference

TIED = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 0.75, 1.0])
ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1), TIED, st.integers(0, 3)), min_size=2, max_size=40)

UNHURRIED = settings(deadline=None, max_examples=60)


def simulate(targets: int, users: int, seed: int) -> Predictions:
    """Calibrated predictions of users who differ in their click rate."""
    generator = np.random.default_rng(seed)
    user = generator.integers(users, size=targets)
    logit = generator.normal(size=users)[user] + generator.normal(size=targets)
    probability = 1 / (1 + np.exp(-logit))
    return Predictions(user, generator.random(targets) < probability, probability)


def columns(rows: list[tuple[int, int, float, int]]) -> tuple[np.ndarray, ...]:
    user, label, probability, weight = zip(*rows, strict=True)
    return np.array(user), np.array(label), np.array(probability), np.array(weight, dtype=float)


def values(result: Metrics) -> dict[str, float]:
    return {name: plain["value"] for name, plain in result.to_json().items() if isinstance(plain, dict)}


@given(ROWS)
@UNHURRIED
def test_auc_equals_scikit_learn_with_ties_and_weights(rows: list) -> None:
    _, label, probability, weight = columns(rows)
    assume(weight @ label > 0 and weight @ (1 - label) > 0)
    expected = reference.roc_auc_score(label, probability, sample_weight=weight)
    assert metrics.auc(label, probability, weight) == pytest.approx(expected, abs=1e-12)


@given(ROWS)
@UNHURRIED
def test_log_loss_and_f1_equal_scikit_learn_with_weights(rows: list) -> None:
    _, label, probability, weight = columns(rows)
    predicted = probability >= 0.5
    assume(weight.sum() > 0 and weight @ (label | predicted) > 0)
    inside = np.clip(probability, 1e-6, 1 - 1e-6)
    loss = reference.log_loss(label, inside, sample_weight=weight, labels=[0, 1])
    f1 = reference.f1_score(label, predicted, sample_weight=weight)
    assert metrics.log_loss(label, inside, weight) == pytest.approx(loss, abs=1e-12)
    assert metrics.f1(label, probability, weight) == pytest.approx(f1, abs=1e-12)


@given(ROWS)
@UNHURRIED
def test_a_whole_weight_is_the_same_as_repeated_rows(rows: list) -> None:
    user, label, probability, _ = columns(rows)
    weight = np.random.default_rng(len(rows)).integers(0, 4, size=5)[user]
    assume(weight.sum() > 0)
    again = [np.repeat(column, weight) for column in (label, probability)]
    # A drawn user is a new user each time: his copies are compared with themselves only.
    copy = np.repeat(user, weight) * 10 + np.concatenate([np.arange(count) for count in weight])
    for function in (metrics.auc, metrics.normalised_entropy, metrics.calibration, metrics.calibration_error):
        expected = function(*again)
        assert function(label, probability, weight) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    expected = metrics.gauc(copy, *again)
    assert metrics.gauc(user, label, probability, weight) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(ROWS)
@UNHURRIED
def test_gauc_equals_a_loop_over_users(rows: list) -> None:
    user, label, probability, _ = columns(rows)
    weighted, targets, left_out = 0.0, 0, 0
    for one in np.unique(user):
        own = user == one
        if label[own].min() == label[own].max():
            left_out += 1
            continue
        weighted += own.sum() * reference.roc_auc_score(label[own], probability[own])
        targets += own.sum()
    result = evaluate(Predictions(user, label, probability), bootstrap=0, seed=0)
    expected = weighted / targets if targets else math.nan
    assert result.gauc.value == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert result.gauc_users_left_out == left_out


@given(ROWS, st.permutations(range(40)))
@UNHURRIED
def test_the_order_of_the_rows_changes_nothing(rows: list, order: list[int]) -> None:
    user, label, probability, _ = columns(rows)
    shuffled = [index for index in order if index < len(rows)]
    one = evaluate(Predictions(user, label, probability), 20, seed=3)
    other = evaluate(Predictions(user[shuffled], label[shuffled], probability[shuffled]), 20, seed=3)
    for field in ("auc", "log_loss", "f1", "gauc", "calibration", "ece"):
        expected = (getattr(one, field).value, getattr(one, field).low, getattr(one, field).high)
        got = (getattr(other, field).value, getattr(other, field).low, getattr(other, field).high)
        assert got == pytest.approx(expected, abs=1e-9, nan_ok=True), field


def test_auc_of_the_documented_example_counts_the_tie_half() -> None:
    assert metrics.auc(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.4, 0.8])) == 3.5 / 4


def test_ece_by_hand() -> None:
    # Bin 1 of 15 holds .07 and .12 (residuals .07 - .88 = -.81), bin 7 holds .50 (.50), the last 1.0 (0).
    label, probability = np.array([0, 1, 0, 1]), np.array([0.07, 0.12, 0.50, 1.0])
    assert metrics.calibration_error(label, probability) == pytest.approx((0.81 + 0.50) / 4)


def test_normalised_entropy_of_the_base_rate_is_one() -> None:
    label = np.array([1, 0, 0, 0, 1])
    assert metrics.normalised_entropy(label, np.full(5, 0.4)) == pytest.approx(1.0)


def test_calibration_is_predicted_over_actual_clicks() -> None:
    assert metrics.calibration(np.array([1, 0, 1, 0]), np.array([0.9, 0.6, 0.9, 0.6])) == pytest.approx(1.5)


def test_a_confident_miss_costs_a_finite_log_loss() -> None:
    assert metrics.log_loss(np.array([1]), np.array([0.0])) == pytest.approx(-math.log(1e-12))
    assert metrics.log_loss(np.array([0]), np.array([1.0])) == pytest.approx(-math.log(1e-12), rel=1e-4)


def test_f1_counts_a_probability_of_one_half_as_a_click() -> None:
    assert metrics.f1(np.array([1, 0]), np.array([0.5, 0.49])) == 1.0


@pytest.mark.parametrize(
    ("label", "undefined"), [(1, {"auc", "gauc", "ne"}), (0, {"auc", "gauc", "ne", "calibration"})]
)
def test_one_class_gives_nan_where_undefined_and_numbers_elsewhere(label: int, undefined: set[str]) -> None:
    result = evaluate(Predictions(np.arange(3), np.full(3, label), np.array([0.2, 0.5, 0.9])), 50, seed=0)
    assert {name for name, value in values(result).items() if value is None} == undefined
    assert math.isnan(result.auc.low)
    assert math.isnan(result.auc.high)
    assert math.isfinite(result.log_loss.low)
    assert result.gauc_users_left_out == result.users == 3


def test_f1_without_clicks_and_without_predicted_clicks_is_nan() -> None:
    assert math.isnan(metrics.f1(np.array([0, 0]), np.array([0.1, 0.2])))


def test_rows_of_weights_give_one_number_each() -> None:
    predictions = simulate(targets=60, users=7, seed=0)
    label, probability = predictions.label, predictions.probability
    weight = np.random.default_rng(1).integers(0, 3, size=7)[None, predictions.user] * np.array([[1], [2], [5]])
    for function in (metrics.auc, metrics.log_loss, metrics.f1, metrics.calibration_error):
        together = function(label, probability, weight)
        assert together == pytest.approx([float(function(label, probability, row)) for row in weight])


def test_replicates_equal_repeating_the_drawn_users() -> None:
    predictions = simulate(targets=80, users=12, seed=5)
    generator = np.random.default_rng(9)
    aucs = []
    for _ in range(30):
        drawn = generator.integers(12, size=12)
        rows = np.concatenate([np.flatnonzero(predictions.user == user) for user in drawn])
        aucs.append(reference.roc_auc_score(predictions.label[rows], predictions.probability[rows]))
    assert len(np.unique(predictions.user)) == 12
    result = evaluate(predictions, 30, seed=9)
    assert [result.auc.low, result.auc.high] == pytest.approx(np.percentile(aucs, [2.5, 97.5]))


def test_bootstrap_is_reproducible_and_follows_its_seed() -> None:
    predictions = simulate(targets=300, users=30, seed=1)
    assert evaluate(predictions, 100, seed=7) == evaluate(predictions, 100, seed=7)
    assert evaluate(predictions, 100, seed=7).auc.low != evaluate(predictions, 100, seed=8).auc.low


def test_chunk_size_does_not_change_the_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = simulate(targets=300, users=31, seed=1)
    whole = evaluate(predictions, 25, seed=7)
    monkeypatch.setattr(bootstrap, "CHUNK_WEIGHTS", 1000)
    chunked = evaluate(predictions, 25, seed=7)
    assert (chunked.auc.low, chunked.auc.high) == pytest.approx((whole.auc.low, whole.auc.high), abs=1e-12)
    assert (chunked.ne.low, chunked.ne.high) == pytest.approx((whole.ne.low, whole.ne.high), abs=1e-12)


def test_intervals_cover_the_truth_about_as_often_as_they_promise() -> None:
    truth = {"auc": evaluate(simulate(200_000, 100_000, seed=0), 0, seed=0).auc.value, "calibration": 1.0}
    covered = dict.fromkeys(truth, 0)
    for seed in range(1, 101):
        result = evaluate(simulate(600, 200, seed), 200, seed)
        for name, value in truth.items():
            covered[name] += getattr(result, name).low <= value <= getattr(result, name).high
    # 95 expected of 100, with a standard deviation of about 2.2.
    assert all(88 <= hits <= 100 for hits in covered.values()), covered


def test_interval_widens_when_targets_of_a_user_repeat_each_other() -> None:
    few = simulate(targets=400, users=400, seed=2)
    copies = Predictions(np.tile(few.user, 4), np.tile(few.label, 4), np.tile(few.probability, 4))
    strangers = Predictions(np.arange(1600), copies.label, copies.probability)
    by_user, by_target = evaluate(copies, 300, seed=0).auc, evaluate(strangers, 300, seed=0).auc
    assert by_user.value == pytest.approx(by_target.value)
    assert by_user.high - by_user.low > 1.6 * (by_target.high - by_target.low)


def test_paired_difference_of_a_model_with_itself_is_exactly_zero() -> None:
    predictions = simulate(targets=100, users=20, seed=0)
    none = metrics.Estimate(0.0, 0.0, 0.0)
    assert paired_difference(predictions, predictions, 50, seed=0) == {"auc": none, "log_loss": none}


@pytest.mark.parametrize(("metric", "sign"), [("auc", 1), ("log_loss", -1)])
def test_paired_difference_is_narrower_than_two_intervals_and_changes_sign_with_the_order(
    metric: str, sign: int
) -> None:
    a = simulate(targets=2000, users=100, seed=4)
    noise = np.random.default_rng(0).normal(0, 0.1, len(a))
    b = Predictions(a.user, a.label, np.clip(a.probability + noise, 0, 1))
    difference, back = (paired_difference(*pair, 300, seed=1)[metric] for pair in ((a, b), (b, a)))
    one, other = (getattr(evaluate(predictions, 300, seed=1), metric) for predictions in (a, b))
    assert difference.value == pytest.approx(one.value - other.value)
    assert sign * difference.value > 0
    assert difference.low <= difference.value <= difference.high
    assert min(sign * difference.low, sign * difference.high) > 0
    if metric == "auc":
        assert difference.high - difference.low < (one.high - one.low) / 2
    assert (back.value, back.low, back.high) == pytest.approx((-difference.value, -difference.high, -difference.low))


def test_models_ranked_once_meet_the_same_users_in_every_pass() -> None:
    a = simulate(targets=300, users=40, seed=6)
    b = Predictions(a.user, a.label, np.sqrt(a.probability * (1 - a.probability)))
    one, other = (metrics.Ranking.of(model.label, model.probability) for model in (a, b))
    draws = [one.auc(weight) - other.auc(weight) for weight in metrics.user_weights(a.user, 200, seed=3)]
    value = metrics.auc(a.label, a.probability) - metrics.auc(b.label, b.probability)
    assert metrics.Estimate.of(value, draws) == paired_difference(a, b, 200, seed=3)["auc"]
    first, second = (np.concatenate(list(metrics.user_weights(a.user, 5, seed=3))) for _ in range(2))
    assert np.array_equal(first, second)


def test_paired_difference_refuses_different_targets() -> None:
    a = simulate(targets=10, users=3, seed=0)
    flipped = Predictions(a.user, 1 - a.label, a.probability)
    with pytest.raises(InputError, match="different sets of targets"):
        paired_difference(a, flipped, 10, seed=0)


def test_metrics_survive_json_with_nan_as_null() -> None:
    one_class = evaluate(Predictions(np.array([0]), np.array([1]), np.array([0.5])), 0, seed=0)
    both = evaluate(simulate(50, 5, seed=0), 20, seed=0)
    for result in (one_class, both):
        text = json.dumps(result.to_json(), allow_nan=False)
        assert Metrics.from_json(json.loads(text)).to_json() == result.to_json()
    assert Metrics.from_json(both.to_json()) == both


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"auc": 0.5}, "metrics.auc"),
        ({"auc": {"value": "high", "low": 0, "high": 1}}, "metrics.auc"),
        ({"users": {"value": 1, "low": 1, "high": 1}}, "metrics.users"),
        ({"extra": 1}, "fields"),
    ],
)
def test_a_document_of_another_kind_is_refused(change: dict, match: str) -> None:
    document = evaluate(simulate(20, 5, seed=0), 0, seed=0).to_json()
    with pytest.raises(InputError, match=match):
        Metrics.from_json(document | change)


@pytest.mark.parametrize(
    ("user", "label", "probability", "match"),
    [
        ([0, 1], [1], [0.5], "equal length"),
        ([[0]], [[1]], [[0.5]], "equal length"),
        ([0, 0], [1, 2], [0.5, 0.5], "label, row 1"),
        ([0], [0.5], [0.5], "label, row 0"),
        ([0, 0], [1, 0], [0.5, math.nan], "probability, row 1"),
        ([0], [1], [math.inf], "probability, row 0"),
        ([0], [1], [-0.1], "probability, row 0"),
        ([-1], [1], [0.5], "user, row 0"),
        ([0.5], [1], [0.5], "user"),
    ],
)
def test_predictions_refuse_bad_columns(user: list, label: list, probability: list, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Predictions(np.array(user), np.array(label), np.array(probability))


def test_predictions_hold_the_promised_dtypes_and_pickle() -> None:
    predictions = Predictions(np.array([3], np.int32), np.array([True]), np.array([0.5], np.float32))
    again = pickle.loads(pickle.dumps(predictions))
    assert [column.dtype for column in (again.user, again.label, again.probability)] == [
        np.int64,
        np.int8,
        np.float64,
    ]


def test_nothing_to_evaluate_is_an_input_error() -> None:
    nothing = Predictions(np.array([], np.int64), np.array([], np.int8), np.array([]))
    with pytest.raises(InputError, match="no targets"):
        evaluate(nothing, 10, seed=0)
    with pytest.raises(InputError, match="bootstrap"):
        evaluate(simulate(5, 2, seed=0), -1, seed=0)


def test_ten_thousand_targets_and_a_thousand_replicates_take_seconds() -> None:
    predictions = simulate(10_000, 943, seed=0)
    start_s = time.perf_counter()
    result = evaluate(predictions, 1000, seed=0)
    assert time.perf_counter() - start_s < 20  # 0.5 s on an idle core, so room for a busy machine
    assert result.auc.low < result.auc.value < result.auc.high
