"""Extraction of the comments that describe the fields of a dataclass."""

import ast
import inspect
import io
import textwrap
import tokenize


def of_class(cls: type) -> dict[str, str]:
    """Returns each annotated field's comment: the lines above the field, then the text after it."""
    source = textwrap.dedent(inspect.getsource(cls))
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    whole_line, beside = _comments(source)
    result = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and node.end_lineno is not None:
            parts, line = [beside.get(node.end_lineno, "")], node.lineno - 1
            while line in whole_line:
                parts.insert(0, whole_line[line])
                line -= 1
            result[ast.unparse(node.target)] = " ".join(parts).strip()
    return result


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Returns whole-line comments and comments after code, both by line number, without "#"."""
    whole_line, beside = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (whole_line if alone else beside)[token.start[0]] = token.string[1:].strip()
    return whole_line, beside
