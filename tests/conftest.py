"""Settings and fixtures of all tests. Settings of XLA come before the import of JAX."""

import gc

from tests.support import environment

environment.prepare()
# Tracing creates millions of objects: default thresholds cost an eighth of the CPU time.
gc.set_threshold(100_000, 50, 100)

from jaxtyping import install_import_hook

# Checks shapes and dtypes in signatures, in the tests alone.
hook = install_import_hook("mvit_jax", "beartype.beartype")

import jax

# Implicit rank promotion is a bug.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

import pytest

from mvit_jax import train
from mvit_jax.data.making import moving_digits
from mvit_jax.training.distributed import sharding
from tests.support import tiny

pytest_plugins = ["tests.support.cpu_seconds"]

# Programs in the process of the tests use one of its devices: a step for eight takes several times
# as long to compile and to run. Tests of sharding pass their devices.
_make_mesh = sharding.make_mesh


def make_mesh(data: int = -1, fsdp: int = 1, devices=None):
    return _make_mesh(data, fsdp, jax.devices()[:1] if devices is None else devices)


sharding.make_mesh = make_mesh


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A small set of moving digits: 24 videos to train on, 8 to validate, 10 to test."""
    folder = tmp_path_factory.mktemp("digits")
    moving_digits.prepare(folder, train_videos=24, val_videos=8, test_videos=10)
    return folder


@pytest.fixture(scope="session")
def reference(digits, tmp_path_factory):
    """Folder of an uninterrupted run of `tiny.RECIPE`, which tests read or copy."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert train.train(tiny.config(digits, **tiny.RECIPE), str(folder)) == 0
    return folder


@pytest.fixture
def eight_devices(monkeypatch):
    """Has programs use all simulated devices."""
    monkeypatch.setattr(sharding, "make_mesh", _make_mesh)


@pytest.fixture(autouse=True)
def settings_of_jax():
    """Fails a test that leaves settings of JAX changed, and restores them."""
    yield
    settings = ("jax_numpy_rank_promotion", "jax_default_matmul_precision", "jax_enable_x64")
    left = [getattr(jax.config, name) for name in settings]
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_enable_x64", False)
    assert left == ["raise", "highest", False]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Turns a skip into a failure, except for tests that need an accelerator."""
    report = yield
    if report.skipped and item.get_closest_marker("accelerator") is None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} is skipped but not marked `accelerator`"
    return report


# Files that take minutes, the longest first: a long last file would leave the other worker idle.
LONG = (
    "test_processes", "test_docs", "test_bucket", "test_programs", "test_parity",
    "test_custom_parts", "test_custom_modules", "test_survival", "test_run_blocks", "test_kill",
    "test_notebooks", "test_compile", "test_step", "test_locks", "test_broken_data",
    "test_hung_input", "test_sharding", "test_checkpoints", "test_init", "test_nan_policy",
    "test_sizes",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Sorts tests by file, the longest first; xdist begins with files of many tests."""
    positions = {name: position for position, name in enumerate(LONG)}
    items.sort(key=lambda item: positions.get(item.path.stem, len(LONG)))
