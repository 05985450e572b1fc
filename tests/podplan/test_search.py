"""Search for the largest number of clips that fits, with clips in pairs."""

import pytest

from mvit_jax.podplan import search as largest
from mvit_jax.podplan.search import Tried

MEMORY = 16


def search(first: int, slope: float) -> dict[int, Tried]:
    """Runs the search for pairs of `slope` bytes each and one more byte in all."""
    tried, pairs = {}, first
    while pairs is not None:
        used = 1 + slope * pairs
        tried[pairs] = Tried(int(used), used <= MEMORY)
        pairs = largest.next_clips(tried, MEMORY)
    return tried


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
    tried = search(first, slope)
    assert largest.answer(tried, MEMORY, 2) == answer
    assert largest.is_found(tried, MEMORY)


def test_a_number_that_did_not_fit_is_reported_above_90_percent():
    tried = {6: Tried(15, True), 7: Tried(17, False)}
    assert largest.answer(tried, MEMORY, 2, "image") == (
        "12 images fit and take 94% of the memory, 14 do not"
    )
