"""Workdir of a run: its files, its recorded config, and checks before a run resumes.

Files:

    DIR/config.json     config, recorded at the first start
    DIR/labels.txt      class names
    DIR/custom.json     digests of the source of custom modules, if the config names any
    DIR/checkpoints/    last checkpoints
    DIR/best/           best checkpoint by validation
    DIR/damaged/        damaged checkpoints
    DIR/validated.txt   last validated step
    DIR/.lock           lock against a second start
    DIR/metrics.jsonl   history
    DIR/events.*        history for TensorBoard
    DIR/evaluation*     test results, with other files (`mvit_jax.evaluate`)
    DIR/profile/        profiler trace, if requested
    DIR/report.html     HTML report
"""

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from ml_collections import ConfigDict

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import (
    AnyPath,
    describe_error,
    io_errors,
    is_local,
    to_path,
    write_atomically,
)
from mvit_jax.config import Config, base, change, with_new_names

LOCK_SECONDS = 60
_VALIDATED = "validated.txt"
_CUSTOM = "custom.json"

# Keys that a resumed run may change: paths, speed, logging, and the handling of failures.
MAY_CHANGE = (
    "data.folder", "data.threads", "data.processes", "data.timeout", "data.max_broken",
    "data.train_videos", "data.classes", "published",
    "mesh.", "remat", "checkpoint.", "log_every", "eval.batch", "on_nan",
)  # fmt: skip

# Keys whose default is the behaviour before the key existed, while experiments in configs/ have
# another value: a run that does not record such a key keeps the default.
_OLD_BEHAVIOUR = ("optim.ema_warmup",)

# Orbax writes this file last into a checkpoint in a bucket, which has no atomic rename.
_COMPLETE = "commit_success.txt"

# Keys that may differ between hosts. All other keys must be equal in all processes of a run.
_OF_A_HOST = ("data.folder", "data.prefix", "data.threads", "data.processes", "data.timeout")


def shared_values(config: ConfigDict) -> dict[str, Any]:
    """Returns the config values, by key, that must be equal in all processes of a run."""
    flat = _flat(json.loads(config.to_json()))
    return {key: value for key, value in flat.items() if key not in _OF_A_HOST}


def record_config(config: ConfigDict, workdir: str | AnyPath) -> None:
    """Writes the config at the first start, and compares it at later starts.

    Keys that are newer than the run have their defaults. Keys in `MAY_CHANGE` may differ.

    Raises:
      UserError: another key differs, or the file cannot be read or written.
    """
    path = to_path(workdir) / "config.json"
    now = json.loads(config.to_json())
    if not path.exists():
        make(workdir)
        write_atomically(path, json.dumps(now, indent=2) + "\n")
        return
    older = _flat(json.loads(base().to_json()))
    before, now = older | _flat(with_new_names(read(path))), _flat(now)
    differing = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(differing)}): start with the "
            "same values to resume this run, or choose another --workdir"
        )


def with_recorded_behaviour(config: Config, *folders: str | AnyPath | None) -> Config:
    """Returns the config of a run that resumes, with old behaviour where its folder records no key.

    Args:
      config: the config of this start.
      folders: the workdir, and the workdir of another run that it resumes from (`config.resume`).
        The first that has a config counts.
    """
    paths = [to_path(folder) / "config.json" for folder in folders if folder is not None]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return config
    recorded = _flat(with_new_names(read(path)))
    now, defaults = (_flat(json.loads(c.to_json())) for c in (config, base()))
    old = {
        key: defaults[key]
        for key in _OLD_BEHAVIOUR
        if key not in recorded and now[key] != defaults[key]
    }
    if old:
        config = config.copy_and_resolve_references()
        change(config, old)
    return config


def prepare(
    workdir: str | AnyPath, config: Config, names: Sequence[str], digests: dict[str, str]
) -> None:
    """Creates the workdir of a run, or checks that the existing one belongs to the same run.

    Args:
      workdir: the folder.
      config: the run's config.
      names: class names, written into the workdir for use without the data.
      digests: digests of the source of custom modules (`training.custom`).

    Raises:
      UserError: the folder cannot be written, or holds a run with another config, classes or
        source.
    """
    check_writable(workdir)
    record_config(config, workdir)
    custom = to_path(workdir) / _CUSTOM
    _keep_labels(workdir, names)
    if changed := changed_modules(workdir, config, digests):
        raise UserError(
            f"{changed}: restore the source, choose another --workdir, or delete {custom} to "
            "resume with the new source"
        )
    if digests and not custom.exists():
        write_atomically(custom, json.dumps(digests, indent=1) + "\n")


