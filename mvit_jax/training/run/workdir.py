"""The folder of one run: its frozen config, and whether a command may go on in it.

It holds:

    DIR/config.json     the config, frozen when the run began
    DIR/labels.txt      the names of the classes
    DIR/custom.json     digests of the source of custom modules, where the config names any
    DIR/checkpoints/    the last states
    DIR/best/           the state of the best validation
    DIR/damaged/        checkpoints that were found damaged
    DIR/validated.txt   the last step that was validated; DIR/.lock keeps a second start out
    DIR/metrics.jsonl   the history; DIR/events.* the same for TensorBoard
    DIR/evaluation*     what tests found, with clips*.json, confusion*.png, per_class*.png
    DIR/report.html     the page
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
from mvit_jax.common.files import AnyPath, faults, is_local, to_path, why, write_whole
from mvit_jax.config import Config, base, with_new_names

LOCK_SECONDS = 60
_VALIDATED = "validated.txt"
_CUSTOM = "custom.json"

# Keys that say where and how fast, not what: they may change when a run goes on.
MAY_CHANGE = (
    "data.folder", "data.threads", "data.processes", "data.timeout", "data.max_broken",
    "data.train_videos", "data.classes", "published",
    "mesh.", "remat", "checkpoint.", "log_every", "eval.batch", "on_nan",
)  # fmt: skip

# What Orbax writes last into a checkpoint in a bucket, where nothing can be renamed at once.
_COMPLETE = "commit_success.txt"

# Where and how fast each host reads its clips. All else must be the same in all processes of a run.
_OF_A_HOST = ("data.folder", "data.prefix", "data.threads", "data.processes", "data.timeout")


def decisive(config: ConfigDict) -> dict[str, Any]:
    """The values, by key, that decide what the processes of a run do together."""
    flat = _flat(json.loads(config.to_json()))
    return {key: value for key, value in flat.items() if key not in _OF_A_HOST}


def freeze(config: ConfigDict, workdir: str | AnyPath) -> None:
    """Writes the config on the first start; later, refuses a config that differs. Keys that are
    newer than the run have their defaults."""
    path = to_path(workdir) / "config.json"
    now = json.loads(config.to_json())
    if not path.exists():
        make(workdir)
        write_whole(path, json.dumps(now, indent=2) + "\n")
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
            "same values to go on with it, or choose another --workdir"
        )


def enter(
    workdir: str | AnyPath, config: Config, names: Sequence[str], digests: dict[str, str]
) -> None:
    """Makes the folder of a run, or checks that the one that is there is of the same run.

    Args:
      workdir: the folder.
      config: of the run.
      names: of the classes, which stand beside the weights for those who have no data.
      digests: of the source of custom modules (`training.custom`).

    Raises:
      UserError: the folder cannot be written, or holds a run with another config or source.
    """
    check_writable(workdir)
    freeze(config, workdir)
    labels, custom = to_path(workdir) / "labels.txt", to_path(workdir) / _CUSTOM
    if not labels.exists():
        write_whole(labels, "".join(f"{name}\n" for name in names))
    if changed := changed_modules(workdir, config, digests):
        raise UserError(
            f"{changed}: restore it, choose another --workdir, or delete {custom} to go on with "
            "the new source"
        )
    if digests and not custom.exists():
        write_whole(custom, json.dumps(digests, indent=1) + "\n")


def changed_modules(workdir: str | AnyPath, config: Config, digests: dict[str, str]) -> str | None:
    """Returns a sentence about custom modules whose source is not the recorded one, or None."""
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
    """Returns the recorded digests by kind of module; empty where a folder has none."""
    path = to_path(workdir) / _CUSTOM
    return read(path) if path.exists() else {}


def has_checkpoint(workdir: str | AnyPath) -> bool:
    """Whether there is something to go on with."""
    folder = to_path(workdir) / "checkpoints"
    return folder.is_dir() and any(
        child.name.isdigit() and (is_local(child) or (child / _COMPLETE).exists())
        for child in folder.iterdir()
    )


def frozen(workdir: str | AnyPath) -> Config:
    """Reads the config that a run was started with; newer keys have their defaults."""
    path = to_path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run: there is no config.json; check --workdir")
    started_with = ConfigDict(_tuples(with_new_names(read(path))))
    config = ConfigDict(base().to_dict())  # of plain values, which take any others
    config.update(started_with)
    return config.lock()


def read(path: AnyPath) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (*faults(), ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a config ({error}): restore it, or choose another --workdir"
        ) from None


def keep_validated(workdir: str | AnyPath, step: int) -> None:
    """Notes that the state after `step` was validated, and kept where it is the best."""
    write_whole(to_path(workdir) / _VALIDATED, f"{step}\n")


def validated(workdir: str | AnyPath) -> int:
    """The last step that was validated; 0 where none was, or it is not known."""
    try:
        return int((to_path(workdir) / _VALIDATED).read_text())
    except (*faults(), ValueError):
        return 0


@contextmanager
def locked(workdir: str | AnyPath, say: Callable[[str], None] = print) -> Iterator[None]:
    """Keeps others from training in the same folder, as far as its file system knows locks; buckets
    do not.

    A lock ends with its process, however that ends. One that a scheduler has just replaced may
    still be saving, so it is waited for.

    Raises:
      UserError: another process has the lock for `LOCK_SECONDS`.
    """
    path = to_path(workdir) / ".lock"
    if not is_local(path):
        yield
        return
    with path.open("a+") as file:
        until = time.monotonic() + LOCK_SECONDS
        waits = False
        while not _lock(file):
            file.seek(0)
            other = file.read().strip() or "another process"
            if time.monotonic() > until:
                raise UserError(f"{workdir} is in use: {other} trains there; end that first")
            if not waits:
                say(f"{other} still trains in {workdir}: waits until it has ended")
            waits = True
            time.sleep(0.5)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {platform.node()}")
        file.flush()
        yield


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def check_writable(workdir: str | AnyPath) -> None:
    """Writes a file and removes it: a run learns at its start what would end it at its first save.

    Raises:
      UserError: the folder cannot be written.
    """
    make(workdir)
    probe = to_path(workdir) / f".writable.{platform.node()}.{os.getpid()}"
    try:
        probe.write_text("")
        probe.unlink()
    except faults() as error:
        raise UserError(
            f"the workdir {workdir} cannot be written ({why(error)}): choose another "
            "--workdir, or mend its permissions"
        ) from None


def make(workdir: str | AnyPath) -> None:
    try:
        to_path(workdir).mkdir(parents=True, exist_ok=True)
    except faults() as error:
        raise UserError(
            f"the workdir {workdir} cannot be made ({why(error)}): choose another --workdir"
        ) from None


def _tuples(value: Any) -> Any:
    """JSON has lists where configs have tuples."""
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
