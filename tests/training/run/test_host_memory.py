"""Memory that was freed is used again, instead of being taken from the system anew."""

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


@pytest.mark.parametrize("way", ["keep", "leave"])
def test_the_pages_of_freed_memory_stay(way):
    said = printed(PROGRAM, way)
    if said == "none":  # not glibc: nothing to keep
        return
    # 16 MiB are 4,096 pages, or 8 large ones; ten times without the setting.
    assert int(said) < 8 if way == "keep" else int(said) >= 8


def test_so_do_those_of_xla_in_the_calling_thread():
    """Arrays of 128 MiB: in other threads the C library keeps nothing so large, and twenty runs
    take all 32,768 pages twenty times. Here a run may find no free place that is large enough."""
    faults = printed(IN_XLA)
    assert faults == "none" or int(faults) < 10 * 2**15
