"""The training loop: load, step, log, checkpoint, validate."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from mvit_jax.common import errors
from mvit_jax.data.loader import Batch, WorkerError
from mvit_jax.data.media.video import decode_failure
from mvit_jax.data.source import Source, elements, video_of
from mvit_jax.training.distributed import coordination, sharding
from mvit_jax.training.run import profiling, workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.training.run.metrics import BrokenDataError, Logbook
from mvit_jax.training.run.preemption import StopRequest
from mvit_jax.training.state import Metrics, State

Step = Callable[[State, Any, np.float32], tuple[State, Metrics]]


@dataclass(frozen=True)
class Intervals:
    """The number of steps of a run, and its checkpoint and validation intervals.

    Attributes:
      steps: total number of steps of the run.
      checkpoint: steps between checkpoints; the last step is always saved.
      validation: steps between validations; the last step is always validated. 0 for no
        validation.
    """

    steps: int
    checkpoint: int
    validation: int

    def is_validation_step(self, step: int) -> bool:
        """Returns True if the state after `step` is to be validated."""
        return self.validation > 0 and (step == self.steps or step % self.validation == 0)

    def needs_validation(self, folder: str, start: int) -> bool:
        """Returns True if an earlier start saved step `start` but ended before validating it."""
        if self.validation == 0:
            return False
        validated = coordination.broadcast("validated", workdir.last_validation(folder))
        return start > 0 and start > validated and self.is_validation_step(start)


def train(
    state: State,
    step: Step,
    batches: Iterator[Batch],
    upkeep: "Upkeep",
    *,
    start: int,
    videos: Source,
    clip_frames: int,
    mesh: jax.sharding.Mesh,
    learning_rate: Callable[[int], float],
    stop: StopRequest,
    profile: profiling.Profile,
) -> int:
    """Trains from step `start` to the last step.

    Args:
      state: the state after step `start`.
      step: the jitted training step.
      batches: this process's rows of the batches after step `start`.
      upkeep: the work between steps: saves, validations and rollbacks.
      start: number of finished steps.
      videos: the training list, to name videos that cannot be decoded.
      clip_frames: frames of a clip.
      mesh: the device mesh.
      learning_rate: function from the number of finished steps to the learning rate.
      stop: the stop request, set by SIGINT and SIGTERM.
      profile: the profiler, which traces some of the steps.

    Returns:
      The exit status: 0 after the last step, 128 + the signal's number if stopped by a signal.

    Raises:
      UserError: loading a batch fails or times out, too many videos are broken, or the loss or the
        gradient is not finite.
    """
    done, log, steps = start, upkeep.log, upkeep.intervals.steps
    broken: set[int] = set()
    log.print(
        "loading the first batch and compiling the training step: about a minute for a small "
        "model, several for a large one, seconds if this program was compiled before"
    )
    while done < steps:
        batch = _next_batch(batches, stop, partial(upkeep.save_at_once, state, done))
        if batch is None:
            return _log_stop(log, done, steps, stop.signal)
        report_broken(log, videos, batch["broken"], broken, clip_frames)
        with log.spans.measure("step" if done > start else "compile"), profile.step(done + 1):
            rate = np.float32(learning_rate(done))
            began = time.monotonic()
            state, metrics = step(state, sharding.to_devices(batch, mesh), rate)
        if done == start:
            log.print(f"compiled in {time.monotonic() - began:.0f} s")
        done += 1
        try:
            log.step(done, metrics, rate)
            stop.agree(done)
            signal = stop.signal  # read once; a later signal takes effect after the next step
            state = upkeep.after_step(state, done, stopping=signal > 0)
        except BrokenDataError:  # raised by all processes at the same step, so all can save
            upkeep.save_at_once(state, done)
            raise
        if signal and done < steps:
            return _log_stop(log, done, steps, signal)
    upkeep.finish()
    if broken:
        names = {video_of(videos, i): videos.item(i) for i in sorted(broken, reverse=True)}
        log.print(
            f"{len(broken)} of the {len(videos)} {elements(videos)} could not be decoded and were "
            f"replaced by others: {', '.join(reversed(names.values()))}"
        )
    return 0


@dataclass(frozen=True)
class Upkeep:
    """The work between steps: checkpoints, validations and rollbacks.

    Attributes:
      intervals: the checkpoint and validation intervals.
      start: number of steps done before this start of the run.
      checkpoints: the run's checkpoints.
      log: the run's log, whose `on_nan` policy handles states that are not finite.
      evaluate: function that returns the metrics of a state on the validation list.
    """

    intervals: Intervals
    start: int
    checkpoints: Checkpoints
    log: Logbook
    evaluate: Callable[[State], dict[str, float]]

    def after_step(self, state: State, done: int, stopping: bool) -> State:
        """Saves or validates the state after step `done` if due, and rolls it back if not finite.

        The checkpoint comes before the validation, because a validation may outlast the grace
        period of a scheduler.

        Returns:
          The state to continue from.
        """
        intervals, end = self.intervals, done == self.intervals.steps
        validates = intervals.is_validation_step(done)
        saves = done % intervals.checkpoint == 0 or end or stopping or validates
        if saves:
            self.log.flush()  # detects a state that is not finite, which is never saved
        if self.log.nan_policy.rollback_reason:
            with self.log.spans.measure("checkpoint"):
                state, origin = self.log.nan_policy.roll_back(self.checkpoints, state, done)
            self.log.rolled_back(done, origin)
        if saves:
            with self.log.spans.measure("checkpoint"):
                self.checkpoints.save(state, done, end=end or stopping, log=self.log.print)
        if validates and (end or not stopping):
            self.validate(state, done)
        return state

    def validate(self, state: State, done: int) -> None:
        """Validates the state after step `done` and saves it if it is the best so far."""
        with self.log.spans.measure("validation"):
            results = self.evaluate(state)
        self.log.validation(done, results)
        with self.log.spans.measure("checkpoint"):
            score = results["map"] if "map" in results else results["top1"]
            self.checkpoints.save_if_best(state, done, score, self.log.print)
            self.checkpoints.wait_and_log(self.log.print)
        if coordination.is_process_0():
            try:
                workdir.record_validation(self.checkpoints.folder, done)
            except errors.UserError as error:  # for example a full disk
                self.log.print(f"{error}: the next start may validate step {done} again")

    def save_at_once(self, state: State, done: int) -> None:
        """Saves the state after step `done` before an error or a signal ends the run."""
        if done == self.start:
            return
        self.log.flush()
        if not self.log.nan_policy.rollback_reason:  # a state that is not finite is never saved
            self.checkpoints.save(state, done, end=True, log=self.log.print)

    def finish(self) -> None:
        """Blocks until the last checkpoint is on disk."""
        with self.log.spans.measure("checkpoint"):
            self.checkpoints.wait()


def _next_batch(
    batches: Iterator[Batch], stop: StopRequest, save: Callable[[], None]
) -> Batch | None:
    """Returns the next batch, or None if a signal has ended the loader's worker processes.

    Calls `save` before it returns None and, in a run of one process, before it raises `UserError`.
    """
    try:
        return next(batches)
    except (RuntimeError, errors.UserError) as error:
        # Ctrl-C may end worker processes during their start.
        if stop.signal and isinstance(error, RuntimeError | WorkerError):
            save()
            return None
        # With several processes, saving would block on the others.
        if isinstance(error, errors.UserError) and jax.process_count() == 1:
            save()
        raise


def _log_stop(log: Logbook, done: int, steps: int, signal: int) -> int:
    log.print(f"stopped at step {done} of {steps}; the same command resumes the run")
    return 128 + signal


def report_broken(
    log: Logbook, videos: Source, broken: np.ndarray, reported: set[int], clip_frames: int
) -> None:
    """Logs each broken video once, with the reason; adds its index to `reported`."""
    for index in {int(i) for i in broken if i >= 0} - reported:
        again = video_of(videos, index) in {video_of(videos, i) for i in reported}
        reported.add(index)
        if again:  # another key frame of the same video
            continue
        reason = decode_failure(videos.opened(index, clip_frames))
        log.print(
            f"{videos.item(index)} cannot be decoded ({reason}) and is replaced by another video; "
            f"repair it or remove it from {videos.list_file} ({len(reported)} broken so far)",
            everywhere=True,
        )
