"""Settings of XLA and JAX for the tests, and for processes that tests start.

Tests compile many tiny models, often the same, and run little. XLA's older emitters compile in half
the time of its fusion emitters: 1.9 s against 4.0 s of CPU for the gradients of a model of five
blocks (jaxlib 0.10.2, 2026-11-30). Processes share compiled programs in a temporary folder, or in
the folder MVIT_JAX_TEST_CACHE of several test runs.
"""

import atexit
import os
import shutil
import signal
import tempfile
from importlib.metadata import version

# Newer compilers have no older emitters. Their flag is the default: it marks processes of tests.
_OLDER_EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
COMPILER = (
    "--xla_cpu_use_fusion_emitters=false" if _OLDER_EMITTERS else "--xla_cpu_enable_fast_math=false"
)
DEVICES = 8  # simulated


def prepare() -> None:
    # A shell without job control starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    flags = os.environ.get("XLA_FLAGS", "")
    if COMPILER not in flags:
        os.environ["XLA_FLAGS"] = (
            f"{flags} {COMPILER} --xla_force_host_platform_device_count={DEVICES}".strip()
        )
    os.environ["JAX_PLATFORMS"] = os.environ.get("MVIT_JAX_TEST_PLATFORM", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if folder := os.environ.get("MVIT_JAX_TEST_CACHE"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    elif "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.mkdtemp(prefix="mvit_jax_compiled_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


def of_process(devices: int) -> dict[str, str]:
    """Returns the environment of a process with `devices` simulated devices."""
    return os.environ | {"XLA_FLAGS": COMPILER, "JAX_NUM_CPU_DEVICES": str(devices)}
