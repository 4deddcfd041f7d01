"""Labels for many rows at once, held against a slow evaluation of the same expression row by row."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dti_ray.config.label import parse_label
from dti_ray.data.labels import clicks, numbers

NO_NUMBERS = [
    "good",
    "",
    " ",
    None,
    "nan",
    "NaN",
    "inf",
    "-inf",
    "1e999",
    "4,5",
    "0x4",
    ".",
    "1_000",
    "٣",
    "4 5",
    "+-4",
]


def found(text: str, **columns: pa.Array) -> list[str]:
    """Return for each row "click", "none" or why it has no label."""
    label = parse_label(text)
    clicked, refused = clicks(label, {name: columns[name.replace(" ", "_")] for name in label.columns})
    assert clicked.dtype == np.bool_
    said = np.where(clicked, "click", "none").astype(object)
    for reason, rows in reversed(refused.items()):
        said[rows] = reason
    return said.tolist()


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 0, 2, -1, None], pa.int64()),
        pa.array([1, 0, 2, -1, None], pa.int8()),
        pa.array([1.0, 0.0, 0.5, math.nan, None]),
        pa.array([1.0, 0.0, 0.5, math.inf, None], pa.float32()),
        pa.array([True, False, None, None, None]),
        pa.array(["true", "false", "yes", "", None]),
        pa.array([" TRUE ", "False", "nan", "1e999", None]),
        pa.array(["1", "0", "2", "0x1", None]),
        pa.array(["1.0", "0.00", "-1", "1,0", None], pa.large_string()),
        pa.array(["+1", "0e5", "t", "1e-400x", None]),
        pa.array([Decimal("1.00"), Decimal("0.00"), Decimal("0.50"), Decimal("-1.00"), None]),
    ],
    ids=str,
)
def test_column_alone_holds_0_and_1_in_any_type(values: pa.Array) -> None:
    assert found("click", click=values) == ["click", "none", *["label_not_0_or_1"] * 3]


@pytest.mark.parametrize("kind", [pa.timestamp("s"), pa.date32(), pa.time32("s"), pa.list_(pa.int64()), pa.null()])
def test_column_of_another_kind_holds_no_labels(kind: pa.DataType) -> None:
    values = pa.nulls(2, kind)
    assert found("click", click=values) == ["label_not_0_or_1"] * 2
    assert found("rating > 3", rating=values) == ["rating_not_numeric"] * 2


def test_time_is_no_number() -> None:
    assert found("rating > 3", rating=pa.array([9], pa.timestamp("s"))) == ["rating_not_numeric"]


def test_threshold_on_every_numeric_type() -> None:
    for kind in (pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.decimal128(9, 2)):
        values = pa.array([3, 4, 5], pa.float64()).cast(kind)
        assert found("rating > 3", rating=values) == ["none", "click", "click"]
        assert found("rating >= 4", rating=values) == ["none", "click", "click"]
        assert found("rating == 4", rating=values) == ["none", "click", "none"]
        assert found("rating != 4", rating=values) == ["click", "none", "click"]
        assert found("4 > rating", rating=values) == ["click", "none", "none"]


def test_threshold_on_text() -> None:
    values = ["3", "4", " 4.5\t", "+5", "4e0", ".5e1", "5.", "-4", "1e-2"]
    clicked = ["none", *["click"] * 6, "none", "none"]
    assert found("rating > 3", rating=pa.array(values)) == clicked


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_text_that_is_no_number_is_refused_under_the_name_of_its_column(value: str | None) -> None:
    assert found("rating > 3", rating=pa.array([value, "4"])) == ["rating_not_numeric", "click"]
    assert found("`my rating` < 3", my_rating=pa.array([value, "4"])) == ["my rating_not_numeric", "none"]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_null_nan_and_infinite_numbers_are_refused(value: float | None) -> None:
    assert found("rating > 3", rating=pa.array([value, 4.0])) == ["rating_not_numeric", "click"]
    assert found("not rating > 3", rating=pa.array([value, 4.0])) == ["rating_not_numeric", "none"]


def test_arithmetic_has_the_usual_order_and_signs() -> None:
    a, b = pa.array([1, 2, 3, 4]), pa.array(["4", "3", "2", "1"])
    assert found("a + 2 * b > 8", a=a, b=b) == ["click", "none", "none", "none"]
    assert found("(a + 2) * b > 9.5", a=a, b=b) == ["click", "click", "click", "none"]
    assert found("-a - -b == -1", a=a, b=b) == ["none", "none", "click", "none"]
    assert found("a / b >= 1.5", a=a, b=b) == ["none", "none", "click", "click"]


def test_what_is_true_counts_1_in_arithmetic() -> None:
    a, b = pa.array([1, 2, 3, 4]), pa.array([True, False, True, False])
    assert found("(a > 2) + b >= 2", a=a, b=b) == ["none", "none", "click", "none"]
    assert found("(a > 2) - b == 1", a=a, b=b) == ["none", "none", "none", "click"]
    assert found("-(a > 2) < 0", a=a, b=b) == ["none", "none", "click", "click"]
    assert found("b == True", a=a, b=b) == ["click", "none", "click", "none"]


def test_arithmetic_alone_must_give_0_or_1() -> None:
    a, b = pa.array([1, 2, 3, 0]), pa.array([1, 1, 3, 0])
    assert found("a - b", a=a, b=b) == ["none", "click", "none", "none"]
    assert found("a / b", a=a, b=b) == ["click", "label_not_0_or_1", "click", "label_not_finite"]
    assert found("a * 0.5", a=a) == ["label_not_0_or_1", "click", "label_not_0_or_1", "none"]


def test_division_by_zero_is_refused() -> None:
    played, length = pa.array([5, 0, 3, None]), pa.array([0, 0, 4, 0])
    assert found("played / length >= 0.5", played=played, length=length) == [
        "label_not_finite", "label_not_finite", "click", "played_not_numeric",
    ]  # fmt: skip
    assert found("played / (played / 0) < 1", played=played)[0] == "label_not_finite"
    assert found("not (played / length)", played=played, length=length)[:3] == ["label_not_finite"] * 2 + ["none"]


def test_text_is_compared_as_text() -> None:
    event = pa.array(["click", "buy", "Click", "", None]).dictionary_encode().dictionary_decode()
    assert found("event == 'click'", event=event) == ["click", "none", "none", "none", "event_is_null"]
    assert found("'click' != event", event=event) == ["none", "click", "click", "click", "event_is_null"]
    assert found("event < 'c'", event=event) == ["none", "click", "click", "click", "event_is_null"]
    assert found("event == 'größe \U0001f600'", event=pa.array(["größe \U0001f600"])) == ["click"]


def test_number_beside_a_text_is_compared_as_the_text_a_person_would_write() -> None:
    assert found("a == '4'", a=pa.array([4.0, 4.5, None])) == ["click", "none", "a_is_null"]
    assert found("a == 'true'", a=pa.array([True, False])) == ["click", "none"]


def test_in_and_not_in_take_texts_and_numbers() -> None:
    event, rating = pa.array(["click", "buy", "view", None]), pa.array([-1, 2, 3, None])
    assert found("event in ('click', 'buy')", event=event) == ["click", "click", "none", "event_is_null"]
    assert found("event not in ['click', 'buy']", event=event) == ["none", "none", "click", "event_is_null"]
    assert found("rating in (-1, 1 + 1)", rating=rating) == ["click", "click", "none", "rating_not_numeric"]
    assert found("rating not in (2,)", rating=rating) == ["click", "none", "click", "rating_not_numeric"]


def test_and_or_and_not_take_truths_and_numbers() -> None:
    a, b = pa.array([0, 1, 2, 0]), pa.array([True, False, True, False])
    assert found("a and b", a=a, b=b) == ["none", "none", "click", "none"]
    assert found("a or b", a=a, b=b) == ["click", "click", "click", "none"]
    assert found("not a", a=a, b=b) == ["click", "none", "none", "click"]
    assert found("a > 1 or not b and a == 0", a=a, b=b) == ["none", "none", "click", "click"]


def test_every_column_must_be_known_whatever_the_other_parts_say() -> None:
    a, b = pa.array([9, 9, None, None]), pa.array(["x", "y", "x", None])
    assert found("a > 3 or b == 'x'", a=a, b=b) == ["click", "click", "a_not_numeric", "a_not_numeric"]
    assert found("b == 'x' or a > 3", a=a, b=b) == ["click", "click", "a_not_numeric", "b_is_null"]


def test_first_reason_is_that_of_the_first_column_and_what_is_computed_comes_last() -> None:
    a, b = pa.array(["1", "x", "1", "x"]), pa.array(["1", "1", "y", "y"])
    reasons = ["click", "a_not_numeric", "b_not_numeric", "a_not_numeric"]
    assert found("a > 0 and b > 0", a=a, b=b) == reasons
    assert found("(a > 0) * (b > 0)", a=a, b=b) == reasons
    assert found("a / 0 > 0 and b > 0", a=a, b=b) == ["label_not_finite", *reasons[1:]]


def test_no_rows_are_no_fault() -> None:
    assert found("a > 3 and b in ('x', 'y')", a=pa.array([], pa.int64()), b=pa.array([], pa.string())) == []


def test_numbers_are_nan_where_there_is_none() -> None:
    given_texts = pa.array([*NO_NUMBERS, "1.5", "True", " false "])
    values = numbers(given_texts)
    assert np.isnan(values[: len(NO_NUMBERS)]).all()
    assert values[len(NO_NUMBERS) :].tolist() == [1.5, 1.0, 0.0]


# A slow reference: one row at a time, with the operators of Python.


def number_of(value: Any) -> float:
    """Read one value as a number."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("true", "false"):
            return float(text == "true")
        if not re.fullmatch(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]+)?", text):
            return math.nan
        value = float(text)
    return math.nan if value is None or not math.isfinite(value) else float(value)


