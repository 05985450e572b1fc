"""Settings for all tests; what concerns XLA must be set before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("MVIT_JAX_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Programs keep what they compiled in the user's folder; tests that try that choose their own.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
# Tests compile much and run little.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from jaxtyping import install_import_hook

# Shapes and dtypes in signatures are checked in the tests, and in the tests alone.
hook = install_import_hook("mvit_jax", "beartype.beartype")

import jax  # noqa: E402

# An array that is broadcast by accident is a bug; on purpose, it says so.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

import pytest  # noqa: E402

from mvit_jax.data import moving_digits  # noqa: E402


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A small set of moving digits: 24 videos to train on, 8 to validate, 10 to test."""
    folder = tmp_path_factory.mktemp("digits")
    moving_digits.prepare(folder, train_videos=24, val_videos=8, test_videos=10)
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that is skipped tests nothing: only what needs an accelerator may be."""
    report = yield
    if report.skipped and item.get_closest_marker("accelerator") is None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} is skipped but not marked `accelerator`"
    return report
