"""Accounting of a run's wall time by phase, and advice if data loading is the bottleneck.

From the beginning of `train` on, all time of a start belongs to one of `PHASES`, so the phases add
up to the wall time. Steps run asynchronously on an accelerator: the host dispatches a step, fetches
the next batch, and then reads the step's metrics. So the wait for a batch counts as "step" while
the devices still compute, and as "data" after they have finished the step.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np

from mvit_jax.common.text import plural

Seconds = dict[str, float]  # of each phase

PHASES = {
    "start": "until the first batch is loaded",
    "compile": "dispatch of the first step, which compiles it",
    "step": "steps, from dispatch until their metrics are read",
    "data": "waiting for clips while the devices are idle",
    "checkpoint": "starting saves, and waiting for the last one",
    "validation": "validation, including its compilation and its loading of clips",
    "rest": "logging and everything else",
}
"""Descriptions of the phases by name. Histories contain the names, which therefore never change."""

REPEATED = "repeated"
"""The phase of steps that a later start repeated or a rollback undid; used in histories only."""

BOTTLENECK = 0.2  # a warning is logged if "data" / ("data" + "step") is above this share
WORSE = 0.2  # another warning is logged after the share has grown by this much


class Spans:
    """Time spent in each phase; time in a nested phase counts for the nested phase only.

    Args:
      clock: returns seconds of a monotonic clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase, self._since = "start", clock()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._ends = _Ends(clock)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Counts the time inside as `phase`."""
        outer = self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    def register_step(self, result: Any) -> None:
        """Registers the output arrays of a step that was just dispatched."""
        self._ends.watch(result)

    def measure_waits(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches and measures the wait for each.

        The wait for the first batch is "start". The wait for a later batch is "step" until the
        step in progress has ended, and "data" from then on.
        """
        iterator = iter(batches)
        first = True
        while True:
            before = self._enter("start" if first else "data")
            began = self._since
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._enter("rest" if first else before)
                if not first:
                    ended = self._ends.last()
                    ended = self._since if ended is None else min(ended, self._since)
                    hidden = max(ended - began, 0.0)
                    self._seconds["data"] -= hidden
                    self._seconds["step"] += hidden
                first = False
            yield batch

    def lap(self) -> Seconds:
        """Returns the seconds of each phase since the last call, or since the beginning."""
        self._enter(self._phase)
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def close(self) -> None:
        self._ends.close()

    def _enter(self, phase: str) -> str:
        """Starts a phase; returns the phase that ends here."""
        now = self._clock()
        self._seconds[self._phase] += now - self._since
        ended, self._phase, self._since = self._phase, phase, now
        return ended


