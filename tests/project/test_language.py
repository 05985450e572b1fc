"""Rules of language in CONTRIBUTING.md that ruff does not check."""

import ast

import pytest

from tests.support import tiny

FIRST_WORDS = {
    "What", "Where", "Whether", "Which", "Who", "Whose", "How", "Why", "When", "If", "Of", "That",
    "Those",
}  # fmt: skip
NAMES = {
    "found", "told", "said", "asked", "given", "known", "kept", "wanted", "due", "own", "others",
    "say", "take", "give", "why", "roof", "roofs", "family", "most", "least", "tried",
    "keep_sheet", "settle", "decisive", "leave", "spare",
}  # fmt: skip
FILES = [
    path
    for folder in ("mvit_jax", "configs", "benchmarks", "docs", "tests")
    for path in sorted((tiny.ROOT / folder).rglob("*.py"))
]


def mistakes(tree):
    """Yields the lines of docstrings with a forbidden first word, and of forbidden names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "-").split()[0].strip(".,:;")
            if first in FIRST_WORDS:
                yield f"{getattr(node, 'lineno', 1)}: a docstring begins with {first}"
        name = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.FunctionDef):
            name = node.name
        if name and name.strip("_") in NAMES:
            yield f"{node.lineno}: the name {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(tiny.ROOT)))
def test_docstrings_and_names_follow_the_rules(path):
    assert not list(mistakes(ast.parse(path.read_text())))


def test_mistakes_are_noticed():
    code = 'def given(told):\n    """Whether it is."""\n    kept = 1'
    assert len(list(mistakes(ast.parse(code)))) == 4
