"""The search for the most clips that fit, where clips come in pairs."""

import pytest

from mvit_jax.podplan import search as largest
from mvit_jax.podplan.search import Tried

MEMORY = 16


def search(first: int, slope: float) -> dict[int, Tried]:
    """Of pairs that take `slope` bytes each, and a byte more for all."""
    tried, pairs = {}, first
    while pairs is not None:
        used = 1 + slope * pairs
        tried[pairs] = Tried(int(used), used <= MEMORY)
        pairs = largest.next_clips(tried, MEMORY)
    return tried


@pytest.mark.parametrize(
    "first, slope, said",
    [
        (1, 20, "0 clips fit, 2 do not"),
        (4, 20, "0 clips fit, 2 do not"),
        (1, 2.1, "14 clips fit and take 94% of the memory"),
        (1, 6, "4 clips fit and take 81% of the memory, 6 do not"),
        (8, 0.5, "56 clips fit and take 94% of the memory"),
    ],
)
def test_the_answer_counts_clips(first, slope, said):
    tried = search(first, slope)
    assert largest.answer(tried, MEMORY, 2) == said
    assert largest.is_found(tried, MEMORY)


def test_what_did_not_fit_is_told_beside_what_nearly_fills_the_chip():
    tried = {6: Tried(15, True), 7: Tried(17, False)}
    assert largest.answer(tried, MEMORY, 2, "image") == (
        "12 images fit and take 94% of the memory, 14 do not"
    )
