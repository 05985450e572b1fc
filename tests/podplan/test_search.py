"""Search for the largest number of clips that fits, with clips in pairs."""

import pytest

from mvit_jax.podplan import search as largest
from mvit_jax.podplan.search import Attempt

MEMORY = 16


def search(first: int, slope: float) -> dict[int, Attempt]:
    """Runs the search for pairs of `slope` bytes each and one more byte in all."""
    attempts, pairs = {}, first
    while pairs is not None:
        used = 1 + slope * pairs
        attempts[pairs] = Attempt(int(used), used <= MEMORY)
        pairs = largest.next_clips(attempts, MEMORY)
    return attempts


@pytest.mark.parametrize(
    "first, slope, answer",
    [
        (1, 20, "0 clips fit, 2 do not"),
        (4, 20, "0 clips fit, 2 do not"),
        (1, 2.1, "14 clips fit and take 94% of the memory"),
        (1, 6, "4 clips fit and take 81% of the memory, 6 do not"),
        (8, 0.5, "56 clips fit and take 94% of the memory"),
    ],
)
def test_the_answer_is_a_number_of_clips(first, slope, answer):
    attempts = search(first, slope)
    assert largest.answer(attempts, MEMORY, 2) == answer
    assert largest.is_done(attempts, MEMORY)


def test_a_number_that_did_not_fit_is_reported_above_90_percent():
    attempts = {6: Attempt(15, True), 7: Attempt(17, False)}
    assert largest.answer(attempts, MEMORY, 2, "image") == (
        "12 images fit and take 94% of the memory, 14 do not"
    )
