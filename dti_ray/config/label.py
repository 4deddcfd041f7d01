"""What counts as a click: a column of 0 and 1, or an expression over the columns of the log.

Stage: configuration. In: the text of `data.label`. Out: a `Label`: a checked syntax tree and the columns it names.
Invariant: an expression is data, not code: names, numbers, texts, + - * /, comparisons, and, or, not, in; whatever
else Python could say is refused. How it is computed is for `data/labels`.

    rating > 3      play_ms / video_ms >= 0.5      event in ("click", "buy") and not is_bot      `Star Rating` > 3
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

QUOTED = re.compile(r"`([^`]+)`")
ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div,
    ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn,
    ast.Name, ast.Load, ast.Constant, ast.Tuple, ast.List,
)  # fmt: skip
LISTS = (ast.Tuple, ast.List)
RULES = (
    "a label has columns, numbers, + - * /, and, or, not, comparisons of two sides (join more with and), texts to "
    "compare a column with, and lists after in"
)
MAX_NUMBER = 1e300  # beyond, sums and products are no numbers any more
MAX_LENGTH = 1000  # characters; longer ones are no labels, and Python's parser has a limit of its own


@dataclass(frozen=True)
class Label:
    """A label's definition.

    Attributes:
        text: as it was written.
        columns: headings that it names, in the order of appearance.
        tree: the syntax tree; a name `_0` stands for `columns[0]`.
        is_column: it is one column and nothing else, which must then hold 0 and 1.
    """

    text: str
    columns: tuple[str, ...]
    tree: ast.expr
    is_column: bool


def parse_label(text: str) -> Label:
    """Parse `data.label`; a column whose name is no Python name stands in backquotes.

    Raises:
        ValueError: the text is no expression, uses something that is not allowed, or names no column.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"has {len(text)} characters; a label has at most {MAX_LENGTH}")
    quoted = QUOTED.findall(text)
    plain = QUOTED.sub(lambda found: f"quoted_{quoted.index(found[1])}_", text)
    try:
        tree = ast.parse(plain.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        hint = "a column whose name is no Python name stands in backquotes"
        raise ValueError(f"{text!r} is no expression such as `rating > 3`; {hint}") from None
    known = {f"quoted_{quoted.index(name)}_": name for name in quoted}
    misused = next(filter(None, map(_misused, ast.walk(tree))), None)
    if misused is not None:
        said = re.sub(r"quoted_\d+_", lambda found: f"`{known.get(found[0], found[0])}`", ast.unparse(misused))
        raise ValueError(f"{text!r} holds {said!r}; {RULES}")
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    named.sort(key=lambda node: (node.lineno, node.col_offset))
    columns = dict.fromkeys(known.get(node.id, node.id) for node in named)
    if sum(node.id in known for node in named) != len(quoted):
        raise ValueError(f"{text!r} holds backquotes within a text")
    if not columns:
        raise ValueError(f"{text!r} names no column")
    places = {name: f"_{i}" for i, name in enumerate(columns)}
    for node in named:
        node.id = places[known.get(node.id, node.id)]
    return Label(text, tuple(columns), tree.body, isinstance(tree.body, ast.Name))


def _misused(node: ast.AST) -> ast.AST | None:
    """Return an expression if it is not allowed, or not allowed where it stands."""
    if not isinstance(node, (ast.expr, ast.Expression)):
        return None  # an operator: looked at with the expression that it belongs to
    parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
    operators = [part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.expr)]
    if not all(isinstance(part, ALLOWED) for part in (node, *operators)):
        return node
    if isinstance(node, ast.Constant):
        return None if _is_value(node.value) else node
    if isinstance(node, ast.Compare):
        return None if _compares(node) else node
    if isinstance(node, LISTS):
        return None if parts and not any(isinstance(part, LISTS) for part in parts) else node
    return node if any(isinstance(part, LISTS) or _is_text(part) for part in parts) else None


def _compares(node: ast.Compare) -> bool:
    """Say whether a comparison has two sides, a list after `in` alone, and a text beside a column or a text."""
    if len(node.ops) != 1 or isinstance(node.left, LISTS):
        return False
    (right,), is_in = node.comparators, isinstance(node.ops[0], (ast.In, ast.NotIn))
    if isinstance(right, LISTS) != is_in:
        return False
    others = right.elts if isinstance(right, LISTS) else [right]
    is_plain = all(isinstance(side, (ast.Name, ast.Constant)) for side in (node.left, *others))
    return is_plain or not any(map(_is_text, (node.left, *others)))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_value(value: object) -> bool:
    """Say whether a constant is a text or a number that a float can hold."""
    return isinstance(value, str) or (isinstance(value, (bool, int, float)) and abs(value) < MAX_NUMBER)
