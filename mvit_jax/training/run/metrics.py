"""Metric logging: TensorBoard event files, `metrics.jsonl`, and a live line or plain lines.

Event files are written by TensorBoard's own protocol buffers; no TensorFlow is needed.
"""

import itertools
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import AnyPath, faults, is_local, to_path, why
from mvit_jax.training.run import goodput, history, nan_policy
from mvit_jax.training.run.history import ObjectFile
from mvit_jax.training.state import Metrics


class BrokenDataError(UserError):
    """Too large a share of the videos cannot be decoded."""


# A share of fewer clips than these says little.
_FEWEST_CLIPS = 200


class Logbook:
    """Collects the metrics of steps, and every `every` steps writes their means down."""

    def __init__(
        self, workdir: str | AnyPath, *, start: int, steps: int, batch: int, every: int,
        max_broken: float = 1.0, on_nan: str = "stop", spans: goodput.Spans | None = None,
        watch: goodput.InputWatch | None = None,
    ):  # fmt: skip
        # One process of many: all have the same means, and one file takes one writer.
        self.first = jax.process_index() == 0
        self.events = Events(workdir, self.say) if self.first else None
        self.history = history.Writer(workdir) if self.first else None
        self.bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True,
            disable=not (self.first and _has_columns()),
        )  # fmt: skip
        self.start, self.steps, self.batch, self.every = start, steps, batch, every
        self.max_broken, self.broken, self.clips = max_broken, 0, 0
        self.not_finite = nan_policy.Policy(on_nan, self.say)
        self.spans, self.watch, self.timed_step = spans or goodput.Spans(), watch, start
        self.pending: Metrics | None = None  # of the step that may still be running
        self.pending_step = start
        self.sums: dict[str, np.ndarray] = {}
        self.began = self.last_time = time.monotonic()
        self.last_step = start

    def step(self, step: int, metrics: Metrics, learning_rate: Any) -> None:
        """Takes the metrics of a step just sent off, and reads those of the one before."""
        self.spans.sent(metrics)
        self.flush()
        self.pending, self.pending_step = metrics, step
        self.learning_rate = learning_rate
        self.bar.update(step - self.bar.n)
        if step % self.every == 0 or step == self.steps:
            self.flush()
            self._write(step)

    def flush(self) -> None:
        """Waits for the step under way. A loss or gradient that is not finite ends the run, if that
        is the policy, and so do too many broken videos: on all hosts at the same step, for these
        are sums over all."""
        if self.pending is None:
            return
        with self.spans.measure("step"):
            values = jax.device_get(self.pending)
        self.pending = None
        bad = {n: float(t) for n, (t, _) in values.items() if not math.isfinite(float(t))}
        if bad:  # and none of it goes into the means
            self.not_finite.not_finite(self.pending_step, bad)
        else:
            self.not_finite.finite()
            for name, (total, count) in values.items():
                pair = np.array([total, count], np.float64)
                self.sums[name] = self.sums.get(name, 0) + pair
        broken, clips = values["broken"]
        self.broken, self.clips = self.broken + int(broken), self.clips + int(clips)
        if self.broken > self.max_broken * max(self.clips, _FEWEST_CLIPS):
            raise BrokenDataError(
                f"{self.broken} of {self.clips} clips were replaced, as their videos cannot be "
                f"decoded, more than data.max_broken={self.max_broken:g}: see above which, mend "
                "them or take them out of the list, or raise it; the same command then goes on"
            )

    def rolled_back(self, step: int, origin: int) -> None:
        """Takes that the weights after `step` are now those of step `origin`: what was told of the
        step under way leads nowhere, and the steps in between do not count."""
        self.pending = None
        told, _ = self._timed(step)
        self._keep("rollback", step, {"to": origin} | told)

    def _write(self, step: int) -> None:
        now = time.monotonic()
        if not self.sums:  # no step since the last line was finite
            self.last_time, self.last_step = now, step
            return
        means = {name: total / count for name, (total, count) in self.sums.items()}
        rate = self.batch * (step - self.last_step) / max(now - self.last_time, 1e-9)
        scalars = {f"train/{name}": value for name, value in means.items()}
        learning_rate = float(self.learning_rate)
        scalars |= {"train/learning_rate": learning_rate, "train/clips_per_second": rate}
        if self.not_finite.name == "skip":
            scalars["train/skipped"] = self.not_finite.skipped
            self.not_finite.skipped = 0
        told, sentence = self._timed(step)
        self._scalars(step, scalars | goodput.scalars(told))
        kept = {k.removeprefix("train/"): v for k, v in scalars.items()}
        self._keep("train", step, kept | told)
        if sentence:
            self.say(sentence)
        self.sums, self.last_time, self.last_step = {}, now, step
        left = (now - self.began) / max(step - self.start, 1) * (self.steps - step)
        shown = f"loss {means['loss']:.3f}  accuracy {means['accuracy']:.1f} %  {rate:.1f} clips/s"
        if self.bar.disable and self.first:
            print(f"step {step}/{self.steps}  {shown}  {_duration(left)} left", flush=True)
        else:
            self.bar.set_postfix_str(shown)  # which does nothing where it is not shown

    def _timed(self, step: int) -> tuple[dict[str, Any], str | None]:
        """Where the time since the last call went, and what is to be said of the input."""
        seconds, slowest = goodput.over_processes(self.spans.lap())
        sentence = self.watch.sentence(seconds, slowest) if self.watch else None
        told = goodput.told(seconds, step - self.timed_step)
        self.timed_step = step
        return told, sentence

    def validation(self, step: int, scalars: dict[str, float]) -> None:
        self._scalars(step, {f"val/{k}": v for k, v in scalars.items()})
        self._keep("val", step, scalars)
        text = "  ".join(f"{k} {v:.2f}" for k, v in scalars.items())
        self.say(f"step {step}/{self.steps}  validation: {text}")
        # The time a validation takes is none of the training's speed.
        self.last_time, self.last_step = time.monotonic(), step

    def begin(self, facts: dict[str, Any]) -> None:
        """Keeps what is about to run, and on what machine, in the history."""
        self._keep("start", self.start, facts | goodput.told(self.spans.lap(), 0))

    def _keep(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self.history is None:
            return
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
        try:
            self.history.line(kind, step, plain)
        except faults() as error:
            self._history_ends(error)

    def _history_ends(self, error: Exception) -> None:
        """A full disk, say: training does not need the history."""
        self.history = None
        self.say(f"the history of this run ends here: it cannot be written ({why(error)})")

    def say(self, text: str, everywhere: bool = False) -> None:
        """Prints a line; of many processes the first one does, or each `everywhere`."""
        if self.first or everywhere:
            tqdm.write(text if self.first else f"process {jax.process_index()}: {text}", sys.stdout)
            sys.stdout.flush()

    def text(self, name: str, text: str) -> None:
        if self.events is not None:
            self.events.write_texts(0, {name: text})

    def _scalars(self, step: int, scalars: dict[str, Any]) -> None:
        if self.events is not None:
            self.events.write_scalars(step, scalars)

    def close(self) -> None:
        self.bar.close()
        self._keep("end", self.pending_step, goodput.told(self.spans.lap(), 0))
        self.spans.close()
        if self.history is not None:
            try:
                self.history.close()
            except faults() as error:
                self._history_ends(error)
        if self.events is not None:
            self.events.close()


def _has_columns() -> bool:
    """Whether a live line can be shown; some terminals do not know their width."""
    return sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).columns > 0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


