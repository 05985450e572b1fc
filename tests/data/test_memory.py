"""Ten thousand clips through the input pipeline leave its memory as it was."""

import subprocess
import sys

import pytest

from tests import tiny

pytestmark = pytest.mark.slow

# In a process of its own, whose memory nothing else moves. "Private" pages are what it holds.
LOAD = """
import gc, sys
from mvit_jax.data import pipeline, randaugment
from mvit_jax.data.augmentation import Augmentation
from mvit_jax.data.sources import open_source

def held():
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private"))

videos = open_source(sys.argv[1], sys.argv[2], source=sys.argv[3])
settings = pipeline.ClipSettings(
    frames=8, stride=4, size=48, short_side=48,
    augmentation=Augmentation(randaugment=randaugment.parse("rand-m7-n2-inc1")),
)
batches = pipeline.train_batches(videos, settings, seed=0, batch=40, steps=250, repeats=2)
for step, batch in enumerate(batches, start=1):
    if step in (50, 100, 150, 200, 250):
        print(held())
"""


@pytest.mark.parametrize("source", ["list", "shards"])
def test_memory_does_not_grow(source, digits, tmp_path):
    folder, name = digits, "train.csv"
    if source == "shards":
        folder = tmp_path / "packed"
        packed = subprocess.run(
            [sys.executable, "-m", "mvit_jax.prepare", "videos", f"--csv={digits / name}",
             f"--out={folder}", "--shards=2", "--workers=1"],
            cwd=tiny.ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert packed.returncode == 0, packed.stderr
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), name, source],
        cwd=tiny.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kilobytes = [int(line) for line in done.stdout.split()]
    # Of 250 x 20 decoded videos and 10,000 clips; a frame that each kept would be 60 MB.
    assert len(kilobytes) == 5
    assert max(kilobytes[1:]) - kilobytes[0] < 8_000, kilobytes
