"""The documentation site: it builds without a warning, and every code block of its pages runs.

Blocks of a page run from top to bottom, Python ones in one namespace, in an empty folder with
`configs/`. Stated outputs are checked: `expression  # -> repr of its value`, and a `text` block
with the output of the `sh` block before it (a line `...` stands for any lines). A Python
block that begins with a comment `# configs/NAME.py` or `# my_ideas.py` is written there. A block
that cannot run here has the line `% not run: why` before it.

Commands that train, make data or plan run on a small scale: the first `python` on the path adds
`SMALL` to their flags, and to those of no other command. It then runs a fork of a process that has
imported the package (`warm.py`). The check leaves some trainings to the nightly tests (`NIGHTLY`).
"""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import mvit_jax
from mvit_jax.config import KEYS
from mvit_jax.training import in_memory
from tests.support import commands, tiny, warm
from tests.support.environment import COMPILER
from tests.support.marks import nightly, slow

DOCS = tiny.ROOT / "docs"
# Pages whose commands need a cluster: `test_launch.py` runs them with stand-ins.
ELSEWHERE = ("launch_gke.md", "launch_slurm.md", "launch_tpu.md", "pod_data.md")
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if re.search(r"^```\w", path.read_text(), re.MULTILINE) and path.name not in ELSEWHERE
)


_IMAGES = ["--config.model.width=16", "--config.model.depths=(1,2)", *tiny.FLAGS[-4:]]
SMALL = {
    "mvit_jax.train": [*tiny.FLAGS, "--config.model.heads=1", "--config.epochs=1"],
    "mvit_jax.train of images": [*_IMAGES, "--config.epochs=1"],
    "mvit_jax.train of boxes": [
        *tiny.FLAGS,
        "--config.model.heads=1",
        "--config.epochs=1",
        "--config.eval.clips=1",
    ],
    "mvit_jax.prepare moving_scenes": ["--train_videos=12", "--val_videos=8", "--test_videos=8"],
    "mvit_jax.prepare moving_digits": ["--train_videos=24", "--val_videos=8", "--test_videos=10"],
    "mvit_jax.podplan": [*tiny.FLAGS[:6], "--config.model.heads=1"],
}
# By workdir, what only the nightly tests train; the check reads the flags (`--dry_run`), and copies
# another run where later commands read the folder.
NIGHTLY = {
    "runs/pictures": "", "runs/probe": "", "runs/sharded": "", "runs/traced": "", "runs/tuned": "",
    "runs/averaged": "runs/mine", "runs/vit": "runs/moving_digits",
}  # fmt: skip
SHIM = """#!{python} -IS
import os, shutil, subprocess, sys
small, nightly, args, flags = {small!r}, {nightly!r}, sys.argv[1:], os.environ.get("XLA_FLAGS", "")
program = args[1] if args[:1] == ["-m"] else ""
workdir = "".join(a.removeprefix("--workdir=") for a in args if a.startswith("--workdir="))
if program == "mvit_jax.train" and any("pictures" in a or "fashion" in a for a in args):
    program += " of images"
if program == "mvit_jax.train" and any("scenes" in a or "boxes" in a for a in args):
    program += " of boxes"
if program == "mvit_jax.prepare":
    program += " " + args[2]
if {compiler!r} not in flags:  # a page has set its own: two devices show as much as eight
    os.environ["XLA_FLAGS"] = flags.replace("device_count=8", "device_count=2") + " " + {compiler!r}
command = [{executable!r}, *args, *small.get(program, [])]
if program == "mvit_jax.podplan" and nightly or workdir in nightly:
    if not program.startswith("mvit_jax.train"):
        sys.exit()
    if nightly[workdir]:
        shutil.copytree(nightly[workdir], workdir)
    command += ["--dry_run"]
os.execv(command[0], command)
"""


@dataclass(frozen=True)
class CodeBlock:
    language: str
    code: str
    line: int  # of the page on which the code begins, from 1
    not_run: bool


