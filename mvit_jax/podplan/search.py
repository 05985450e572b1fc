"""Searches for the largest number of clips that fits on a chip, with few compilations.

A compilation takes a minute or more, so the search ends when the chip is nearly full. Close to the
limit, the compiler rematerialises on its own. Compilation then takes several times as long, more
clips fit than linear extrapolation predicts, and the program is slower per clip.
"""

from dataclasses import dataclass

FULL = 0.9  # a chip counts as full from this share of its memory
AIM = 0.95  # share of the memory that the next candidate should fill


@dataclass(frozen=True)
class Attempt:
    """Result of a compilation: bytes of a chip's memory, and True if the program fits."""

    used: int
    fits: bool


def bounds(attempts: dict[int, Attempt]) -> tuple[int, int | None]:
    """Returns the largest number of clips that fits (or 0), and the smallest that does not."""
    fitting = [n for n, result in attempts.items() if result.fits]
    failing = [n for n, result in attempts.items() if not result.fits]
    return max(fitting, default=0), min(failing, default=None)


def is_done(attempts: dict[int, Attempt], memory: int | float) -> bool:
    """Returns True if the largest fitting number fills the chip, or is exact to `tolerance`."""
    fitting, failing = bounds(attempts)
    if fitting and attempts[fitting].used >= FULL * memory:
        return True
    return failing is not None and failing - fitting <= tolerance(fitting)


def tolerance(clips: int) -> int:
    return max(1, clips // 16)


def estimate(attempts: dict[int, Attempt], memory: int | float) -> int:
    """Estimates how many clips fill `memory`, linearly from the two largest attempts."""
    low, high = sorted(attempts)[-2:]
    slope = (attempts[high].used - attempts[low].used) / (high - low)
    if slope <= 0:  # the compiler has rematerialised to make the larger number fit
        return 2 * high
    return int(high + (memory - attempts[high].used) / slope)


def next_clips(attempts: dict[int, Attempt], memory: int | float) -> int | None:
    """Returns the number of clips to compile next, or None when the search is done."""
    if is_done(attempts, memory):
        return None
    fitting, failing = bounds(attempts)
    if len(attempts) < 2:
        return 2 * fitting or max(attempts) // 2
    guess = max(estimate(attempts, AIM * memory), fitting + tolerance(fitting))
    return guess if failing is None else min(guess, failing - 1)


def answer(
    attempts: dict[int, Attempt], memory: int | float, unit: int = 1, noun: str = "clip"
) -> str:
    """Returns the result of a search as text; `attempts` counts units of `unit` clips each."""
    fitting, failing = bounds(attempts)
    result = f"{unit * fitting} {noun}s fit"
    if fitting:
        result += f" and take {attempts[fitting].used / memory:.0%} of the memory"
    return result if failing is None else f"{result}, {unit * failing} do not"
