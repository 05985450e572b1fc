"""The search of benchmarks/tpu.py for the most clips that fit, on made-up memory."""

import pytest

from benchmarks import tpu
from mvit_jax.podplan import search

CASE = tpu.Case("mvit_b_16x4", "train", "v5e", 0, "none")


def found(clips: int, slope: float) -> tpu.Row | int:
    """Figures of a program that takes 1 + `slope` bytes a clip, on a chip of 16 bytes."""
    used = 1 + slope * clips
    if used > 16:
        return int(used)
    return tpu.Row(CASE, 1, 1, 1, 1, 1, int(used), 1, 1, 1, ())


@pytest.mark.parametrize(
    "slope, sentence",
    [
        (0.25, "56 clips fit and take 94% of the memory"),
        (0.5, "28 clips fit and take 94% of the memory"),
        (6, "2 clips fit and take 81% of the memory, 3 do not"),
        (20, "0 clips fit, 1 do not"),
    ],
)
def test_a_few_programs_find_the_most_clips(slope, sentence):
    rows = {4: found(4, slope)}
    while (clips := search.next_clips(tpu.tried(rows), 16)) is not None:
        assert clips not in rows
        rows[clips] = found(clips, slope)
    fitting, failing = search.bounds(tpu.tried(rows))
    assert fitting <= 15 / slope
    if 1 + slope * fitting < 0.9 * 16:  # not full: then nearly as many do not fit
        assert failing is not None and 15 / slope < failing
        assert failing - fitting <= search.tolerance(fitting)
    assert len(rows) <= 6
    assert sentence in tpu.fits(CASE, rows, 16)
