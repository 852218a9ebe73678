"""Docstrings read as plain technical English: the first line is a verb or a noun."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("auth", "broker", "cli", "client", "config", "db", "handlers", "sandbox")
MODULES = sorted([ROOT / "server.py", *(p for f in FOLDERS for p in ROOT.glob(f"{f}/**/*.py"))])
# A first line that begins so describes by a question what a name or a verb says.
QUESTION = re.compile(r"(Who|What|Whoever|So many|Whose|How many|Which|Whether)\b")


def first_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and first line of each docstring of a module."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "module"), text.splitlines()[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_begins_with_a_verb_or_a_noun(path: Path) -> None:
    asked = [(name, line) for name, line in first_lines(path) if QUESTION.match(line)]
    assert asked == []
