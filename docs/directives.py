"""Directives that generate page content from the code at build time.

* `{drawing}`: a figure of `figures.py`
* `{variants}`, `{ablations}`: computed costs beside the papers' figures
* `{architecture}`: the output of `describe` for a variant
* `{keys}`: the config keys
* `{programs}`: docstrings and flags of the programs
* `{modules}`: the reference of a subpackage
* `{names}`: the public names
"""

import ast
import inspect
from pathlib import Path
from typing import Any, ClassVar

import figures
from docutils import nodes
from docutils.parsers.rst import directives as options
from sphinx.util.docutils import SphinxDirective

import mvit_jax
from mvit_jax.config import KEYS, SECTIONS, Key
from mvit_jax.describe import config_file
from mvit_jax.describe.ablations import ABLATIONS
from mvit_jax.models.cost import cost
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.summary import describe
from mvit_jax.models.variants import CLASSES, PUBLISHED, VARIANTS, Published, variant

ROOT = Path(__file__).parent.parent
PROGRAMS = ("train", "evaluate", "predict", "convert", "describe", "prepare", "podplan")
COUNTS = ("parameters", "multiply-adds", "published", "top-1", "on", "source")


class Drawing(SphinxDirective):
    """A figure by name. The directive's content is the caption, `:alt:` the alternative text."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {"alt": options.unchanged_required}

    def run(self) -> list[nodes.Node]:
        svg = figures.svg(self.arguments[0], self.options["alt"])
        figure = nodes.figure(classes=["drawing"])
        figure += nodes.raw("", svg, format="html")
        caption = nodes.caption()
        for node in self.parse_content_to_nodes():
            caption.extend(node.children)
        figure += caption
        return [figure]


class Generated(SphinxDirective):
    """Content that `text` returns as Markdown. Its tables get the CSS class in `table`, if any."""

    table = ""

    def run(self) -> list[nodes.Node]:
        content = nodes.container(
            "", *self.parse_text_to_nodes(self.text(), allow_section_headings=True)
        )
        for table in content.findall(nodes.table):
            table["classes"] += [self.table] if self.table else []
        return content.children

    def text(self) -> str:
        raise NotImplementedError


class Variants(Generated):
    table = "figures"

    def text(self) -> str:
        rows = []
        for name, config in VARIANTS.items():
            published = PUBLISHED.get(name)
            classes = {"num_classes": CLASSES[published.data]} if published else {}
            clip = f"{config.frames} × {config.size}²".removeprefix("1 × ")
            rows.append((f"`{name}`", clip, *_beside(variant(name, **classes), published)))
        return _table(("variant", "clip", *COUNTS), rows)


class Ablations(Generated):
    table = "figures"

    def text(self) -> str:
        rows = []
        for a in ABLATIONS:
            config = variant(a.variant, num_classes=CLASSES[a.published.data], **a.overrides)
            fields = ", ".join(f"{k}={v!r}" for k, v in a.overrides.items())
            rows.append((a.setting, f"`{a.variant}` `{fields}`", *_beside(config, a.published)))
        return _table(("setting", "made by", *COUNTS), rows)


class Architecture(Generated):
    required_arguments = 1

    def text(self) -> str:
        name = self.arguments[0]
        return f"```text\n{describe(name, variant(name))}\n```\n"


class Keys(Generated):
    """Tables of all config keys, one per section."""

    def text(self) -> str:
        meaning, parts = config_file.meanings(), []
        for section, topic in SECTIONS.items():
            rows = [
                (f"`{name}`", _default(key), _values(key), meaning[name])
                for name, key in KEYS.items()
                if name.rpartition(".")[0] == section
            ]
            title = section or topic
            parts += [f"## {title}", f"{topic[0].upper()}{topic[1:]}." if section else ""]
            parts += [_table(("key", "default", "values", "meaning"), rows)]
        return "\n\n".join(parts)


class Programs(Generated):
    """Docstrings and flags of the programs.

    The source is parsed, as importing several programs would define the same flags twice.
    """

    def text(self) -> str:
        return "\n\n".join(f"## {name}\n\n{self._help(name)}" for name in PROGRAMS)

    def _help(self, name: str) -> str:
        program = ROOT / "mvit_jax" / name
        package = program / "__main__.py"
        source = (package if package.exists() else program.with_suffix(".py")).read_text()
        tree = ast.parse(source)
        # Programs that run in several processes also have the flags of launch.py.
        shared = (ROOT / "mvit_jax/training/distributed/launch.py").read_text()
        configs = (ROOT / "mvit_jax/config.py").read_text()
        parsed = [
            *ast.walk(tree),
            *(ast.walk(ast.parse(shared)) if "launch.start()" in source else []),
            *(ast.walk(ast.parse(configs)) if "define_flag()" in source else []),
        ]
        docstring = ast.get_docstring(tree)
        assert docstring is not None
        rows = [
            (f"`--{flag}`", f"`{default}`" if default not in ("None", "") else "", meaning)
            for flag, default, meaning in map(_flag, parsed)
            if flag
        ]
        return f"{_fenced(docstring)}\n\n{_table(('flag', 'default', 'meaning'), sorted(rows))}"


class Modules(Generated):
    """The public names of all modules of a subpackage, such as `data`, sorted by file name."""

    required_arguments = 1

    def text(self) -> str:
        room = ROOT / "mvit_jax" / self.arguments[0]
        files = [p for p in sorted(room.rglob("*.py")) if not p.stem.startswith("_")]
        names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files]
        return "\n".join(
            f"## {name.removeprefix('mvit_jax.')}\n\n"
            f"```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"
            for name in names
        )


class Names(Generated):
    """A table of the public names with links and the first paragraph of each docstring."""

    def text(self) -> str:
        rows = []
        for name in mvit_jax.__all__:
            value = getattr(mvit_jax, name)
            first = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")
            if isinstance(value, dict):
                first = "Every published variant by its name."
            kind = "data" if isinstance(value, dict) else "obj"
            rows.append((f"{{py:{kind}}}`~{mvit_jax._HOME[name]}.{name}`", first))
        return _table(("name", "description"), rows)


def _flag(node: ast.AST) -> tuple[str, str, str]:
    """Returns a flag's name, default and help; empty strings if `node` defines no flag."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return "", "", ""
    if not node.func.attr.startswith("DEFINE"):
        return "", "", ""
    name, default, *_ = node.args[node.func.attr == "DEFINE" :]  # `DEFINE` begins with a parser
    texts = [a for a in node.args[2:] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    assert isinstance(name, ast.Constant)
    meaning = str(texts[-1].value) if texts else ""
    return str(name.value), ast.unparse(default).strip("'"), meaning


def _fenced(docstring: str) -> str:
    """Converts indented commands to fenced Markdown code."""
    out, code = [], False
    for line in docstring.splitlines():
        indented = line.startswith("    ")
        if indented != code and (line or not code):
            out += ["```text" if indented else "```"]
            code = indented
        out.append(line.removeprefix("    ") if code else line)
    return "\n".join(out + (["```"] if code else []))


def _beside(config: MViTConfig, p: Published | None) -> tuple[str, ...]:
    ours = cost(config)
    counts = (f"{ours.parameters / 1e6:.1f} M", f"{ours.multiply_adds / 1e9:.1f} G")
    if p is None:
        return (*counts, "", "", "", "")
    theirs = ", ".join(
        f"{value} {unit}" for value, unit in ((p.parameters, "M"), (p.multiply_adds, "G")) if value
    )
    return (*counts, theirs, "" if p.top1 is None else f"{p.top1} %", p.data, p.source)


def _default(key: Key) -> str:
    """Returns a key's default, or its type in brackets if the default is None."""
    if key.default is not None:
        return f"`{key.default!r}`"
    return "" if key.kind is object else f"({key.kind.__name__})"


def _values(key: Key) -> str:
    none = "None" if key.optional else ""
    return "; ".join(part for part in (key.unit, key.limits.removeprefix("one of "), none) if part)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    cells = ([c.replace("|", "\\|").replace("\n", " ") for c in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def setup(app: Any) -> dict[str, bool]:
    for directive in (Drawing, Variants, Ablations, Architecture, Keys, Programs, Modules, Names):
        app.add_directive(directive.__name__.lower(), directive)
    return {"parallel_read_safe": True}
