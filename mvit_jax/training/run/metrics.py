"""Metric logging: TensorBoard event files, `metrics.jsonl`, and the console.

The console shows a progress bar on a terminal, and plain lines elsewhere. Event files are written
with TensorBoard's protocol buffers and need no TensorFlow.
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
from mvit_jax.common.files import AnyPath, describe_error, io_errors, is_local, to_path
from mvit_jax.training.run import goodput, history, nan_policy
from mvit_jax.training.run.history import ObjectFile
from mvit_jax.training.state import Metrics


class BrokenDataError(UserError):
    """The share of videos that cannot be decoded is above `data.max_broken`."""


# The limit on broken videos is applied to at least this many clips, as few clips are no sample.
_FEWEST_CLIPS = 200


class Logbook:
    """Metric logger of a run; averages the metrics of steps over intervals.

    Args:
      workdir: the run's workdir.
      start: number of steps done before this start of the run.
      steps: total number of steps of the run.
      batch: clips per step, over all processes.
      every: steps per log interval.
      max_broken: share of clips with decode failures above which the run ends.
      on_nan: one of `nan_policy.POLICIES`.
      spans: the timer of the phases; by default a new one.
      watch: source of warnings about slow loading; None for no warnings.
    """

    def __init__(
        self, workdir: str | AnyPath, *, start: int, steps: int, batch: int, every: int,
        max_broken: float = 1.0, on_nan: str = "stop", spans: goodput.Spans | None = None,
        watch: goodput.InputWatch | None = None,
    ):  # fmt: skip
        # Only process 0 writes: all processes have the same means, and a file needs one writer.
        self.first = jax.process_index() == 0
        self.events = Events(workdir, self.print) if self.first else None
        self.history = history.Writer(workdir) if self.first else None
        self.bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True,
            disable=not (self.first and _has_columns()),
        )  # fmt: skip
        self.start, self.steps, self.batch, self.every = start, steps, batch, every
        self.max_broken, self.broken, self.clips = max_broken, 0, 0
        self.nan_policy = nan_policy.Policy(on_nan, self.print)
        self.spans, self.watch, self.timed_step = spans or goodput.Spans(), watch, start
        self.pending: Metrics | None = None  # of the last dispatched step, which may still run
        self.pending_step = start
        self.sums: dict[str, np.ndarray] = {}
        self.began = self.last_time = time.monotonic()
        self.last_step = start

    def step(self, step: int, metrics: Metrics, learning_rate: Any) -> None:
        """Registers the metrics of a dispatched step, and reads the metrics of earlier steps."""
        self.spans.register_step(metrics)
        self.flush()
        self.pending, self.pending_step = metrics, step
        self.learning_rate = learning_rate
        self.bar.update(step - self.bar.n)
        if step % self.every == 0 or step == self.steps:
            self.flush()
            self._write(step)

    def flush(self) -> None:
        """Blocks until the last dispatched step has ended, and adds its metrics to the means.

        The metrics are sums over all processes, so all processes raise at the same step.

        Raises:
          NotFiniteError: a loss, gradient or weight is not finite, and the policy ends the run.
          BrokenDataError: too many videos cannot be decoded.
        """
        if self.pending is None:
            return
        with self.spans.measure("step"):
            values = jax.device_get(self.pending)
        self.pending = None
        bad = {n: float(t) for n, (t, _) in values.items() if not math.isfinite(float(t))}
        if bad:  # a step with non-finite values is left out of the means
            self.nan_policy.report_non_finite(self.pending_step, bad)
        else:
            self.nan_policy.report_finite()
            for name, (total, count) in values.items():
                pair = np.array([total, count], np.float64)
                self.sums[name] = self.sums.get(name, 0) + pair
        broken, clips = values["broken"]
        self.broken, self.clips = self.broken + int(broken), self.clips + int(clips)
        if self.broken > self.max_broken * max(self.clips, _FEWEST_CLIPS):
            raise BrokenDataError(
                f"{self.broken} of {self.clips} clips were replaced because their videos cannot be "
                f"decoded, more than data.max_broken={self.max_broken:g}: repair the videos logged "
                "above, remove them from the list, or raise the limit, and start the same command"
            )

    def rolled_back(self, step: int, origin: int) -> None:
        """Records a rollback to the checkpoint of step `origin`; drops the pending metrics."""
        self.pending = None
        columns, _ = self._lap(step)
        self._append_line("rollback", step, {"to": origin} | columns)

    def _write(self, step: int) -> None:
        now = time.monotonic()
        if not self.sums:  # no step of the interval was finite
            self.last_time, self.last_step = now, step
            return
        means = {name: total / count for name, (total, count) in self.sums.items()}
        rate = self.batch * (step - self.last_step) / max(now - self.last_time, 1e-9)
        scalars = {f"train/{name}": value for name, value in means.items()}
        learning_rate = float(self.learning_rate)
        scalars |= {"train/learning_rate": learning_rate, "train/clips_per_second": rate}
        if self.nan_policy.name == "skip":
            scalars["train/skipped"] = self.nan_policy.skipped
            self.nan_policy.skipped = 0
        columns, warning = self._lap(step)
        self._scalars(step, scalars | goodput.scalars(columns))
        values = {k.removeprefix("train/"): v for k, v in scalars.items()}
        self._append_line("train", step, values | columns)
        if warning:
            self.print(warning)
        self.sums, self.last_time, self.last_step = {}, now, step
        left = (now - self.began) / max(step - self.start, 1) * (self.steps - step)
        summary = (
            f"loss {means['loss']:.3f}  accuracy {means['accuracy']:.1f} %  {rate:.1f} clips/s"
        )
        if self.bar.disable and self.first:
            print(f"step {step}/{self.steps}  {summary}  {_duration(left)} left", flush=True)
        else:
            self.bar.set_postfix_str(summary)  # no effect on a disabled bar

    def _lap(self, step: int) -> tuple[dict[str, Any], str | None]:
        """Returns the timing columns since the last call, and a warning about the input or None."""
        seconds, slowest = goodput.reduce_over_processes(self.spans.lap())
        warning = self.watch.sentence(seconds, slowest) if self.watch else None
        columns = goodput.history_columns(seconds, step - self.timed_step)
        self.timed_step = step
        return columns, warning

    def validation(self, step: int, scalars: dict[str, float]) -> None:
        """Logs the metrics of a validation after `step`."""
        self._scalars(step, {f"val/{k}": v for k, v in scalars.items()})
        self._append_line("val", step, scalars)
        text = "  ".join(f"{k} {_number(v)}" for k, v in scalars.items())
        self.print(f"step {step}/{self.steps}  validation: {text}")
        # The time of a validation is excluded from the training throughput.
        self.last_time, self.last_step = time.monotonic(), step

    def begin(self, facts: dict[str, Any]) -> None:
        """Writes the "start" line of the history: facts on the program, the run and the machine."""
        self._append_line("start", self.start, facts | goodput.history_columns(self.spans.lap(), 0))

    def _append_line(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self.history is None:
            return
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
        try:
            self.history.line(kind, step, plain)
        except io_errors() as error:
            self._stop_history(error)

    def _stop_history(self, error: Exception) -> None:
        """Logs a write error, such as a full disk, and stops the history; training continues."""
        self.history = None
        self.print(
            f"the history of this run ends here: it cannot be written ({describe_error(error)})"
        )

    def print(self, text: str, everywhere: bool = False) -> None:
        """Prints a line in process 0; in every process if `everywhere`."""
        if self.first or everywhere:
            tqdm.write(text if self.first else f"process {jax.process_index()}: {text}", sys.stdout)
            sys.stdout.flush()

    def text(self, name: str, text: str) -> None:
        """Writes a text to TensorBoard."""
        if self.events is not None:
            self.events.write_texts(0, {name: text})

    def _scalars(self, step: int, scalars: dict[str, Any]) -> None:
        if self.events is not None:
            self.events.write_scalars(step, scalars)

    def close(self) -> None:
        """Writes the "end" line of the history, and closes all files."""
        self.bar.close()
        self._append_line("end", self.pending_step, goodput.history_columns(self.spans.lap(), 0))
        self.spans.close()
        if self.history is not None:
            try:
                self.history.close()
            except io_errors() as error:
                self._stop_history(error)
        if self.events is not None:
            self.events.close()


def _number(value: int | float) -> str:
    """Formats a metric: counts are whole numbers, other values have two decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _has_columns() -> bool:
    """Returns True if stderr is a terminal with a known width, which a progress bar needs."""
    return sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).columns > 0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


_numbers = itertools.count()  # gives two writers in one process different file names


class Events:
    """Writer of one TensorBoard event file.

    Training continues after a write error, such as a full disk: the error is logged once, and later
    calls are ignored.
    """

    def __init__(self, workdir: str | AnyPath, log: Callable[[str], None]) -> None:
        host, number = socket.gethostname(), next(_numbers)
        name = f"events.out.tfevents.{time.time():010.0f}.{host}.{os.getpid()}.{number}"
        self._path = to_path(workdir) / name
        self._log, self._ended = log, False
        self._records: RecordWriter | None = None  # opened by the first write

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
        except io_errors() as error:
            self._ended = True
            reason = f"they cannot be written ({describe_error(error)})"
            self._log(f"the TensorBoard events of this run end here: {reason}")
