"""Rooms below the command line do not speak of its flags: whoever calls by function reads the same messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tensorsurgeon"
# Ray's own command is no flag of ours.
_FLAG = re.compile(r"(?<![\w-])--(?!head\b|address=)[a-z]")
# Where a text from the command line is read, and a command of somebody else's.
ALLOWED = {("recipes/recipe.py", "--set"), ("publish/card_text.py", " --tensor-parallel-size ")}


def strings_of(tree: ast.AST) -> Iterator[str]:
    """Every string that is no docstring."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_no_message_below_the_command_line_names_a_flag() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), text)
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "cli"
        for text in strings_of(ast.parse(path.read_text()))
        if _FLAG.search(text)
    }
    assert found == ALLOWED
