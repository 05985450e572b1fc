"""Makes reStructuredText of the project's docstrings, which are written as in Markdown.

Single backticks are code, an indented paragraph is code too, and what a dataclass does not say of
its fields in its docstring stands in comments beside them. Autodoc reads reStructuredText alone:
MyST parses pages, no docstrings, and napoleon Google's sections, no backticks.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

from docutils import nodes

from mvit_jax.describe import comments

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Note):$")
SEPARATOR = "\\ "  # ends inline code before a letter


def restructured(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText; Google's sections are left to napoleon."""
    result: list[str] = []
    for is_code, part in _parts(lines):
        if is_code:
            code = textwrap.dedent("\n".join(part))
            result += [f".. code-block:: {_language(code)}", ""]
            result += [*textwrap.indent(code, "    ").split("\n"), ""]
        else:
            result += _literals("\n".join(part)).split("\n")
    return result


def _language(code: str) -> str:
    if code.lstrip().startswith("python -m"):
        return "sh"
    try:
        ast.parse(code)
    except SyntaxError:
        return "text"
    return "python"


def _parts(lines: list[str]) -> list[tuple[bool, list[str]]]:
    """Text and code in turn: code is indented, after an empty line, and not in a section."""
    parts: list[tuple[bool, list[str]]] = []
    in_section, after_empty = False, False
    for line in lines:
        indented = line.startswith("    ")
        if line and not line.startswith(" "):
            in_section = bool(_SECTION.match(line)) or line.startswith(("* ", ".. "))
        was_code = bool(parts) and parts[-1][0]
        code = indented and not in_section and (after_empty or was_code)
        code = code or (not line and was_code)
        if not parts or parts[-1][0] != code:
            parts.append((code, []))
        parts[-1][1].append(line)
        after_empty = not line
    return parts


def _literals(text: str) -> str:
    """`code` as ``code``, also across lines and before an "s"."""

    def literal(match: re.Match[str]) -> str:
        before, code, after = match.groups()
        code = " ".join(code.split())
        return f"{before}{SEPARATOR * bool(before)}``{code}``{SEPARATOR * bool(after)}{after}"

    return re.sub(r"(\w?)(?<!`)`(?!`)([^`]+)`(?!`)(\w?)", literal, text)


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "module":
        # Not dedented: after a first line, a docstring may have nothing but commands.
        lines[:] = (obj.__doc__ or "").splitlines()
    if what in ("data", "attribute", "property") and lines:
        if lines[0] and str(type(obj).__doc__).startswith(lines[0]):
            lines.clear()  # a dict's, of a dict
        else:
            # Napoleon takes what stands before a colon for a type; RST drops an escaped line end.
            lines[:] = [*lines[0].replace(": ", "\\\n: ", 1).split("\n"), *lines[1:]]
    if isinstance(obj, type) and dataclasses.is_dataclass(obj):
        if (inspect.getdoc(obj) or "").startswith(f"{obj.__name__}("):
            lines.clear()  # what dataclasses make up where there is no docstring
        if "Attributes:" not in lines:
            lines += _fields(obj)
    lines[:] = restructured([part for line in lines for part in _one_name_each(line)])


def _one_name_each(line: str) -> list[str]:
    """An entry of several names, as one for each: "a, b: text" would be an `a,` called `b`."""
    entry = re.fullmatch(r"( +)(\w+(?:, \w+)+): (.*)", line)
    if entry is None:
        return [line]
    margin, names, text = entry[1], entry[2].split(", "), entry[3]
    others = [f"{margin}{name}: likewise `{names[-1]}`" for name in names[:-1]]
    return [*others, f"{margin}{names[-1]}: {text}"]


def _signature(app: Any, what: str, name: str, obj: Any, options: Any, signature, returns) -> Any:
    """Arrays by the name that people import; and no `<factory>`, which is no Python: it is a
    dataclass's word for a default that is made."""
    signature, returns = (
        text and text.replace("jaxlib._jax.Array", "Array").replace("<factory>", "...")
        for text in (signature, returns)
    )
    return signature, returns


def _fields(cls: type) -> list[str]:
    """The section "Attributes" of a dataclass, from the comments beside its fields."""
    own = {name: comment for name, comment in comments.of_class(cls).items() if comment}
    if not own:
        return []
    return ["", "Attributes:", *(f"    {name}: {comment}" for name, comment in own.items()), ""]


def _dashes(app: Any, doctree: nodes.document) -> None:
    """Between a parameter and what is said of it; smart quotes, which do this, are off."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def _find(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A name without its module, as in a docstring's `Raises`, wherever it is defined."""
    own = "." not in node["reftarget"] or node["reftarget"].startswith("mvit_jax.")
    if node.get("refdomain") != "py" or node.get("refspecific") or not own:
        return None
    node["refspecific"] = True
    name = node["reftarget"].rpartition(".")[2]
    return env.domains.python_domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], name, node, content
    )


def setup(app: Any) -> dict[str, bool]:
    # Before napoleon, which listens at 500 and reads the sections.
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-process-signature", _signature)
    app.connect("doctree-read", _dashes)
    app.connect("missing-reference", _find)
    return {"parallel_read_safe": True}
