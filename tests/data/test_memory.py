"""Memory of the input pipeline over thousands of clips."""

import subprocess
import sys

import pytest

from tests.support import commands, tiny
from tests.support.environment import of_process

# Runs in a separate process, so that other tests do not change the private memory.
LOAD = """
import gc, sys
from mvit_jax.data import pipeline, randaugment
from mvit_jax.data.augmentation import Augmentation
from mvit_jax.data.source import open_source

def private_memory():
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private"))

videos, steps = open_source(sys.argv[1], sys.argv[2], source=sys.argv[3]), int(sys.argv[4])
settings = pipeline.ClipSettings(
    frames=8, stride=4, size=48, short_side=48,
    augmentation=Augmentation(randaugment=randaugment.parse("rand-m7-n2-inc1")),
)
batches = pipeline.train_batches(videos, settings, seed=0, batch=40, steps=steps, repeats=2)
for step, batch in enumerate(batches, start=1):
    if step % (steps // 5) == 0:
        print(private_memory())
"""


@pytest.mark.parametrize(
    ("source", "steps"),
    [
        pytest.param("list", 100, marks=pytest.mark.slow),
        pytest.param("list", 250, marks=pytest.mark.nightly),
        pytest.param("shards", 250, marks=pytest.mark.nightly),
    ],
)
def test_memory_does_not_grow(source, steps, digits, tmp_path):
    folder, name = digits, "train.csv"
    if source == "shards":
        folder = tmp_path / "packed"
        flags = (f"--csv={digits / name}", f"--out={folder}", "--shards=2", "--workers=1")
        status, output = commands.run("prepare", "videos", *flags)
        assert status == 0, output
    completed = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), name, source, str(steps)],
        cwd=tiny.ROOT, env=of_process(1), capture_output=True, text=True,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    kilobytes = [int(line) for line in completed.stdout.split()]
    # A leak of one frame a clip would be 19 MB between the measurements after 20 and 100 steps of
    # 40 clips, and 48 MB between those of 250 steps.
    assert len(kilobytes) == 5
    assert max(kilobytes[1:]) - kilobytes[0] < 8_000, kilobytes
