"""Reuse of freed memory, in place of new pages from the operating system."""

import pytest

from tests.support.commands import printed

PROGRAM = """
import resource, sys
import numpy as np
from mvit_jax.training.run.runtime import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("none")
    sys.exit()
x = np.ones(2**22, np.float32)
-x
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(10):
    -x
print(faults() - before)
"""

IN_XLA = """
import resource, sys
import jax
import jax.numpy as jnp
from mvit_jax.training.run import runtime
runtime.run_in_calling_thread()
if not runtime.keep_freed_memory():
    print("none")
    sys.exit()
program = jax.jit(lambda x: x[::-1] + x)
x = jnp.ones(2**25)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    jax.block_until_ready(program(x))
before = faults()
for _ in range(20):
    jax.block_until_ready(program(x))
print(faults() - before)
"""


@pytest.mark.parametrize("setting", ["keep", "default"])
def test_the_pages_of_freed_memory_are_reused_with_the_setting_alone(setting):
    output = printed(PROGRAM, setting)
    if output == "none":  # not glibc: no such setting
        return
    # 16 MiB are 4,096 pages, or 8 large ones; ten times without the setting.
    assert int(output) < 8 if setting == "keep" else int(output) >= 8


def test_memory_freed_by_xla_is_reused_in_the_calling_thread():
    """Twenty runs on arrays of 128 MiB cause fewer page faults than ten times 32,768 pages.

    In other threads the C library returns arrays of this size, and every run faults. Some runs
    fault even in the calling thread, for lack of a free block of this size.
    """
    faults = printed(IN_XLA)
    assert faults == "none" or int(faults) < 10 * 2**15
