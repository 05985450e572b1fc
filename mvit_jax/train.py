"""The training program, top to bottom.

    python -m mvit_jax.train --config=configs/moving_digits.py --workdir=DIR
    python -m mvit_jax.train --config=configs/moving_digits.py:vit --workdir=DIR \\
        --config.optim.lr=1e-3
    python -m mvit_jax.train --config=configs/kinetics.py:mvit_b_16x4 --dry_run
    python -m mvit_jax.train --config=configs/moving_digits.py --contact_sheet=FILE.png
    python -m mvit_jax.train --config=configs/moving_digits.py --workdir=DIR --profile

Started again with the same command after any stop, it goes on where it was and ends with the same
parameters as if never stopped. Ctrl-C or SIGTERM finishes the step, saves, and exits with status
128 + the signal's number. --contact_sheet trains nothing: it draws the first clips as the model
would get them. --profile traces steps 10 to 15 after the start, --profile=FIRST:LAST others, into
DIR/profile, for TensorBoard or xprof.

Compiled programs are kept (`training.compiled`), so that a second start need not compile again.
"""

import importlib.metadata
import itertools
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

import mvit_jax
from mvit_jax import errors
from mvit_jax.data import pipeline
from mvit_jax.data.decoding import why_broken
from mvit_jax.data.sources import Source
from mvit_jax.models import host_memory
from mvit_jax.models.cost import cost
from mvit_jax.models.plan import MViTConfig
from mvit_jax.training import (
    compiled,
    contact_sheet,
    dry_run,
    evaluation,
    experiment,
    jitted,
    profiling,
    runs,
    sharding,
    workdir,
)
from mvit_jax.training.checkpoints import Checkpoints
from mvit_jax.training.experiment import Config
from mvit_jax.training.logbook import Logbook, NotFiniteError
from mvit_jax.training.step import State

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment: configs/NAME.py[:arg].")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder; made where it is missing.", allow_override=True
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the whole plan and start nothing.")
_SHEET = flags.DEFINE_string(
    "contact_sheet", None, "Draw the first training clips into this picture, and stop."
)


class _Steps(flags.ArgumentParser):
    """Of a flag that is given alone, or as --profile=FIRST:LAST."""

    def parse(self, argument: str) -> tuple[int, int] | None:
        alone = {"true": (profiling.FIRST, profiling.LAST), "false": None}
        word = argument.lower()
        return alone[word] if word in alone else profiling.window(argument)


