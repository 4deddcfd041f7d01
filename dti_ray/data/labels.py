"""Compute `data.label` for many rows at once.

Stage: part of checks. In: a `Label` and the columns that it names, in whatever type the file gave them. Out: clicks,
and for each reason the rows that have none.
Invariant: a row whose label cannot be known is refused and never guessed: every column that the definition names must
hold a value that fits its use there, whatever the other parts of the expression say.

    rating > 3          "4" → click      "3" → none      "good", "", null, NaN → rating_not_numeric
    played / length >= 0.5               length 0 → label_not_finite
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dti_ray.config.label import LISTS, Label
from dti_ray.data.sources.values import as_text

NUMBER = r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"
NO_NUMBER, NULL = "not_numeric", "is_null"
TRUTH = pa.array(["false", "true"])
Mask = NDArray[np.bool_]
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


def clicks(label: Label, columns: Mapping[str, pa.Array]) -> tuple[Mask, dict[str, Mask]]:
    """Return which rows are clicks, and reason → rows refused for it, in the order of the definition's columns.

    Args:
        label: the definition.
        columns: heading → values, for each of `label.columns`.
    """
    rows = len(next(iter(columns.values())))
    evaluation = _Evaluation(label, {f"_{i}": columns[name] for i, name in enumerate(label.columns)}, rows)
    value = evaluation.of(label.tree)
    if isinstance(value, np.ndarray) and value.dtype == np.bool_:
        return value, evaluation.reasons()
    number = np.broadcast_to(np.asarray(value, np.float64), rows)
    if label.is_column:  # what is no number is no 0 or 1 either: one reason for both
        return number == 1.0, {"label_not_0_or_1": ~np.isin(number, (0.0, 1.0))}
    return number == 1.0, {**evaluation.reasons(), "label_not_0_or_1": ~np.isin(number, (0.0, 1.0))}


def numbers(values: pa.Array) -> NDArray[np.float64]:
    """Return float64 values; NaN where there is no number, and where text is none in plain or scientific notation."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        trimmed = pc.utf8_trim_whitespace(values)
        truth = pc.index_in(pc.utf8_lower(trimmed), value_set=TRUTH)
        is_number = pc.match_substring_regex(trimmed, NUMBER)
        parsed = pc.cast(pc.if_else(is_number, trimmed, None), pa.float64())
        values = pc.coalesce(parsed, pc.cast(truth, pa.float64()))
    elif pa.types.is_boolean(values.type):
        values = pc.cast(values, pa.int8())
    elif pa.types.is_temporal(values.type) or pa.types.is_nested(values.type) or pa.types.is_null(values.type):
        return np.full(len(values), np.nan)
    found = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.where(np.isfinite(found), found, np.nan)


@dataclass
class _Evaluation:
    """One walk over the syntax tree; `refused` collects the rows without a label."""

    label: Label
    columns: Mapping[str, pa.Array]
    rows: int
    refused: dict[str, Mask] = field(default_factory=dict)

    def of(self, node: ast.expr) -> Any:
        """Return a Boolean array, a float64 array or a number."""
        match node:
            case ast.Constant(value=bool() | int() | float() as value):
                return float(value)
            case ast.Name(id=place):
                return self.number(place)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return ~self.truth(inner)
            case ast.UnaryOp(op=op, operand=inner):
                return -self.amount(inner) if isinstance(op, ast.USub) else self.amount(inner)
            case ast.BoolOp(op=op, values=parts):
                join = np.logical_and if isinstance(op, ast.And) else np.logical_or
                return join.reduce([self.truth(part) for part in parts])
            case ast.BinOp(left=left, op=op, right=right):
                with np.errstate(all="ignore"):
                    return self.finite(OPERATORS[type(op)](self.amount(left), self.amount(right)))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self.compare(left, op, right)
        raise AssertionError(f"parse_label let {ast.dump(node)} through")

    def compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Mask:
        """Compare as text where either side is text, as numbers otherwise."""
        if isinstance(op, (ast.In, ast.NotIn)):
            assert isinstance(right, LISTS), "parse_label takes nothing else after in"
            found = np.logical_or.reduce([self.compare(left, ast.Eq(), part) for part in right.elts])
            return ~found if isinstance(op, ast.NotIn) else found
        as_words = any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (left, right))
        sides = [self.words(side) if as_words else self.amount(side) for side in (left, right)]
        return np.broadcast_to(OPERATORS[type(op)](*sides), self.rows)

    def amount(self, node: ast.expr) -> NDArray[np.float64]:
        """Return a part as a number: what is true counts 1."""
        return np.asarray(self.of(node), np.float64)

    def truth(self, node: ast.expr) -> Mask:
        """Return a part as true or false: a number is true unless it is 0."""
        value = self.of(node)
        is_truth = isinstance(value, np.ndarray) and value.dtype == np.bool_
        return value if is_truth else np.broadcast_to(np.asarray(value) != 0.0, self.rows)

    def number(self, place: str) -> NDArray[np.float64]:
        """Return a column as numbers; rows that hold none are refused."""
        values = numbers(self.columns[place])
        self.refuse(f"{self.name(place)}_{NO_NUMBER}", np.isnan(values))
        return values

    def words(self, node: ast.expr) -> NDArray[np.object_] | str:
        """Return a column as text; rows that hold nothing are refused."""
        if isinstance(node, ast.Constant):
            return str(node.value)
        assert isinstance(node, ast.Name), "parse_label lets texts stand beside columns alone"
        text = as_text(self.columns[node.id])
        self.refuse(f"{self.name(node.id)}_{NULL}", pc.is_null(text).to_numpy(zero_copy_only=False))
        return pc.fill_null(text, "").to_numpy(zero_copy_only=False)

    def finite(self, number: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a computed number; rows where it is none, such as 1 / 0, are refused."""
        self.refuse("label_not_finite", np.broadcast_to(~np.isfinite(number), self.rows))
        return number

    def name(self, place: str) -> str:
        return self.label.columns[int(place.removeprefix("_"))]

    def reasons(self) -> dict[str, Mask]:
        """Return `refused` in the order of the definition's columns; what was computed from them comes last."""
        places = {f"{name}_{what}": i for i, name in enumerate(self.label.columns) for what in (NO_NUMBER, NULL)}
        return dict(sorted(self.refused.items(), key=lambda item: places.get(item[0], len(places))))

    def refuse(self, reason: str, rows: Mask) -> None:
        self.refused[reason] = self.refused.get(reason, np.zeros(self.rows, np.bool_)) | rows
