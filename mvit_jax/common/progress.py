"""Progress over videos: a bar on a terminal, elsewhere a line at each 10 %."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """Progress display for `total` videos, of which `done` are finished at the start."""

    def __init__(self, title: str, total: int, done: int = 0):
        self._title, self._total, self._done = title, total, done
        terminal = sys.stderr.isatty()
        self._bar = tqdm(desc=title, initial=done, total=total, unit="video") if terminal else None

    def update(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._done)
        elif done * 10 // self._total > self._done * 10 // self._total:
            print(f"{self._title}: {done} of {self._total} videos", file=sys.stderr, flush=True)
        self._done = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def track(title: str, results: Iterable[T], total: int, done: int = 0) -> Iterator[T]:
    """Yields results, one per video, and displays the progress."""
    with closing(Progress(title, total, done)) as progress:
        for number, result in enumerate(results, done + 1):
            yield result
            progress.update(number)
