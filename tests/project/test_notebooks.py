"""Every notebook runs from top to bottom; those that train do so for a step or two here.

The cells run in IPython without a kernel, in a fork of a process that has imported the package. In
the check they train a narrower model than the default experiment's.
"""

import ast
import inspect
import json

import nbformat
import pytest

from tests.support import commands, tiny
from tests.support.marks import nightly, slow

NOTEBOOKS = sorted((tiny.ROOT / "notebooks").glob("*.ipynb"))
TRAIN = {"prototype", "inside", "weights"}
SMALL = {"model.width": 16, "model.depths": (1, 1, 2), "batch": 8, "eval.batch": 8}
RUN = """
import functools, json, sys
from IPython.core.interactiveshell import InteractiveShell
from mvit_jax.data.making import moving_digits
from mvit_jax.training import in_memory

moving_digits.prepare = functools.partial(moving_digits.prepare, val_videos=8)
read = in_memory.read_config
in_memory.read_config = lambda name, **changes: read(name, **{small!r} | changes)
shell = InteractiveShell.instance()
for source in json.load(sys.stdin):
    shell.run_cell(source).raise_error()
"""


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks") / "digits"


# The check runs the tour, and the training notebook that compiles the least.
RUNS = [
    *(slow(name, True, id=name) for name in ("tour", "weights")),
    *(nightly(name, False, id=f"{name} as it is") for name in sorted(TRAIN)),
]


@pytest.mark.parametrize(("name", "narrow"), RUNS)
def test_notebooks_run_from_top_to_bottom(name, narrow, data):
    path = tiny.ROOT / "notebooks" / f"{name}.ipynb"
    notebook = read(path)
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(parameters) == (path.stem in TRAIN)
    for cell in parameters:
        small = {"data": str(data), "train_videos": 24, "test_videos": 16, "epochs": 1}
        names: dict = {}
        exec(cell.source, names)
        assert small.keys() == names.keys() - {"__builtins__"}
        cell.source = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    program = RUN.replace("{small!r}", repr(SMALL if narrow else {}))
    commands.printed(program, fork=True, input=json.dumps(cells), cwd=path.parent)


def test_the_list_of_notebooks_is_complete():
    assert {path.stem for path in NOTEBOOKS} == TRAIN | {"tour"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_imports_and_calls_of_notebooks_exist(path):
    """Imports work, attributes of modules resolve, and calls of them name parameters."""
    tree = ast.parse("\n".join(c.source for c in read(path).cells if c.cell_type == "code"))
    names: dict = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), path.name, "exec"), names)
    modules = {name for name, value in names.items() if inspect.ismodule(value)}

    def value(node):
        """Returns the attribute of an imported module that a dotted name leads to, or None."""
        if isinstance(node, ast.Name):
            return names[node.id] if node.id in modules else None
        above = value(node.value) if isinstance(node, ast.Attribute) else None
        return getattr(above, node.attr) if inspect.ismodule(above) else None

    for node in ast.walk(tree):
        value(node)
        if isinstance(node, ast.Call):
            called, keywords = value(node.func), [k.arg for k in node.keywords if k.arg]
            if (getattr(called, "__module__", None) or "").startswith("mvit_jax"):
                inspect.signature(called).bind_partial(**dict.fromkeys(keywords))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_store_images_as_their_only_outputs(path):
    """Printed text becomes stale and names the machine."""
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.execution_count is None
            for output in cell.outputs:
                assert output.output_type == "display_data", cell.source
                assert set(output.data) <= {"image/png", "image/gif"}
    assert path.stat().st_size < 2e6