_PROFILE = flags.DEFINE(
    _Steps(),
    "profile",
    None,
    "Trace these steps of this start, FIRST:LAST, into DIR/profile; alone, steps 10 to 15.",
    boolean=True,
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise errors.UserError(f"unknown argument {argv[1]!r}: flags look like --workdir=DIR")
    plans = _DRY_RUN.value or _SHEET.value is not None
    if _CONFIG.value is None or (_WORKDIR.value is None and not plans):
        raise errors.UserError("give --config=configs/moving_digits.py and --workdir=DIR")
    try:
        _CONFIG.value.lock()
    except OSError:  # what config_flags keeps of a file that it could not load
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        raise errors.UserError(f"there is no config file {path}: check --config") from None
    if _DRY_RUN.value:
        print(dry_run.describe(_CONFIG.value, jax.device_count()))
    if _SHEET.value is not None:
        print(f"wrote {contact_sheet.draw(_CONFIG.value, _SHEET.value)}")
    if _WORKDIR.value is None or plans:
        return
    try:
        compiled.keep()
        if jax.default_backend() == "cpu":
            host_memory.keep_freed_memory()
        sys.exit(train(_CONFIG.value, _WORKDIR.value, _PROFILE.value))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise errors.UserError(
            f"batch={_CONFIG.value.batch} does not fit into memory: lower batch (rates follow it "
            "where optim.lr_batch is set, else lower optim.lr with it), or raise accumulate"
        ) from error


def train(config: Config, folder: str, profile: tuple[int, int] | None = None) -> int:
    """Trains as `config` says in the workdir `folder`; returns the exit status.

    Of this start, the steps from the first to the last of `profile` are traced.
    """
    experiment.check(config)
    experiment.check_start(config)
    jax.config.update("jax_default_matmul_precision", config.precision)
    videos = experiment.videos(config, "train")
    watched = config.data.val_list and config.eval.every_epochs > 0
    validation = experiment.videos(config, "val") if watched else None
    if validation and validation.class_names != videos.class_names:
        raise errors.UserError(
            f"{validation.list_file} has {len(validation.class_names)} classes and "
            f"{videos.list_file} {len(videos.class_names)}, or they have other names: make both of "
            "the same labels.txt"
        )
    model = experiment.model_config(config, len(videos.class_names))
    experiment.clip_settings(config, model)  # a crop that cannot be cut is told at once
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    experiment.check_batch(config, mesh.size)
    started = workdir.has_checkpoint(folder)
    initial = None if started else initial_params(config, model)  # before anything is written
    workdir.freeze(config, folder, experiment.base())
    workdir.keep_labels(folder, videos.class_names)

    steps = experiment.steps(config, config.epochs, videos)
    with jax.set_mesh(mesh), closing(Checkpoints(folder, config.checkpoint.keep)) as checkpoints:
        step_function, predict, schedule, state = jitted.build(config, model, videos, mesh)
        state, origin = first(config, state, checkpoints, initial)
        start = int(state.step)
        if start >= steps:
            print(
                f"the run in {folder} is complete ({start} of {steps} steps): test it with "
                f"python -m mvit_jax.evaluate --workdir={folder}, or train anew in another workdir"
            )
            return 0
        log = Logbook(
            folder, start=start, steps=steps, batch=config.batch, every=config.log_every,
            max_broken=config.data.max_broken,
        )  # fmt: skip
        with (
            closing(log),
            StopRequest() as stop,
            profiling.Profile(folder, profile, start=start, steps=steps, say=log.say) as trace,
        ):
            introduce(log, config, model, state, videos, mesh, start, steps)
            log.say(origin)
            batches = load(videos, config, model, mesh, start, steps)
            validate_every = experiment.steps(config, config.eval.every_epochs, videos)
            broken: set[int] = set()
            done = start
            try:
                for done, batch in zip(itertools.count(start + 1), batches, strict=False):
                    report_broken(log, videos, batch["broken"], broken, model.frames)
                    state, metrics = trace.step(
                        done, step_function, state, sharding.to_devices(batch, mesh)
                    )
                    log.step(done, metrics, np.asarray(schedule(done - 1)).item())

                    if validation and (done % validate_every == 0 or done == steps):
                        log.flush()  # a state that is not finite is never kept
                        results = validate(config, model, state, validation, predict, mesh)
                        log.validation(done, results)
                        checkpoints.save_if_best(state, done, results.get("map", results["top1"]))
                    if done % config.checkpoint.every == 0 or done == steps or stop.signal:
                        log.flush()
                        checkpoints.save(state, done)
                    if stop.signal and done < steps:
                        checkpoints.wait()
                        log.say(f"stopped at step {done} of {steps}; the same command goes on")
                        return 128 + stop.signal
            except RuntimeError:  # workers that Ctrl-C ended while they started
                if not stop.signal:
                    raise
                if done > start:
                    log.flush()
                    checkpoints.save(state, done)
                log.say(f"stopped at step {done} of {steps}; the same command goes on")
                return 128 + stop.signal
            except NotFiniteError:
                raise
            except errors.UserError:  # of the data, say: what was trained is kept
                if done > start:
                    log.flush()
                    checkpoints.save(state, done)
                raise
            if broken:
                log.say(
                    f"{len(broken)} of the {len(videos)} videos could not be decoded and were "
                    f"replaced: {', '.join(videos.item(i) for i in sorted(broken))}"
                )
            log.say(f"trained {steps} steps; the last checkpoint is in {folder}/checkpoints")
    report(folder)  # when all else is on disk
    return 0


def initial_params(config: Config, model: MViTConfig) -> tuple[Any, str] | None:
    """The weights that a new run starts from, where the config names some, made to fit."""
    if config.resume is not None:
        experiment.check_resume(config, model)
        return None
    return None if config.init.checkpoint is None else experiment.initial_params(config, model)


def first(
    config: Config, fresh: State, checkpoints: Checkpoints, initial: tuple[Any, str] | None
) -> tuple[State, str]:
    """The state to start from, and where it came from: this workdir's own, else that of the run
    `config.resume`, else fresh with the weights of `config.init`, else fresh."""
    state = checkpoints.restore(fresh)
    if state is not None:
        return state, "goes on with this workdir's last checkpoint"
    if config.resume is not None:
        with closing(Checkpoints(config.resume)) as others:
            state = others.restore(fresh)
        assert state is not None  # `check_resume` has seen it
        return state, f"goes on with the last checkpoint of {config.resume}"
    if initial is None:
        return fresh, "starts from fresh weights"
    params, words = initial
    return jitted.with_params(fresh, params), words


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
    )
    metrics = scores.metrics()
    return {name: metrics[name] for name in ("map", "top1", "top5") if name in metrics} | {
        "videos": metrics["videos"],
        "seconds": time.monotonic() - began,
    }


