"""The most clips that a chip holds, found with few compiles: each takes a minute or more.

Nearly full is enough. Short of memory, the compiler computes things again of its own accord: it
takes several times as long, fits more than the line through smaller numbers says, and the program
that it makes is slower for each clip.
"""

from dataclasses import dataclass

FULL = 0.9  # share of the memory from which a chip counts as full
AIM = 0.95  # that the next number should take


@dataclass(frozen=True)
class Tried:
    """What a number of clips takes of a chip's memory, in bytes, and whether it fits."""

    used: int
    fits: bool


def bounds(tried: dict[int, Tried]) -> tuple[int, int | None]:
    """The most clips that fit, and the fewest that do not."""
    fitting = [n for n, found in tried.items() if found.fits]
    failing = [n for n, found in tried.items() if not found.fits]
    return max(fitting, default=0), min(failing, default=None)


def is_found(tried: dict[int, Tried], memory: int | float) -> bool:
    """Whether the most clips that fit fill the chip, or are known to a sixteenth."""
    fitting, failing = bounds(tried)
    if fitting and tried[fitting].used >= FULL * memory:
        return True
    return failing is not None and failing - fitting <= tolerance(fitting)


def tolerance(clips: int) -> int:
    return max(1, clips // 16)


def estimate(tried: dict[int, Tried], memory: int | float) -> int:
    """Where the line through the memory of two numbers of clips, the largest, meets `memory`."""
    low, high = sorted(tried)[-2:]
    slope = (tried[high].used - tried[low].used) / (high - low)
    if slope <= 0:  # a larger one that the compiler has made to fit
        return 2 * high
    return int(high + (memory - tried[high].used) / slope)


def next_clips(tried: dict[int, Tried], memory: int | float) -> int | None:
    """The number of clips to compile next in search of the most that fit; None when found."""
    if is_found(tried, memory):
        return None
    fitting, failing = bounds(tried)
    if len(tried) < 2:
        return 2 * fitting or max(tried) // 2
    guess = max(estimate(tried, AIM * memory), fitting + tolerance(fitting))
    return guess if failing is None else min(guess, failing - 1)


def answer(tried: dict[int, Tried], memory: int | float, unit: int = 1, noun: str = "clip") -> str:
    """What a search that is done has found; `tried` are numbers of so many clips each."""
    fitting, failing = bounds(tried)
    said = f"{unit * fitting} {noun}s fit"
    if fitting:
        said += f" and take {tried[fitting].used / memory:.0%} of the memory"
    return said if failing is None else f"{said}, {unit * failing} do not"