class _Ends:
    """Completion time of the last registered arrays, measured in a thread that blocks on them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._queue: queue.SimpleQueue[tuple[Any, list[float]] | None] = queue.SimpleQueue()
        self._last: list[float] = [-np.inf]  # empty during the computation
        self._thread: threading.Thread | None = None

    def watch(self, arrays: Any) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="step ends", daemon=True)
            self._thread.start()
        self._last = []
        self._queue.put((arrays, self._last))

    def last(self) -> float | None:
        """Returns the completion time by the clock; None while the computation runs."""
        return self._last[0] if self._last else None

    def close(self) -> None:
        self._queue.put(None)

    def _wait(self) -> None:
        while (entry := self._queue.get()) is not None:
            arrays, ended = entry
            with suppress(Exception):  # the reader of the arrays gets the error
                jax.block_until_ready(arrays)
            ended.append(self._clock())
            del entry, arrays


def reduce_over_processes(seconds: Seconds) -> tuple[Seconds, int]:
    """Corrects the "data" seconds for the slowest process; all processes must call this.

    A step needs the clips of all processes. While one process waits for its clips, the others
    block in the step and count that time as "step".

    Returns:
      The seconds with the slowest process's wait as "data", and the index of that process.
    """
    if jax.process_count() == 1:
        return seconds, 0
    from jax.experimental import multihost_utils

    waits = np.asarray(multihost_utils.process_allgather(np.float32(seconds["data"])))
    slowest = int(np.argmax(waits))
    moved = min(max(float(waits[slowest]) - seconds["data"], 0.0), seconds["step"])
    return seconds | {
        "data": seconds["data"] + moved, "step": seconds["step"] - moved,
    }, slowest  # fmt: skip


def history_columns(seconds: Seconds, steps: int) -> dict[str, dict[str, float]]:
    """Returns the timing columns of a line of the history.

    Args:
      seconds: seconds of each phase since the previous line.
      steps: number of steps since the previous line.

    Returns:
      "spent", the seconds of each phase. With at least one step also "share" (of the sum, from 0
      to 1) and "per_step" (seconds).
    """
    columns = {"spent": seconds}
    if steps > 0:
        whole = sum(seconds.values()) or 1.0
        columns["share"] = {phase: value / whole for phase, value in seconds.items()}
        columns["per_step"] = {phase: value / steps for phase, value in seconds.items()}
    return {name: {p: round(v, 6) for p, v in column.items()} for name, column in columns.items()}


def scalars(columns: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns `history_columns` as TensorBoard scalars: "time_share/step", "time_per_step/step"."""
    names = {"share": "time_share", "per_step": "time_per_step"}
    return {f"{names[k]}/{p}": v for k in names if k in columns for p, v in columns[k].items()}


class InputWatch:
    """Warnings that data loading is the bottleneck, with a suggested setting.

    Another warning follows only if the share of waiting has grown by `WORSE`.

    Args:
      settings: the keyword arguments of `advice`.
    """

    def __init__(self, **settings: Any) -> None:
        self._advice = advice(**settings)
        self._first, self._warned = True, 0.0  # share at the last warning

    def sentence(self, seconds: Seconds, process: int = 0) -> str | None:
        """Returns the warning for a log interval, or None.

        The first interval is ignored, as it also fills the buffers.

        Args:
          seconds: seconds of each phase in the interval.
          process: the process with the longest wait.
        """
        first, self._first = self._first, False
        share = seconds["data"] / ((seconds["data"] + seconds["step"]) or 1.0)
        if first or share <= BOTTLENECK or share < self._warned + WORSE:
            return None
        self._warned = share
        where = f" in process {process} of {jax.process_count()}" if jax.process_count() > 1 else ""
        return (
            f"the input is the bottleneck: {100 * share:.0f} % of the time of the last steps was "
            f"spent waiting for clips{where}; {self._advice}"
        )


def advice(
    threads: int, processes: int, *, packed: bool, randaugment: bool, cores: int | None = None
) -> str:
    """Returns a sentence that suggests a setting to load more clips per second.

    Args:
      threads: `config.data.threads`.
      processes: `config.data.processes`.
      packed: True if videos are read from shards.
      randaugment: True if RandAugment is on.
      cores: cores of this host; by default `available_cores`.
    """
    cores = available_cores() if cores is None else cores
    host = f"this host has {plural(cores, 'core')}"
    each = max(threads, 1)
    busy = each * max(processes, 1)
    if threads == 0 and processes == 0:
        return f"raise data.threads from 0 to {cores} ({host})"
    if busy < cores and cores // each > max(processes, 1):
        return f"raise data.processes from {processes} to {cores // each} ({host})"
    if busy < cores:
        raised = cores // max(processes, 1)
        return f"raise data.threads from {threads} to {raised} ({host})"
    ways = [] if packed else ["pack the videos by `python -m mvit_jax.prepare videos`"]
    ways += ["make augment.randaugment weaker"] if randaugment else []
    return (
        f"{host}, and data.threads={threads} with data.processes={processes} keep them busy: "
        f"{', '.join([*ways, 'raise data.repeats'])}, or use more cores or hosts"
    )


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
