"""Facts of how this code is written that a machine can see."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("dti_ray", "jobs") for path in (ROOT / folder).rglob("*.py"))
FILE_LINES = 400
FUNCTION_LINES = 50
STRAY = re.compile(r"\b(TODO|FIXME|XXX)\b")

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


@each_source
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


@each_source
def test_functions_are_short(path: Path) -> None:
    sizes = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions(path)]
    assert [(name, size) for name, size in sizes if size > FUNCTION_LINES] == []


@each_source
def test_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    lines = [line for line in docstring.splitlines() if line.strip()]
    assert len(lines) >= (1 if path.name == "__init__.py" else 2)


@each_source
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    printed = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert printed == [] or path.name == "cli.py"


@each_source
def test_nothing_is_left_to_do(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{number}: {line}" for number, line in enumerate(lines, start=1) if STRAY.search(line)] == []


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
