"""What the comments beside assignments say of them: fields of dataclasses, keys of the config.

Sphinx reads `#:` alone, and of assignments in a function, as the config's are, none.
"""

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """An assignment: its target as written, the comment above it, and the one beside it."""

    target: str
    above: str
    beside: str


def of_class(cls: type) -> dict[str, str]:
    """For each annotated field of a class: its comments, those above first."""
    source = textwrap.dedent(inspect.getsource(cls))
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        entry.target: " ".join(part for part in (entry.above, entry.beside) if part)
        for entry in entries(source, body.body)
    }


def entries(source: str, statements: list[ast.stmt]) -> list[Entry]:
    """The assignments among `statements` of `source`, in order, with their comments."""
    whole_line, beside = _comments(source)
    found = []
    for node in statements:
        if isinstance(node, ast.AnnAssign):
            target = node.target
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
        else:
            continue
        assert node.end_lineno is not None
        text = [beside.get(node.end_lineno, "")]
        line = node.end_lineno + 1
        while whole_line.get(line, "").startswith("  "):  # goes on below, indented
            text.append(whole_line[line])
            line += 1
        above = []
        line = node.lineno - 1
        while line in whole_line and not whole_line[line].startswith("  "):
            above.append(whole_line[line])
            line -= 1
        found.append(Entry(ast.unparse(target), _joined(above[::-1]), _joined(text)))
    return found


def _joined(parts: list[str]) -> str:
    return " ".join(part.strip() for part in parts).strip()


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line, without their "# ": those that have the line to themselves, and others."""
    whole_line, beside = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (whole_line if alone else beside)[token.start[0]] = token.string[1:].removeprefix(" ")
    return whole_line, beside
