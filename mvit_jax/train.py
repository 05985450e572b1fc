r"""The training command: flags, setup, and the call of the training loop (`training.loop`).

    python -m mvit_jax.train --config=configs/moving_digits.py --workdir=DIR
    python -m mvit_jax.train --config=configs/moving_digits.py:vit --workdir=DIR \
        --config.optim.lr=1e-3
    python -m mvit_jax.train --config=configs/kinetics.py:mvit_b_16x4 --dry_run
    python -m mvit_jax.train --config=configs/moving_digits.py --contact_sheet=FILE.png
    python -m mvit_jax.train --config=configs/moving_digits.py --workdir=DIR --profile

The same command resumes a stopped run and ends with the parameters of an uninterrupted run.
On Ctrl-C or SIGTERM the program finishes the step, saves a checkpoint and exits with status
128 + the signal's number.

--contact_sheet draws the first training clips after all augmentation, without training. --profile
traces steps 10 to 15 of this start into DIR/profile, for TensorBoard or xprof;
--profile=FIRST:LAST traces other steps.

Compiled programs are cached on disk (`training.run.runtime`): a second start need not recompile.

On several hosts the same command runs in every process. Cloud TPUs, SLURM and Kubernetes are
detected; elsewhere pass --coordinator, --num_processes and --process_id. A signal to one process
stops all processes after the same step. An error in one process ends all processes, and each prints
the message.
"""

import functools
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Generator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
from absl import flags

import mvit_jax
from mvit_jax.analysis import contact_sheet, run_data
from mvit_jax.common import errors, files
from mvit_jax.common.text import first_line
from mvit_jax.config import Config, check, check_start, define_flag
from mvit_jax.data.source import Source, class_notes, elements, fingerprint
from mvit_jax.models.functional import Functional
from mvit_jax.training import build, custom, dry_run, loop
from mvit_jax.training.distributed import coordination, failure, launch
from mvit_jax.training.evaluation.testing import validate
from mvit_jax.training.loop import Intervals, Upkeep
from mvit_jax.training.optimizer import partition
from mvit_jax.training.run import goodput, history, profiling, runtime, workdir
from mvit_jax.training.run.checkpoints import Checkpoints, has_hanging_threads
from mvit_jax.training.run.metrics import Logbook
from mvit_jax.training.run.preemption import StopRequest
from mvit_jax.training.run_folder import check_resume, initial_params
from mvit_jax.training.state import State, with_params

_CONFIG = define_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the run; created if missing.", allow_override=True
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan of the experiment and exit.")
_SHEET = flags.DEFINE_string(
    "contact_sheet", None, "Draw the first training clips into this image file and exit."
)


class _ProfileParser(flags.ArgumentParser):
    """Parser of --profile, with or without =FIRST:LAST."""

    def parse(self, argument: str) -> tuple[int, int] | None:
        switches = {"true": (profiling.FIRST, profiling.LAST), "false": None}
        value = argument.lower()
        return switches[value] if value in switches else profiling.window(argument)