_numbers = itertools.count()  # two writers of one process have different files


class Events:
    """A writer of one event file. After a fault, a full disk say, it calls `say` once and ignores
    all later calls, so that training goes on."""

    def __init__(self, workdir: str | AnyPath, say: Callable[[str], None]) -> None:
        host, number = socket.gethostname(), next(_numbers)
        name = f"events.out.tfevents.{time.time():010.0f}.{host}.{os.getpid()}.{number}"
        self._path = to_path(workdir) / name
        self._say, self._ended = say, False
        self._records: RecordWriter | None = None  # made by the first write

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        self._write(step, [scalar_pb(name, float(value)) for name, value in scalars.items()])

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._write(step, [text_pb(name, text) for name, text in texts.items()])

    def close(self) -> None:
        if self._records is not None:
            self._attempt(self._records.close)

    def _write(self, step: int, summaries: list[Any]) -> None:
        now = time.time()
        self._attempt(self._append, [Event(wall_time=now, step=step, summary=s) for s in summaries])

    def _append(self, events: list[Event]) -> None:
        if self._records is None:
            local = is_local(self._path)
            self._records = RecordWriter(self._path.open("wb") if local else ObjectFile(self._path))
            events = [Event(wall_time=time.time(), file_version="brain.Event:2"), *events]
        for event in events:
            self._records.write(event.SerializeToString())
        self._records.flush()

    def _attempt(self, write: Callable[..., None], *args: Any) -> None:
        if self._ended:
            return
        try:
            write(*args)
        except faults() as error:
            self._ended = True
            reason = f"they cannot be written ({why(error)})"
            self._say(f"the TensorBoard events of this run end here: {reason}")