def slow(text: str, names: dict[str, str], row: dict[str, Any]) -> str:
    """Evaluate an expression on one row; `names` says which columns are used as numbers and which as texts."""
    values: dict[str, Any] = {}
    for name, kind in names.items():
        if kind == "text" and row[name] is None:
            return f"{name}_is_null"
        values[name] = row[name] if kind == "text" else number_of(row[name])
        if kind == "number" and math.isnan(values[name]):
            return f"{name}_not_numeric"
    try:
        return "click" if eval(text, {}, values) else "none"
    except ZeroDivisionError:
        return "label_not_finite"


leaf = st.sampled_from(["a", "b", "1", "2.5", "0"])
amount = st.recursive(
    leaf, lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("+-*/"), inner), max_leaves=4
)
order = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
compared = st.one_of(
    st.builds("({} {} {})".format, amount, order, amount),
    st.builds("({} {} ({}, {}))".format, amount, st.sampled_from(["in", "not in"]), amount, amount),
    st.builds("(e {} '{}')".format, order, st.sampled_from(["", "x", "y", "1"])),
    st.builds("(e {} ('{}', 'y'))".format, st.sampled_from(["in", "not in"]), st.sampled_from(["x", "1"])),
)
expression = st.recursive(
    compared,
    lambda inner: st.one_of(
        st.builds("({} and {})".format, inner, inner),
        st.builds("({} or {})".format, inner, inner),
        st.builds("(not {})".format, inner),
        st.builds("({} {} {} == {})".format, inner, st.sampled_from("+-*"), inner, leaf),
    ),
    max_leaves=4,
)
small = st.integers(-3, 3)
number_columns = st.one_of(
    st.tuples(st.just(pa.int64()), st.lists(st.none() | small, min_size=6, max_size=6)),
    st.tuples(
        st.just(pa.float64()),
        st.lists(st.none() | small.map(float) | st.sampled_from([0.5, math.nan, math.inf]), min_size=6, max_size=6),
    ),
    st.tuples(st.just(pa.bool_()), st.lists(st.none() | st.booleans(), min_size=6, max_size=6)),
    st.tuples(
        st.just(pa.string()),
        st.lists(st.sampled_from(["1", " 2 ", "-2.5", "true", "x", "", "nan", None, "0"]), min_size=6, max_size=6),
    ),
)
texts = st.lists(st.sampled_from(["x", "y", "", "1", None]), min_size=6, max_size=6)


@given(text=expression, a=number_columns, b=number_columns, e=texts)
def test_labels_equal_a_slow_reference(text: str, a: Any, b: Any, e: list[str | None]) -> None:
    columns = {"a": pa.array(a[1], a[0]), "b": pa.array(b[1], b[0]), "e": pa.array(e, pa.string())}
    used = re.findall(r"\b[abe]\b", re.sub(r"'[^']*'", "", text))
    if not used:
        return
    names = {name: "text" if name == "e" else "number" for name in dict.fromkeys(used)}
    rows = [{name: column[at].as_py() for name, column in columns.items()} for at in range(6)]
    assert found(text, **columns) == [eager(text, names, row) for row in rows]


def eager(text: str, names: dict[str, str], row: dict[str, Any]) -> str:
    """Evaluate as `slow`, but let no `and` and `or` skip a division by zero: all parts must be known."""
    said = slow(text, names, row)
    if said.endswith(("numeric", "null")) or "/" not in text:
        return said
    return slow(text.replace(" and ", " & ").replace(" or ", " | ").replace("(not ", "(True ^ "), names, row)
