"""The steps of a training run, one after the other, and what is done between them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from mvit_jax.common import errors
from mvit_jax.data import pipeline
from mvit_jax.data.source import Source
from mvit_jax.data.video import why_broken
from mvit_jax.models.plan import MViTConfig
from mvit_jax.training import evaluation, experiment
from mvit_jax.training.distributed import coordination, sharding
from mvit_jax.training.experiment import Config
from mvit_jax.training.run import goodput, profiling, workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.training.run.metrics import BrokenDataError, Logbook
from mvit_jax.training.run.preemption import StopRequest
from mvit_jax.training.step import State


@dataclass
class Loop:
    """The steps of one start, and what is done between them."""

    config: Config
    model: MViTConfig
    mesh: jax.sharding.Mesh
    videos: Source
    validation: Source | None
    step: Callable[..., Any]
    predict: Callable[..., Any]
    schedule: Callable[[int], Any]
    checkpoints: Checkpoints
    log: Logbook
    spans: goodput.Spans
    stop: StopRequest
    trace: profiling.Profile
    start: int
    steps: int
    owed: bool  # whether an earlier start has left the validation of `start` to this one

    def __post_init__(self) -> None:
        self.done = self.start

    def run(self, state: State) -> int:
        """Trains from `start` to `steps`; returns the exit status, 0 when all are done."""
        if self.owed:
            self.validate(state)
        batches = self.spans.waiting(self.batches()) if self.done < self.steps else iter(())
        broken: set[int] = set()
        while self.done < self.steps:
            batch = self.next_batch(batches, state)
            if batch is None:
                return self.stopped(self.stop.signal)
            report_broken(self.log, self.videos, batch["broken"], broken, self.model.frames)
            with self.spans.measure("step" if self.done > self.start else "compile"):
                batch = sharding.to_devices(batch, self.mesh)
                state, metrics = self.trace.step(self.done + 1, self.step, state, batch)
            self.done += 1
            try:
                self.log.step(self.done, metrics, partial(self.schedule, self.done - 1))
                self.stop.agree(self.done)
                asked = self.stop.signal  # once: what comes after this is for the next step
                state = self.after(state, asked > 0)
            except BrokenDataError:  # in all processes at the same step
                self.save_at_once(state)
                raise
            if asked and self.done < self.steps:
                return self.stopped(asked)
        with self.spans.measure("checkpoint"):
            self.checkpoints.wait()
        if broken:
            self.log.say(
                f"{len(broken)} of the {len(self.videos)} videos could not be decoded and were "
                f"replaced: {', '.join(self.videos.item(i) for i in sorted(broken))}"
            )
        return 0

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        return load(self.videos, self.config, self.model, self.mesh, self.start, self.steps)

    def next_batch(
        self, batches: Iterator[dict[str, np.ndarray]], state: State
    ) -> dict[str, np.ndarray] | None:
        """None where a signal has ended the workers that load. What was trained is kept."""
        try:
            return next(batches)
        except RuntimeError:  # workers that Ctrl-C ended while they started
            if not self.stop.signal:
                raise
            self.save_at_once(state)
            return None
        except errors.UserError:
            if jax.process_count() == 1:  # one alone of many would wait for the others
                self.save_at_once(state)
            raise

    def after(self, state: State, asked: bool) -> State:
        """Saves the state after a step, and validates it, where that is due. What is saved comes
        first, as a validation may take longer than a scheduler waits."""
        end = self.done == self.steps
        validates = self.validation and validation_due(self.config, self.videos, self.done, end)
        saves = self.done % self.config.checkpoint.every == 0 or end or asked or validates
        if saves:
            self.log.flush()  # a state that is not finite is never kept
        if self.log.not_finite.found:
            with self.spans.measure("checkpoint"):
                state, origin = self.log.not_finite.roll_back(self.checkpoints, state, self.done)
            self.log.rolled_back(self.done, origin)
        if saves:
            with self.spans.measure("checkpoint"):
                self.checkpoints.save(state, self.done, end=end or asked, say=self.log.say)
        if validates and (end or not asked):
            self.validate(state)
        return state

    def validate(self, state: State) -> None:
        assert self.validation is not None
        with self.spans.measure("validation"):
            results = validate(
                self.config, self.model, state, self.validation, self.predict, self.mesh
            )
        self.log.validation(self.done, results)
        with self.spans.measure("checkpoint"):
            score = results.get("map", results["top1"])
            self.checkpoints.save_if_best(state, self.done, score, self.log.say)
            self.checkpoints.settle(self.log.say)
        if coordination.first():
            try:
                workdir.keep_validated(self.checkpoints.folder, self.done)
            except errors.UserError as error:  # a full disk, say
                self.log.say(f"{error}: the next start may validate step {self.done} once more")

    def save_at_once(self, state: State) -> None:
        """Keeps what was trained, where something else ends the run."""
        if self.done == self.start:
            return
        self.log.flush()
        if not self.log.not_finite.found:  # a state that is not finite is never kept
            self.checkpoints.save(state, self.done, end=True, say=self.log.say)

    def stopped(self, number: int) -> int:
        self.log.say(f"stopped at step {self.done} of {self.steps}; the same command goes on")
        return 128 + number


def validation_due(config: Config, videos: Source, step: int, end: bool) -> bool:
    return end or step % experiment.steps(config, config.eval.every_epochs, videos) == 0


def owes_validation(config: Config, folder: str, videos: Source, step: int, end: bool) -> bool:
    """Whether an earlier start was stopped after it had saved `step`, and before it validated."""
    validated = coordination.from_first("validated", workdir.validated(folder))
    return step > 0 and step > validated and validation_due(config, videos, step, end)


def load(
    videos: Source, config: Config, model: MViTConfig, mesh: jax.sharding.Mesh,
    start: int, steps: int,
) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
    return pipeline.train_batches(
        videos,
        experiment.clip_settings(config, model),
        seed=config.seed,
        batch=config.batch,
        steps=steps,
        start=start,
        rows=sharding.local_rows(config.batch, mesh),
        repeats=config.data.repeats,
        threads=config.data.threads,
        processes=config.data.processes,
        timeout=config.data.timeout,
    )


def validate(
    config: Config, model: MViTConfig, state: State, videos: Source, predict, mesh
) -> dict[str, float]:
    """One centre clip of every validation video, with the averaged weights where there are any."""
    began = time.monotonic()
    [scores] = evaluation.evaluate(
        predict,
        state.params if state.ema is None else state.ema,
        videos,
        experiment.clip_settings(config, model),
        clips=(1,),
        crops=1,
        batch=config.eval.batch,
        mesh=mesh,
        max_broken=config.data.max_broken,
        threads=config.data.threads,
        processes=config.data.processes,
        timeout=config.data.timeout,
    )
    metrics = scores.metrics()
    return {name: metrics[name] for name in ("map", "top1", "top5") if name in metrics} | {
        "videos": metrics["videos"],
        "seconds": time.monotonic() - began,
    }


def report_broken(
    log: Logbook, videos: Source, broken: np.ndarray, known: set[int], clip_frames: int
) -> None:
    """Says once for each video that it could not be decoded and was replaced."""
    for index in {int(i) for i in broken if i >= 0} - known:
        known.add(index)
        reason = why_broken(videos.opened(index, clip_frames))
        log.say(
            f"{videos.item(index)} cannot be decoded ({reason}) and is replaced by another video; "
            f"mend it or take it out of {videos.list_file} ({len(known)} such so far)",
            everywhere=True,
        )
