"""The text of `data.label`: what is an expression, which columns it names, and what is refused in words."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dti_ray.config.label import MAX_LENGTH, parse_label


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("click", ("click",)),
        ("rating > 3", ("rating",)),
        ("play_ms / video_ms >= 0.5", ("play_ms", "video_ms")),
        ('event in ("click", "buy") and not is_bot', ("event", "is_bot")),
        ("not (b > 1) and a > 1 or b < 0", ("b", "a")),
        ("(\n z > 1 and\n y > 1\n)", ("z", "y")),
        ("rating in [-1, +2, 3.5]", ("rating",)),
        ("größe > 1", ("größe",)),
    ],
)
def test_columns_are_named_in_the_order_of_their_appearance(text: str, columns: tuple[str, ...]) -> None:
    assert parse_label(text).columns == columns


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("`Star Rating` > 3", ("Star Rating",)),
        ("`b c` > 1 and (`a b` > 1 or `b c` < 0)", ("b c", "a b")),
        ("plain > 1 and `class` == 1", ("plain", "class")),
        ("`rating` > 3 and rating < 5", ("rating",)),
        ("`played-ms` / `length-ms` > 0.5", ("played-ms", "length-ms")),
        ("`a:float` > 3", ("a:float",)),
    ],
)
def test_columns_that_are_no_python_names_stand_in_backquotes(text: str, columns: tuple[str, ...]) -> None:
    assert parse_label(text).columns == columns


def test_names_of_the_tree_are_places_in_the_columns() -> None:
    label = parse_label("`a b` > c and c > `a b`")
    assert ast.unparse(label.tree) == "_0 > _1 and _1 > _0"
    assert label.text == "`a b` > c and c > `a b`"


@pytest.mark.parametrize(
    ("text", "is_column"),
    [("click", True), (" (click) ", True), ("`my click`", True), ("+click", False), ("not click", False)],
)
def test_a_column_alone_is_told_from_an_expression(text: str, is_column: bool) -> None:
    assert parse_label(text).is_column is is_column


@pytest.mark.parametrize(
    "text",
    ["", " ", "rating >", "rating > 3)", "a; b", "a = 1", "import os", "class > 3", "`a", "`` > 1", "a\0", "((a"],
)  # fmt: skip
def test_what_is_no_expression_is_refused_with_an_example_and_the_way_to_quote(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no expression such as `rating > 3`; a column .* stands in backquotes"):
        parse_label(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("len(a) > 1", "len(a)"),
        ("a.b > 1", "a.b"),
        ("a[0] > 1", "a[0]"),
        ("__import__('os').system('x')", "__import__('os').system('x')"),
        ("lambda: a", "lambda: a"),
        ("[b for b in a]", "[b for b in a]"),
        ("a if b else c", "a if b else c"),
        ("f'{a}' > 3", "f'{a}'"),
        ("a ** 2 > 1", "a ** 2"),
        ("a % 2 == 1", "a % 2"),
        ("a // 2 == 1", "a // 2"),
        ("a is 3", "a is 3"),
        ("a & b", "a & b"),
        ("~a", "~a"),
        ("1 < a < 3", "1 < a < 3"),
        ("a == None", "None"),
        ("a == b'x'", "b'x'"),
        ("a < 1j", "1j"),
        ("a == ...", "..."),
        ("a < 1e999", "1e309"),
        ("(a, b)", "(a, b)"),
        ("(a, b) > 2", "(a, b) > 2"),
        ("a in ()", "()"),
        ("a in 1", "a in 1"),
        ("a in (1, (2, 3))", "(1, (2, 3))"),
        ("'cli' in event", "'cli' in event"),
        ("event in 'click'", "event in 'click'"),
        ("'x' + a > 1", "'x' + a"),
        ("-'x' == a", "-'x'"),
        ("a and 'x'", "a and 'x'"),
        ("not 'x' or a", "not 'x'"),
        ("a / b < '5'", "a / b < '5'"),
        ("a / b in (1, '5')", "a / b in (1, '5')"),
        ("`Star Rating` ** 2 > 3", "`Star Rating` ** 2"),
    ],
)
def test_what_a_label_cannot_hold_is_quoted(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="a label has columns, numbers") as error:
        parse_label(text)
    assert f" holds {said!r}; " in str(error.value)


def test_number_that_no_float_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="a label has columns, numbers"):
        parse_label("a < " + "9" * 400)


@pytest.mark.parametrize("text", ["1", "3 > 2", "'a' == 'b'"])
def test_expression_without_a_column_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no column"):
        parse_label(text)


def test_backquotes_within_a_text_are_refused_and_not_taken_for_a_column() -> None:
    with pytest.raises(ValueError, match="backquotes within a text"):
        parse_label("event == 'a `b` c'")


def test_label_has_a_greatest_length() -> None:
    longest = "a" * MAX_LENGTH
    assert parse_label(longest).columns == (longest,)
    with pytest.raises(ValueError, match=r"has 1001 characters; a label has at most 1000"):
        parse_label(longest + "a")


@given(st.text(max_size=40) | st.text("ab`'\"()[],.<>=!+-*/0123 andornti", max_size=30))
def test_any_text_is_a_label_or_a_value_error(text: str) -> None:
    try:
        label = parse_label(text)
    except ValueError:
        return
    assert label.columns
    names = {node.id for node in ast.walk(label.tree) if isinstance(node, ast.Name)}
    assert names == {f"_{i}" for i in range(len(label.columns))}