def introduce(log: Logbook, config, model, state, videos, mesh, start, steps) -> None:
    """Says once what is about to run."""
    from clu import parameter_overview

    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    log.text("parameters", f"```\n{overview}\n```")
    log.text("config", f"```\n{config}\n```")
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    log.say(
        f"{config.model.variant}: {parameters:,} parameters, clips of {model.frames} x "
        f"{model.size}^2, {len(videos):,} videos of {len(videos.class_names)} classes, "
        f"{mesh.shape['data']} x {mesh.shape['fsdp']} devices ({jax.default_backend()})"
    )
    log.say(f"from step {start} to {steps}" + (" (resumed)" if start else ""))
    log.begin({
        "command": command(),
        "steps": steps,
        "parameters": parameters,
        "multiply_adds": cost(model).multiply_adds,
        "videos": len(videos),
        "classes": len(videos.class_names),
        "backend": jax.default_backend(),
        "devices": mesh.size,
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")}
        | {"mvit_jax": mvit_jax.__version__},
    })  # fmt: skip


def command() -> str | None:
    """What was typed to start this program; None where another one called `train`."""
    if Path(sys.argv[0]).name != Path(__file__).name:
        return None
    return shlex.join(["python", "-m", "mvit_jax.train", *sys.argv[1:]])


def report_broken(
    log: Logbook, videos: Source, broken: np.ndarray, known: set[int], clip_frames: int
) -> None:
    """Says once for each video that it could not be decoded and was replaced."""
    for index in {int(i) for i in broken if i >= 0} - known:
        known.add(index)
        reason = why_broken(videos.opened(index, clip_frames))
        log.say(
            f"{videos.item(index)} cannot be decoded ({reason}) and is replaced by another video; "
            f"mend it or take it out of {videos.list_file} ({len(known)} such so far)"
        )


def report(folder: str) -> None:
    """Writes the run's page, as far as there is something to tell before a test."""
    if jax.process_index() > 0:
        return
    try:
        print(f"wrote {runs.write_report(folder)}")
    except Exception as error:  # whatever it is: the training is done, and its status is its own
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        print(f"the report {folder}/{runs.REPORT} could not be written: {first}")


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a wish that the loop reads after each step."""

    def __enter__(self) -> "StopRequest":
        self.signal = 0
        self._before: dict[int, Any] = {
            s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt  # asked twice at the keyboard: at once
        self.signal = number

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    errors.run(main)
