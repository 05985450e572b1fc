"""Worker processes that cannot start or end: scripts without a guard, and killed processes."""

import subprocess
import sys
import types

import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.data import loader
from mvit_jax.data.loader import LoaderOptions, WorkerError, load_batches
from tests.support import tiny
from tests.support.environment import of_process

SCRIPT = """
from mvit_jax.data import pipeline
from mvit_jax.data.formats.synthetic import Synthetic
from mvit_jax.data.loader import LoaderOptions

def batches():
    videos = Synthetic(videos=4, classes=2, height=32, width=32)
    settings = pipeline.ClipSettings(frames=2, stride=1, size=16, short_side=16)
    options = LoaderOptions(threads=1, processes=1)
    for batch in pipeline.train_batches(videos, settings, seed=0, batch=2, steps=1, loader=options):
        print(batch["clip"].shape)
"""
GUARDED = 'if __name__ == "__main__":\n    batches()\n'


def script(folder, *parts):
    (folder / "script.py").write_text("".join(parts))
    return folder / "script.py"


def main_module(file, spec=None):
    module = types.ModuleType("__main__")
    module.__spec__ = spec
    if file:
        module.__file__ = str(file)
    return module


def test_a_script_without_a_guard_is_told_of_it(tmp_path, monkeypatch):
    unguarded, guarded = script(tmp_path, "batches()\n"), tmp_path / "guarded.py"
    guarded.write_text(GUARDED)
    monkeypatch.setitem(sys.modules, "__main__", main_module(unguarded))
    with pytest.raises(UserError) as caught:
        next(load_batches(None, 1, 1, LoaderOptions(processes=1), 1))
    message = str(caught.value)
    assert str(unguarded) in message and 'if __name__ == "__main__":' in message
    assert "data.processes=0" in message and "\n" not in message
    for module in (
        main_module(guarded),
        main_module(None),  # a notebook
        main_module(unguarded, spec="python -m"),
        main_module(tmp_path / "removed.py"),
    ):
        monkeypatch.setitem(sys.modules, "__main__", module)
        loader._check_script()


@pytest.mark.parametrize(
    ("code", "words"), [(" with exit code -9", "ended with exit code -9"), ("", "ended: ")]
)
def test_a_worker_process_that_ends_is_an_error_of_one_sentence(code, words, monkeypatch):
    class Ended:
        def __iter__(self):
            return self

        def __next__(self):
            raise RuntimeError(f"Worker process was terminated unexpectedly{code}. Search the logs")

        def close(self):
            pass

    monkeypatch.setattr(loader, "_dataset", lambda *_: Ended())
    with pytest.raises(WorkerError, match=words):
        next(load_batches(None, 1, 1, LoaderOptions(processes=2), 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        (GUARDED, 0, "(2, 2, 16, 16, 3)"),
        ("batches()\n", 1, "would be run again by each worker process"),
        # A mention of the name that guards nothing.
        ("print(__name__)\nbatches()\n", 1, "a worker process of data.processes=1 ended"),
    ],
)
def test_scripts_with_worker_processes(end, status, words, tmp_path):
    done = subprocess.run(
        [sys.executable, script(tmp_path, SCRIPT, end)], capture_output=True, text=True,
        env=of_process(1) | {"PYTHONPATH": str(tiny.ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert words in (done.stdout + done.stderr).strip().splitlines()[-1] or words in done.stderr
