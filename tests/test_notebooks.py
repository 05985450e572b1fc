"""Every notebook runs from top to bottom; those that train do so for a step or two here."""

import os

import nbformat
import pytest
from nbclient import NotebookClient

from tests import tiny

NOTEBOOKS = sorted((tiny.ROOT / "notebooks").glob("*.ipynb"))
TRAIN = {"prototype", "inside", "weights"}


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    NOTEBOOKS,
    ids=lambda p: p.stem,
)
def test_notebooks_run_from_top_to_bottom(path, tmp_path):
    notebook = read(path)
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(parameters) == (path.stem in TRAIN)
    for cell in parameters:
        small = {
            "data": str(tmp_path / "digits"),
            "train_videos": 64,
            "test_videos": 16,
            "epochs": 1,
        }
        names: dict = {}
        exec(cell.source, names)
        assert small.keys() == names.keys() - {"__builtins__"}
        cell.source = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    # The limit is of one cell, for one that hangs; whole they took 26 to 122 s on two busy cores.
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}})
    one_device = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    client.execute(env=one_device)


def test_the_notebooks_are_these():
    assert {path.stem for path in NOTEBOOKS} == TRAIN | {"tour"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_keep_pictures_alone(path):
    """Text that was printed goes stale, and says on what machine it was."""
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.execution_count is None
            for output in cell.outputs:
                assert output.output_type == "display_data", cell.source
                assert set(output.data) <= {"image/png", "image/gif"}
    assert path.stat().st_size < 2e6