def blocks(page: Path) -> list[CodeBlock]:
    """Returns the fenced blocks of a page, without directives, ```{name}."""
    code_blocks, lines = [], page.read_text().splitlines()
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence" and not token.info.startswith("{"):
            assert token.map
            fence = token.map[0]
            not_run = fence > 0 and lines[fence - 1].startswith("% not run: ")
            code = token.content.removesuffix("\n")
            code_blocks.append(CodeBlock(token.info, code, fence + 2, not_run))
    return code_blocks


def run_page(page: Path) -> int:
    """Runs the blocks of a page in this folder; returns the number of checked outputs."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    checked, printed = 0, ""
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.not_run:
            continue
        if block.language == "python":
            checked += run_python(block, namespace, where)
        elif block.language == "sh":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.code], capture_output=True, text=True
            )
            assert done.returncode == 0, f"{where}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            printed = done.stdout
        elif block.language == "text":
            pattern = "".join(
                r"(?:.*\n)*?" if line == "..." else re.escape(line.rstrip()) + r" *\n"
                for line in block.code.splitlines()
            )
            assert re.fullmatch(pattern, printed), f"{where}: it prints\n{printed}"
            checked += 1
        else:
            raise AssertionError(f"{where}: blocks of {block.language!r} cannot be run")
    return checked


def run_python(block: CodeBlock, namespace: dict[str, Any], where: str) -> int:
    """Executes a block, or writes the file that it is; returns the number of checked outputs."""
    file = re.match(r"# (configs/\w+\.py|my_ideas\.py)\n", block.code)
    if file:
        Path(file[1]).write_text(block.code + "\n")
        return 0
    stated = {
        token.start[0]: token.string.removeprefix("# -> ")
        for token in tokenize.generate_tokens(io.StringIO(block.code).readline)
        if token.type == tokenize.COMMENT and token.string.startswith("# -> ")
    }
    checked = 0
    for node in ast.parse(block.code).body:
        expected = stated.pop(node.end_lineno or 0, None)
        if expected is None:
            exec(compile(ast.Module([node], []), where, "exec"), namespace)
            continue
        assert isinstance(node, ast.Expr), f"{where}: only an expression has a value: {expected}"
        value = repr(eval(compile(ast.Expression(node.value), where, "eval"), namespace))
        assert value == expected, f"{where}: {ast.unparse(node)} is {value}, not {expected}"
        checked += 1
    assert not stated, f"{where}: belongs to no statement: {stated}"
    return checked


def run_in_empty_folder(page: Path, folder: Path, *, nightly: bool) -> int:
    shutil.copytree(tiny.ROOT / "configs", folder / "configs")
    shim = folder / "bin" / "python"
    shim.parent.mkdir()
    values = {"python": sys.executable, "executable": str(commands.python()), "small": SMALL}
    values |= {"compiler": COMPILER, "nightly": {} if nightly else NIGHTLY}
    shim.write_text(SHIM.format(**values))
    shim.chmod(0o755)
    env = warm.environment()
    env["PATH"] = f"{shim.parent}{os.pathsep}{env['PATH']}"
    code = (
        "import sys, pathlib; from tests.project import test_docs\n"
        f"{'' if nightly else 'test_docs.shrink_in_memory_runs()'}\n"
        "print('\\nheld:', test_docs.run_page(pathlib.Path(sys.argv[1])))"
    )
    out = commands.printed(code, page, fork=True, cwd=folder, env=env)
    return int(out.rsplit("held: ", 1)[1])


def shrink_in_memory_runs() -> None:
    """Makes in-memory runs train the tiny model instead of the default experiment's."""
    read = in_memory.read_config
    small = {f"model.{key}": value for key, value in tiny.MODEL.items()}
    small |= {"data.short_side": 32, "batch": 8, "eval.batch": 8}
    in_memory.read_config = lambda name, **changes: read(name, **small | changes)


@pytest.mark.parametrize("nightly", [slow(False, id="check"), nightly(True, id="whole")])
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_every_code_block_runs_with_the_stated_outputs(page, nightly, tmp_path):
    held = run_in_empty_folder(page, tmp_path, nightly=nightly)
    assert held == len(re.findall(r"# -> |^```text$", page.read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", str(DOCS), str(folder)],
        capture_output=True, text=True, cwd=tiny.ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert not done.stderr.strip(), done.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_public_name(site):
    from sphinx.util.inventory import InventoryFile

    documented = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    names = {name for kind in documented.data.values() for name in kind}
    for name in mvit_jax.__all__:
        assert f"{mvit_jax._HOME[name]}.{name}" in names, f"{name} is not in the reference"


@pytest.mark.slow
def test_generated_tables_flags_and_figures_are_in_the_site(site):
    from mvit_jax.describe.ablations import ABLATIONS
    from mvit_jax.models.variants import VARIANTS

    variants = (site / "variants.html").read_text()
    assert all(f">{name}<" in variants for name in VARIANTS)
    assert variants.count("<tr") > len(VARIANTS) + len(ABLATIONS)
    assert "36.6 M" in variants and "70.5 G" in variants  # mvit_b_16x4, as the paper rounds
    keys = (site / "config.html").read_text()
    for name in KEYS:
        assert f">{name}<" in keys, f"{name} is not in the config reference"
    programs = (site / "api" / "programs.html").read_text()
    for flag in ("workdir", "shuffle_frames", "serve", "inflate"):
        assert f">--{flag}<" in programs
    assert programs.count(">--coordinator<") == 2  # of training and test
    model = (site / "model.html").read_text()
    assert model.count("<svg role=") == 5 and "8×14×14" in model
    assert "currentColor" in model and "#010203" not in model
    # In docstrings an indented command line is a block of its own, and backticks are code.
    page = (site / "api" / "data.html").read_text()
    assert "`" not in re.sub(r"<script.*?</script>|<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert "highlight-python" in page


def test_every_notebook_begins_with_its_purpose_and_is_listed():
    page = (DOCS / "notebooks.md").read_text()
    for path in (tiny.ROOT / "notebooks").glob("*.ipynb"):
        first = "".join(json.loads(path.read_text())["cells"][0]["source"])
        title = re.match(r"# (.+)\n\n\w.{40,}", first)
        assert title and f"**{title[1]}**, `notebooks/{path.name}`" in page, path.name