_PROFILE = flags.DEFINE(
    _ProfileParser(),
    "profile",
    None,
    "Trace steps FIRST:LAST, counted from this start, into DIR/profile; 10:15 without a value.",
    boolean=True,
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise errors.UserError(f"unknown argument {argv[1]!r}: flags look like --workdir=DIR")
    plans = _DRY_RUN.value or _SHEET.value is not None
    if _CONFIG.value is not None:
        errors.lock(_CONFIG.value)
    if _CONFIG.value is None or (_WORKDIR.value is None and not plans):
        raise errors.UserError("give --config=configs/moving_digits.py and --workdir=DIR")
    if _DRY_RUN.value:
        print(dry_run.describe(_CONFIG.value, jax.device_count()), flush=True)
        build.device_mesh(_CONFIG.value)  # raises as training does
    if _SHEET.value is not None:
        print(f"wrote {contact_sheet.draw(_CONFIG.value, _SHEET.value)}")
    if _WORKDIR.value is None or plans:
        return
    runtime.run_in_calling_thread()
    launch.start()
    runtime.cache_compiled_programs()
    with failure.fail_together():
        if jax.default_backend() == "cpu":
            runtime.keep_freed_memory()
        status = train(_CONFIG.value, _WORKDIR.value, _PROFILE.value)
    if has_hanging_threads() and jax.process_count() == 1:
        errors.exit_at_once(status)
    sys.exit(status)


@contextmanager
def explain_out_of_memory(batch: int) -> Generator[None, None, None]:
    """Turns XLA's out-of-memory error into a `UserError` that names the batch."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise errors.UserError(
            f"batch={batch} does not fit into memory: raise accumulate, or lower batch (learning "
            "rates scale with it if optim.lr_batch is set; otherwise lower optim.lr as well)"
        ) from error


def train(config: Config, folder: str, profile: tuple[int, int] | None = None) -> int:
    """Trains the experiment `config` in the workdir `folder`.

    Args:
      config: the experiment.
      folder: the workdir: a new folder, or the workdir of the run to resume.
      profile: first and last step to trace, counted from 1 at this start; None for no trace.

    Returns:
      The exit status: 0 after the last step, 128 + the signal's number if stopped by a signal.

    Raises:
      UserError: the config, the data or the workdir is invalid, the batch does not fit into
        memory, too many videos are broken, or the loss is not finite.
    """
    spans = goodput.Spans()
    check(config)
    check_start(config)
    resumed = workdir.with_recorded_behaviour(config, folder, config.resume)
    if resumed is not config and config.optim.ema > 0:
        coordination.print_once("optim.ema_warmup is off: this run was started before that key")
    config = resumed
    coordination.check_equal("config", workdir.shared_values(config))
    videos, validation = lists(config)
    run = build.training(config, videos)
    settings, mesh, program = run.settings, run.mesh, run.program
    intervals = Intervals(run.steps, config.checkpoint.every, run.validation_steps)
    started = workdir.has_checkpoint(folder)
    # Initial weights are read first, so that a read error leaves no new workdir.
    names = videos.class_names
    initial = None if started else initial_weights(config, settings.model, names)
    with coordination.process_0_first("workdir", files.to_path(folder) / "config.json"):
        workdir.prepare(folder, config, names, custom.digests(config))
    with (
        jax.set_mesh(mesh),
        jax.default_matmul_precision(config.precision),
        workdir.lock(folder) if coordination.is_process_0() else nullcontext(),
        closing(Checkpoints(folder, config.checkpoint.keep, tidy=True)) as checkpoints,
        # Inside `closing`, because closing the checkpoints may block on other processes.
        failure.fail_together(),
        explain_out_of_memory(config.batch),
    ):
        state, origin = initial_state(config, program.initial_state(), checkpoints, initial)
        start = int(state.step)
        unvalidated = intervals.needs_validation(folder, start)
        if start >= intervals.steps and not unvalidated:
            coordination.print_once(
                f"the run in {folder} is complete ({start} of {intervals.steps} steps): test it "
                f"with python -m mvit_jax.evaluate --workdir={folder}, or use another --workdir"
            )
            return 0
        with (
            closing(open_logbook(config, folder, start, intervals.steps, spans)) as log,
            StopRequest(start) as stop,
            profiling.Profile(
                folder, profile, start=start, steps=intervals.steps, log=log.print
            ) as trace,
        ):
            if start:
                log_list_changes(log, folder, videos, intervals.steps)
            log_start(log, config, settings.model, state, videos, mesh, start, intervals.steps)
            log.print(origin)
            for sentence in build.warnings(config, len(videos)):
                log.print(f"warning: {sentence}")
            evaluate = functools.partial(
                validate,
                predict=program.predict,
                videos=validation or videos,  # `validate` is not called without a list
                settings=settings.clips,
                protocol=settings.validation,
                mesh=mesh,
                loader=settings.loader,
            )
            upkeep = Upkeep(intervals, start, checkpoints, log, evaluate)
            if unvalidated:
                upkeep.validate(state, start)
            status = loop.train(
                state, program.step, spans.measure_waits(run.batches(start)), upkeep,
                start=start, videos=videos, clip_frames=settings.model.config.frames, mesh=mesh,
                learning_rate=run.learning_rate, stop=stop, profile=trace,
            )  # fmt: skip
            if status:
                return status
            log.print(
                f"trained {intervals.steps} steps; the last checkpoint is in {folder}/checkpoints"
            )
    report(folder)  # after the history and the checkpoints are on disk
    return 0


def lists(config: Config) -> tuple[Source, Source | None]:
    """Opens the training and the validation list; the latter is None without validation.

    Raises:
      UserError: a list cannot be read, the two lists differ in their classes, or a list differs
        between processes.
    """
    videos = build.videos(config, "train")
    coordination.check_equal("list of videos", fingerprint(videos))
    if not config.data.val_list or config.eval.every_epochs <= 0:
        return videos, None
    validation = build.videos(config, "val")
    if validation.class_names != videos.class_names:
        raise errors.UserError(
            f"{validation.list_file} ({len(validation.class_names)} classes) and "
            f"{videos.list_file} ({len(videos.class_names)} classes) differ in their classes: use "
            "the same labels.txt for both"
        )
    coordination.check_equal("list of validation videos", fingerprint(validation))
    return videos, validation


def initial_weights(
    config: Config, model: Functional, class_names: tuple[str, ...] | None = None
) -> tuple[Any, str] | None:
    """Reads the initial weights of `config.init`, adapted to `model`, and checks `config.resume`.

    The classifier is new or reordered if the weights were trained with other `class_names`.

    Returns:
      Parameters and a summary for the log; None if `config.init` names no weights or the run
      resumes from another (`config.resume`).
    """
    if config.resume:
        check_resume(config.resume, model, config, class_names)
        return None
    if not config.init.checkpoint:
        return None
    c = config.init
    return initial_params(c.checkpoint, model, c.inflate, class_names, c.weights)


def initial_state(
    config: Config, fresh: State, checkpoints: Checkpoints, initial: tuple[Any, str] | None
) -> tuple[State, str]:
    """Returns the state to start from and a sentence for the log about its origin.

    The origin is the first of these that exists: the workdir's last checkpoint, the last
    checkpoint of the run `config.resume`, the weights of `config.init`, fresh weights.

    Args:
      config: the experiment.
      fresh: the newly initialised state.
      checkpoints: the workdir's checkpoints.
      initial: the result of `initial_weights`.
    """
    state = checkpoints.resume(fresh, coordination.print_once)
    if state is not None:
        return state, "resumes from this workdir's last checkpoint"
    if config.resume:
        with closing(Checkpoints(config.resume)) as previous:
            state = previous.restore(fresh)
        assert state is not None  # guaranteed by `check_resume`
        return state, f"resumes from the last checkpoint of {config.resume}"
    if initial is None:
        return fresh, "starts from fresh weights"
    params, origin = initial
    return with_params(fresh, params), origin


def open_logbook(
    config: Config, folder: str, start: int, steps: int, spans: goodput.Spans
) -> Logbook:
    """Opens the log of a run, which also warns of slow loading and suggests other settings."""
    watch = goodput.InputWatch(
        threads=config.data.threads,
        processes=config.data.processes,
        packed=config.data.source == "shards",
        randaugment=bool(config.augment.randaugment),
    )
    return Logbook(
        folder, start=start, steps=steps, batch=config.batch, every=config.log_every,
        max_broken=config.data.max_broken, on_nan=config.on_nan, spans=spans, watch=watch,
    )  # fmt: skip


def log_start(log: Logbook, config, model, state, videos, mesh, start, steps) -> None:
    """Logs config, parameters, data, devices and versions at the start of a run."""
    from clu import parameter_overview

    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    log.text("parameters", f"```\n{overview}\n```")
    log.text("config", f"```\n{config}\n```")
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    parts = partition(state.params, config.optim.trained_blocks)
    trained = sum(x.size for x in jax.tree.leaves(parts[0]))
    of_these = f" ({trained:,} of them trained)" if trained < parameters else ""
    log.print(
        f"{config.model.variant}: {parameters:,} parameters{of_these}, "
        f"clips of {model.config.frames} x {model.config.size}^2, "
        f"{len(videos):,} {elements(videos)} of "
        f"{len(videos.class_names)} classes, "
        f"{mesh.shape['data']} x {mesh.shape['fsdp']} devices ({jax.default_backend()})"
    )
    for note in class_notes(videos):
        log.print(f"note: {note}")
    log.print(f"from step {start} to {steps}" + (" (resumed)" if start else ""))
    log.begin({
        "command": command(),
        "steps": steps,
        "parameters": parameters,
        "trained_parameters": trained,
        "multiply_adds": model.cost().multiply_adds,
        "videos": len(videos),
        "list_checksum": fingerprint(videos)["names in order"],
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


def log_list_changes(log: Logbook, folder: str, videos: Source, steps: int) -> None:
    """Logs that the training list is not that of the run's last start."""
    if not log.first or not (starts := history.read(folder).starts):
        return
    before, count = starts[-1], len(videos)
    checksum = fingerprint(videos)["names in order"]
    if before.get("videos", count) != count:
        end = f": it ends after step {steps} instead of {before['steps']}"
        log.print(
            f"note: {videos.list_file} has {count:,} videos, and had {before['videos']:,} at the "
            "last start of this run" + (end if before.get("steps", steps) != steps else "")
        )
    elif before.get("list_checksum", checksum) != checksum:
        log.print(f"note: {videos.list_file} names other videos than at the last start of this run")


def command() -> str | None:
    """Returns the command line of this program; None if another program called `train`."""
    if Path(sys.argv[0]).name != Path(__file__).name:
        return None
    return shlex.join(["python", "-m", "mvit_jax.train", *sys.argv[1:]])


def report(folder: str) -> None:
    """Prints the goodput and writes the run's HTML report, in process 0 only.

    A failure is printed and does not change the exit status of the training.
    """
    if jax.process_index() > 0:
        return
    try:
        if sentence := history.goodput_sentence(history.read(folder)):
            print(sentence)
        print(f"wrote {run_data.write_report(folder)}")
    except Exception as error:  # the training itself has succeeded
        print(f"the report {folder}/{run_data.REPORT} could not be written: {first_line(error)}")


if __name__ == "__main__":
    errors.run(main)
