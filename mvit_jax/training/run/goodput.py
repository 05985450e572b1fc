"""Where the wall time of a run goes, and what to do where it goes into waiting for clips.

Every moment of a start, from the beginning of `train` on, belongs to one of `PHASES`, so that they
add up to the wall time. On an accelerator a step runs while the host does other things: it is sent
off, the next batch is waited for, and only then are its numbers read. Waiting for a batch is
therefore "data" only from the moment at which the devices had finished the step under way; up to
there they worked, and the time is the step's.
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
    "start": "until the first batch is there",
    "compile": "sending off the first step, which compiles it",
    "step": "steps, from sending one off until its numbers are read",
    "data": "waiting for clips while the devices had nothing to do",
    "checkpoint": "handing checkpoints over to be written, and waiting for the last one",
    "validation": "validating, its own compiling and waiting for clips with it",
    "rest": "writing the log, and all else",
}
"""The names of phases, which do not change, and what is in them."""

REPEATED = "repeated"
"""In a history, steps that a later start did again or a rollback undid: they do not count."""

BOTTLENECK = 0.2  # share of steps and waiting above which waiting is worth a word
WORSE = 0.2  # by which that share must have grown for another one


class Spans:
    """Adds up the time of each phase. One phase is measured inside another at its expense.

    Args:
      clock: seconds since any moment, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase, self._since = "start", clock()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._ends = _Ends(clock)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """What is done in this context is of `phase`."""
        outer = self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    def sent(self, result: Any) -> None:
        """Takes the arrays of a step that was just sent off."""
        self._ends.watch(result)

    def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Gives the batches. The first ends the phase "start"; the wait for others is "data" or,
        while the step under way has not ended, "step"."""
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
        """The seconds of each phase since the last call, or since the beginning."""
        self._enter(self._phase)
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def close(self) -> None:
        self._ends.close()

    def _enter(self, phase: str) -> str:
        """Books the time until now on the phase that ends here, and names it."""
        now = self._clock()
        self._seconds[self._phase] += now - self._since
        ended, self._phase, self._since = self._phase, phase, now
        return ended


class _Ends:
    """Knows when the arrays that it was last given were computed: a thread waits for them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._given: queue.SimpleQueue[tuple[Any, list[float]] | None] = queue.SimpleQueue()
        self._last: list[float] = [-np.inf]  # empty while they are being computed
        self._thread: threading.Thread | None = None

    def watch(self, arrays: Any) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="step ends", daemon=True)
            self._thread.start()
        self._last = []
        self._given.put((arrays, self._last))

    def last(self) -> float | None:
        """When they were there, by the clock; None where they are not yet."""
        return self._last[0] if self._last else None

    def close(self) -> None:
        self._given.put(None)

    def _wait(self) -> None:
        while (given := self._given.get()) is not None:
            arrays, ended = given
            with suppress(Exception):  # whoever reads them is told
                jax.block_until_ready(arrays)
            ended.append(self._clock())
            del given, arrays


def over_processes(seconds: Seconds) -> tuple[Seconds, int]:
    """The seconds of a run of many processes, and which of them waited longest for clips.

    A step needs the clips of all processes, so while one waits for its clips the others wait for
    it, and count that as the step. All processes must call this together.
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


def told(seconds: Seconds, steps: int) -> dict[str, dict[str, float]]:
    """What a line of the history tells of the time since the one before it.

    Returns:
      "spent", the seconds of each phase; where there were any `steps`, "share" (from 0 to 1, all
      together 1) and "per_step" (seconds) too.
    """
    columns = {"spent": seconds}
    if steps > 0:
        whole = sum(seconds.values()) or 1.0
        columns["share"] = {phase: value / whole for phase, value in seconds.items()}
        columns["per_step"] = {phase: value / steps for phase, value in seconds.items()}
    return {name: {p: round(v, 6) for p, v in column.items()} for name, column in columns.items()}


def scalars(told: dict[str, dict[str, float]]) -> dict[str, float]:
    """The same for TensorBoard: "time_share/step", "time_per_step/step" and so on."""
    names = {"share": "time_share", "per_step": "time_per_step"}
    return {f"{names[k]}/{p}": v for k in names if k in told for p, v in told[k].items()}


class InputWatch:
    """Says when the input is the bottleneck, and the knob to turn: once, and again when it has
    become much worse.

    Args:
      knob: the settings that load clips, as `advice` takes them.
    """

    def __init__(self, **knob: Any) -> None:
        self._advice = advice(**knob)
        self._first, self._said = True, 0.0

    def sentence(self, seconds: Seconds, process: int = 0) -> str | None:
        """What is to be said of an interval of the log; nothing of the first, which also fills
        buffers. `process` is the one that waited longest."""
        first, self._first = self._first, False
        share = seconds["data"] / ((seconds["data"] + seconds["step"]) or 1.0)
        if first or share <= BOTTLENECK or share < self._said + WORSE:
            return None
        self._said = share
        who = f" by process {process} of {jax.process_count()}" if jax.process_count() > 1 else ""
        return (
            f"the input is the bottleneck: {100 * share:.0f} % of the time of the last steps went "
            f"into waiting for clips{who}; {self._advice}"
        )


def advice(
    threads: int, processes: int, *, packed: bool, randaugment: bool, cores: int | None = None
) -> str:
    """How to load more clips a second.

    Args:
      threads, processes: of the config's section `data`.
      packed: whether videos are read from shards.
      randaugment: whether it is on.
      cores: of this host; by default those that this process may use.
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
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
