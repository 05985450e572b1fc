"""Memory that was freed is used again, instead of being taken from the system anew."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from mvit_jax.models.host_memory import keep_freed_memory
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


@pytest.mark.parametrize("way", ["keep", "leave"])
def test_the_pages_of_freed_memory_stay(way):
    run = [sys.executable, "-c", PROGRAM, way]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    if said == "none":  # not glibc: nothing to keep
        return
    # 16 MiB are 4,096 pages, or 8 large ones; ten times without the setting.
    assert int(said) < 8 if way == "keep" else int(said) >= 8