def _keep_labels(workdir: str | AnyPath, names: Sequence[str]) -> None:
    """Writes labels.txt, or raises `UserError` if the run was trained with other class names."""
    file = to_path(workdir) / "labels.txt"
    content = "".join(f"{name}\n" for name in names)
    try:
        before = file.read_text(encoding="utf-8") if file.exists() else ""
    except (*io_errors(), ValueError) as error:
        raise UserError(f"{file} cannot be read ({describe_error(error)}): restore it") from None
    stripped = [[line.strip() for line in text.splitlines()] for text in (before, content)]
    if stripped[0] == stripped[1]:
        return
    if not before or not has_checkpoint(workdir):
        write_atomically(file, content)
        return
    if sorted(stripped[0]) == sorted(stripped[1]):
        problem = f"the data's labels.txt has the classes of {file} in another order"
    else:
        pairs = zip(*stripped, strict=False)
        old, new = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
        problem = f"the data's labels.txt has other classes than {file}" + (
            f", such as {new!r} instead of {old!r}" if old != new else ""
        )
    raise UserError(
        f"{problem}, so labels would mean other classes: use the labels.txt of this run to resume "
        "it, or choose another --workdir"
    )


def changed_modules(workdir: str | AnyPath, config: Config, digests: dict[str, str]) -> str | None:
    """Returns a sentence on custom modules with changed source since the run's start, or None."""
    recorded = custom_digests(workdir)
    changed = [
        f"model.{kind}={config.model[kind]}"
        for kind, digest in digests.items()
        if recorded.get(kind, digest) != digest
    ]
    if not changed:
        return None
    return f"the source of {' and '.join(changed)} has changed since this run was started"


def custom_digests(workdir: str | AnyPath) -> dict[str, str]:
    """Returns the recorded digests by kind of module; empty if the folder has none."""
    path = to_path(workdir) / _CUSTOM
    return read(path) if path.exists() else {}


def has_checkpoint(workdir: str | AnyPath) -> bool:
    """Returns True if the workdir has a complete checkpoint to resume from."""
    folder = to_path(workdir) / "checkpoints"
    return folder.is_dir() and any(
        child.name.isdigit() and (is_local(child) or (child / _COMPLETE).exists())
        for child in folder.iterdir()
    )


def recorded_config(workdir: str | AnyPath) -> Config:
    """Returns the recorded config of a run; keys newer than the run have their defaults."""
    path = to_path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run (it has no config.json): check --workdir")
    started_with = ConfigDict(_tuples(with_new_names(read(path))))
    config = ConfigDict(base().to_dict())  # without placeholders, to accept values of any type
    config.update(started_with)
    return config.lock()


def read(path: AnyPath) -> dict[str, Any]:
    """Reads a JSON file of a workdir.

    Raises:
      UserError: the file cannot be read or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return values
    except (*io_errors(), ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a config ({error}): restore it, or choose another --workdir"
        ) from None


def record_validation(workdir: str | AnyPath, step: int) -> None:
    """Records that the state after `step` was validated, and saved if it is the best."""
    write_atomically(to_path(workdir) / _VALIDATED, f"{step}\n")


def last_validation(workdir: str | AnyPath) -> int:
    """Returns the last validated step; 0 if there is none or the file cannot be read."""
    try:
        return int((to_path(workdir) / _VALIDATED).read_text())
    except (*io_errors(), ValueError):
        return 0


@contextmanager
def lock(workdir: str | AnyPath, log: Callable[[str], None] = print) -> Iterator[None]:
    """Locks the workdir against other training processes.

    Buckets and some file systems have no locks; the block then runs without a lock. A lock ends
    with its process, also after a kill. A process that a scheduler has just replaced may still be
    saving, so this blocks for up to `LOCK_SECONDS`.

    Raises:
      UserError: another process still has the lock after `LOCK_SECONDS`.
    """
    path = to_path(workdir) / ".lock"
    if not is_local(path):
        yield
        return
    with path.open("a+") as file:
        until = time.monotonic() + LOCK_SECONDS
        logged = False
        while not _try_lock(file):
            file.seek(0)
            other = file.read().strip() or "another process"
            if time.monotonic() > until:
                raise UserError(
                    f"{workdir} is in use by {other}: end it, or choose another --workdir"
                )
            if not logged:
                log(f"{workdir} is still in use by {other}: waiting until it ends")
            logged = True
            time.sleep(0.5)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    return True


def check_writable(workdir: str | AnyPath) -> None:
    """Creates the workdir if missing, and checks that it is writable.

    Raises:
      UserError: the folder cannot be written.
    """
    make(workdir)
    probe = to_path(workdir) / f".writable.{platform.node()}.{os.getpid()}"
    try:
        probe.write_text("")
        probe.unlink()
    except io_errors() as error:
        raise UserError(
            f"the workdir {workdir} cannot be written ({describe_error(error)}): choose another "
            "--workdir, or fix its permissions"
        ) from None


def make(workdir: str | AnyPath) -> None:
    """Creates the workdir and its parents.

    Raises:
      UserError: the folder cannot be created.
    """
    try:
        to_path(workdir).mkdir(parents=True, exist_ok=True)
    except io_errors() as error:
        raise UserError(
            f"the workdir {workdir} cannot be created ({describe_error(error)}): choose another "
            "--workdir"
        ) from None


def _tuples(value: Any) -> Any:
    """Converts JSON's lists to the tuples of configs."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
