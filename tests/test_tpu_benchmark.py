"""The search of benchmarks/tpu.py for the most clips that fit, on made-up memory."""

import pytest

from benchmarks import tpu

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
        (0.25, ""),  # to a sixteenth
        (0.5, "30 clips fit, 31 do not"),
        (6, "2 clips fit, 3 do not"),
        (20, "0 clips fit, 1 do not"),
    ],
)
def test_a_few_programs_find_the_most_clips(slope, sentence):
    rows = {4: found(4, slope)}
    while (clips := tpu.next_clips(rows, 16)) is not None:
        assert clips not in rows
        rows[clips] = found(clips, slope)
    fitting, failing = tpu.bounds(rows)
    assert failing is not None
    assert fitting <= 15 / slope < failing
    assert failing - fitting <= tpu.tolerance(fitting)
    assert len(rows) <= 6
    assert sentence in tpu.fits(CASE, rows, 16)
