"""Checkpoints by Orbax: saved asynchronously and atomically, sharded as the state.

Digests verify each checkpoint when it is restored (`training.run.checksums`).
"""

import functools
import json
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils

from mvit_jax.common.errors import HungError, UserError
from mvit_jax.common.files import AnyPath, io_errors, is_local, to_path
from mvit_jax.common.text import first_line
from mvit_jax.models.functional import first_difference
from mvit_jax.training.distributed import coordination
from mvit_jax.training.run import checksums
from mvit_jax.training.state import State

# Failed saves in a row after which a run ends.
FAILED_SAVES = 3
_FOLDERS = {"last": "checkpoints", "best": "best"}
_DIGESTS = "digests"
_DIGESTS_FILE = "digests.json"
_TOP1 = "top1"
# TensorStore's errors for a file that may be intact: a temporary fault, or missing permissions.
_NOT_DAMAGE = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED"
)


class DamagedError(UserError):
    """A checkpoint that cannot be read, or differs from its digests."""


class NotSavedError(HungError):
    """A failure to write a checkpoint, on a full disk for example. See `has_hanging_threads`."""


def has_hanging_threads() -> bool:
    """Returns True if threads of a failed save are alive; they block Python's exit for minutes."""
    return any(type(thread).__name__ == "_SignalingThread" for thread in threading.enumerate())


class Checkpoints:
    """The last checkpoints of a run, and its best checkpoint.

    The items of a checkpoint are "params" (nested as in the model), "ema" (averaged parameters, if
    on), "training" (the step and the optimiser's state), and "digests". Older checkpoints without
    digests are restored unverified.
    """

    def __init__(self, workdir: str | AnyPath, keep: int = 1, *, tidy: bool = False) -> None:
        """Opens the checkpoints of a workdir.

        Args:
          workdir: the workdir of the run; its folders are made if missing.
          keep: number of last checkpoints that are not deleted.
          tidy: removes partial saves of earlier starts; for the program that saves.
        """
        if tidy:
            _suppress_tensorstore_tracebacks()
        folder = to_path(workdir)
        self.folder, self.keep = folder.absolute() if is_local(folder) else folder, keep
        self.last = self._open_manager("last", tidy)
        self.best = self._open_manager("best", tidy)
        self.best_top1 = self._top1_on_disk()
        self._under_way: dict[str, int] = {}  # the step of each save in progress
        self._failed = 0  # failed saves in a row

    # Writing.

    def save(
        self, state: State, step: int, *, end: bool = False, log: Callable[[str], None] = print
    ) -> None:
        """Saves a state in the background; its buffers may be donated at once.

        A failed save, on a full disk for example, is logged. Training continues and the next save
        retries, as an exit would lose the steps since the last checkpoint.

        Args:
          state: the state after `step`.
          step: the number of steps done.
          end: blocks until the state is saved, and retries once; for the last save of a run.
          log: called with a sentence for each failure.

        Raises:
          NotSavedError: the save with `end` failed twice, `FAILED_SAVES` saves in a row failed, or
            any save failed in a run of several processes. Earlier checkpoints are intact.
        """
        self.wait_and_log(log)
        if step in self.last.all_steps():
            return
        error = self._start_save("last", _items(state), step)
        if end:
            error = error or self._finish_save("last")
            if error:  # partial files are removed by now, and some faults are temporary
                log(f"{error}; retrying once")
                error = self._start_save("last", _items(state), step) or self._finish_save("last")
            if error:
                raise error
        self._log_or_raise(error, log)

    def save_params(self, params: Any) -> None:
        """Saves the parameters of a converted model as step 0, without a training state."""
        error = self._start_save("last", {"params": params}, 0)
        if error:
            raise error

    def save_if_best(
        self, state: State, step: int, top1: float, log: Callable[[str], None] = print
    ) -> None:
        """Saves a state as best checkpoint if `top1` (mAP if multi-label) exceeds all before it."""
        # A run that is killed after this save, before the validation is recorded, validates the
        # state again. Then `top1` equals the best, and the state is not saved twice.
        if self.best_top1 is None or top1 > self.best_top1:
            self._log_or_raise(self._finish_save("best"), log)
            self.best_top1 = top1
            error = self._start_save("best", _items(state), step, top1)
            self._log_or_raise(error, log)

    def wait_and_log(self, log: Callable[[str], None] = print) -> None:
        """Blocks until all saves are on disk, and logs failures.

        Raises:
          NotSavedError: `FAILED_SAVES` saves in a row have failed, or a save in a run of several
            processes.
        """
        for which in ("best", "last"):
            self._log_or_raise(self._finish_save(which), log)

    def wait(self) -> None:
        """Blocks until all saves are on disk.

        Raises:
          NotSavedError: a save failed.
        """
        errors = [self._finish_save(which) for which in _FOLDERS]
        for error in filter(None, errors):
            raise error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            for manager in (self.last, self.best):
                manager.close()

    def _start_save(self, which: str, items: dict[str, Any], step: int, top1: float | None = None):
        """Starts a save; returns the error if it fails at once.

        `top1` is stored with the digests. Orbax would store metrics in a separate file, and could
        not open the folder if this file were damaged.
        """
        self._under_way[which] = step
        args: dict[str, Any] = {n: ocp.args.StandardSave(item) for n, item in items.items()}
        digests: dict[str, Any] = {name: checksums.digests(item) for name, item in items.items()}
        digests |= {} if top1 is None else {_TOP1: top1}
        args[_DIGESTS] = ocp.args.JsonSave(digests | {"crc32": _crc32(digests)})
        if self._failed:  # threads of the failed save may have written after its cleanup
            self._remove_partial_saves(which)
        try:
            manager = self._manager(which)
            manager.save(step, args=ocp.args.Composite(**args), force=True)
        except Exception as error:
            return self._clean_up(which, error)
        return None

    def _finish_save(self, which: str) -> NotSavedError | None:
        """Blocks until a save is on disk; returns the error if it failed."""
        if which not in self._under_way:
            return None
        try:
            self._manager(which).wait_until_finished()
        except Exception as error:
            return self._clean_up(which, error)
        del self._under_way[which]
        if self._failed:  # their threads may have written after the cleanup
            self._remove_partial_saves(which)
        self._failed = 0
        return None

    def _log_or_raise(self, error: NotSavedError | None, log: Callable[[str], None]) -> None:
        """Logs a failed save; raises after `FAILED_SAVES` failures in a row."""
        if error is None:
            return
        if self._failed >= FAILED_SAVES:
            raise NotSavedError(f"{error}; {self._failed} saves in a row have failed") from error
        log(f"{error}; training continues, and the next save retries")

    def _clean_up(self, which: str, error: Exception) -> NotSavedError:
        """Removes the files of a failed save, reopens its manager, and returns the error."""
        step = self._under_way.pop(which)
        self._failed += 1
        folder = self.folder / _FOLDERS[which]
        reason = _disk_error(error, folder)
        sentence = f"the checkpoint {folder}/{step} could not be written ({reason})"
        if jax.process_count() > 1:  # Orbax's managers can only be reopened by all processes
            raise NotSavedError(
                f"{sentence}: the same command resumes from the previous checkpoint"
            ) from error
        # A manager that has failed raises the same error again, and loses its list of checkpoints.
        with suppress(Exception):
            self._manager(which).close()
        self._remove_partial_saves(which)
        setattr(self, which, self._open_manager(which, tidy=False))
        self.best_top1 = self._top1_on_disk()
        before = self._manager(which).latest_step()
        intact = (
            "there is no earlier checkpoint"
            if before is None
            else f"the checkpoint of step {before} is intact"
        )
        problem = NotSavedError(f"{sentence}; {intact}")
        problem.__cause__ = error
        return problem

    def _remove_partial_saves(self, which: str) -> None:
        """Removes the files of failed saves from a local disk, as the next save needs the space."""
        if not is_local(self.folder):  # buckets have space, and Orbax removes the files itself
            return
        for partial in (self.folder / _FOLDERS[which]).glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)

    # Reading.

    def restore(self, like: State, step: int | None = None) -> State | None:
        """Restores a state in the shapes, dtypes and shardings of `like`.

        Args:
          like: a state of arrays or of their shapes.
          step: the checkpoint's step; by default the newest.

        Returns:
          The state; None if there is no checkpoint.

        Raises:
          UserError: the architecture or optimiser differs, or the files are not accessible.
          DamagedError: the checkpoint is damaged.
        """
        step = self.last.latest_step() if step is None else step
        if step is None:
            return None
        read = self._read("last", step, _items(like))
        return State(params=read["params"], ema=read.get("ema"), **read["training"])

    def resume(self, like: State, log: Callable[[str], None] = print) -> State | None:
        """Restores the newest checkpoint that is not damaged; all processes must call this.

        Newer, damaged checkpoints are moved to DIR/damaged and logged.

        Raises:
          UserError: as for `restore`, or all checkpoints are damaged. In the latter case none is
            moved.
        """
        damaged: list[tuple[int, DamagedError]] = []
        steps = coordination.broadcast("checkpoints", sorted(self.last.all_steps(), reverse=True))
        if steps:  # a network file system may still cache the folder without the newest
            coordination.wait_for_file(self.folder / _FOLDERS["last"] / str(steps[0]))
            self.last.reload()
        for step in steps:
            try:
                state = self.restore(like, step)
            except DamagedError as error:
                damaged.append((step, error))
                continue
            for bad, error in damaged:
                target = self._move_to_damaged(bad)
                log(f"{error}: moved to {target}; training resumes from step {step}")
            return state
        if damaged:
            problems = "; ".join(str(error) for _, error in damaged)
            raise UserError(
                f"no checkpoint is left to resume from: {problems}; restore one from a copy, or "
                "start a new run in another --workdir"
            )
        return None

    def restore_params(self, like: Any, which: str = "last", item: str = "params") -> Any:
        """Restores the parameters of the "last" or "best" checkpoint.

        Args:
          like: parameters or their shapes, with the shardings of the result.
          which: "last" or "best".
          item: "params", or "ema" for averaged parameters.

        Raises:
          UserError: there is no checkpoint, or the architecture differs.
          DamagedError: the checkpoint is damaged.
        """
        step = self._existing_step(which)
        coordination.check_equal("workdir", {"checkpoint": step})
        try:
            return self._read(which, step, {item: like})[item]
        except DamagedError as error:
            raise DamagedError(
                f"{error}: move its folder away to use the previous checkpoint, if there is one"
            ) from error

    def read_params(self, which: str = "last", item: str = "params") -> Any:
        """Returns the parameters of a checkpoint as NumPy arrays, for any architecture."""
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), self.shapes(which, item))
        return self.restore_params(like, which, item)

    def shapes(self, which: str = "last", item: str = "params") -> Any:
        """Returns the shapes and dtypes of a checkpoint's parameters, nested as the parameters."""
        step = self._existing_step(which)
        structure = self._structure(which, step)
        if item not in structure:
            raise DamagedError(f"{self._name(which, step)} is incomplete: it has no {item}")
        return structure[item]

    def has_training(self) -> bool:
        """Returns True if the last checkpoint has a training state besides the parameters."""
        return "training" in self._structure("last", self._existing_step("last"))

    def step(self, which: str = "last") -> int | None:
        """Returns the step of the newest "last" or of the "best" checkpoint."""
        return self._manager(which).latest_step()

    def _read(self, which: str, step: int, items: dict[str, Any]) -> Any:
        """Restores and verifies items in the shapes, dtypes and shardings of `items`."""
        error: UserError | None = None
        try:
            self._check_items(which, step, items)
        except UserError as problem:
            error = problem
        self._raise_together(which, step, error)
        targets = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        read: Any = None
        try:
            manager = self._manager(which)
            read = manager.restore(step, args=ocp.args.Composite(**targets))
        except Exception as problem:
            error = self._unreadable(which, step, problem)
        self._raise_together(which, step, error)
        digests = self._digests(which, step)
        mismatches = [] if digests is None else [
            f"{name}/{path}"
            for name in items
            if (path := checksums.first_mismatch(read[name], digests[name]))
        ]  # fmt: skip
        if mismatches:
            name = self._name(which, step)
            error = DamagedError(f"{name} is damaged: {mismatches[0]} does not match its checksum")
        self._raise_together(which, step, error)
        return read

    def _raise_together(self, which: str, step: int, error: UserError | None = None) -> None:
        """Raises in all processes if any process has an error.

        If a process dies during the collective restore, this collective fails too. So the death is
        not mistaken for an unreadable file.
        """
        if not _on_all_processes(error is None):
            raise error or DamagedError(
                f"{self._name(which, step)} cannot be read in another process"
            )

    def _check_items(self, which: str, step: int, items: dict[str, Any]) -> None:
        structure = self._structure(which, step)
        if "params" not in structure:
            raise DamagedError(f"{self._name(which, step)} is incomplete: it has no parameters")
        for name in items:
            self._check_structure(which, step, name, items[name], structure.get(name, {}))

    def _check_structure(self, which: str, step: int, name: str, like: Any, saved: Any) -> None:
        if name == "training":
            like, saved = checksums.by_path(like), checksums.by_path(saved)
            kind = "optimiser"
        else:
            kind = "architecture"
        difference = first_difference(like, saved)
        if difference:
            raise UserError(
                f"{self._name(which, step)} is for another {kind}: {difference}; use the config "
                "that it was trained with, or another --workdir"
            )

    def _structure(self, which: str, step: int) -> dict[str, Any]:
        """Returns the shapes and dtypes of each item; "training" is flat, by path."""
        digests = self._digests(which, step)
        if digests is None:
            try:
                metadata = self._manager(which).item_metadata(step)
                return {
                    name: checksums.by_path(item) if name == "training" else item
                    for name, item in metadata.items()
                    if item is not None and name != _DIGESTS
                }
            except Exception as error:
                raise self._unreadable(which, step, error) from error
        shapes = {
            name: {
                path: jax.ShapeDtypeStruct(tuple(tensor["shape"]), tensor["dtype"])
                for path, tensor in tensors.items()
            }
            for name, tensors in digests.items()
        }
        return {
            name: tensors if name == "training" else unflatten_dict(tensors, sep="/")
            for name, tensors in shapes.items()
        }

    def _digests(self, which: str, step: int) -> Mapping[str, Any] | None:
        """Returns digests by item and path; None for an older checkpoint without digests."""
        content = self._read_digests(which, step)
        return None if content is None else {k: v for k, v in content.items() if k != _TOP1}

    def _read_digests(self, which: str, step: int) -> dict[str, Any] | None:
        """Reads the file of digests, which also has the top-1 of a best checkpoint."""
        folder = self.folder / _FOLDERS[which] / str(step)
        path = folder / _DIGESTS / _DIGESTS_FILE
        try:
            if not path.parent.exists():
                contents = folder / "_CHECKPOINT_METADATA"  # Orbax's list of all items
                if not contents.exists() or f'"{_DIGESTS}"' not in contents.read_text():
                    return None
            content = json.loads(path.read_text())
            if content.pop("crc32") == _crc32(content):
                return content
        except (*io_errors(), ValueError, KeyError) as error:
            raise self._unreadable(which, step, error) from error
        raise DamagedError(
            f"{self._name(which, step)} is damaged: {path.name} does not match its checksum"
        )

    def _unreadable(self, which: str, step: int, error: Exception) -> UserError:
        kind = UserError if _NOT_DAMAGE.search(str(error)) else DamagedError
        if isinstance(error, MemoryError | PermissionError):
            kind = UserError
        if isinstance(error, io_errors()) and not isinstance(error, OSError):  # a bucket's error
            kind = UserError
        problem = kind(f"{self._name(which, step)} cannot be read ({first_line(error)})")
        problem.__cause__ = error
        return problem

    def _move_to_damaged(self, step: int) -> AnyPath:
        """Moves a checkpoint to DIR/damaged; damaged checkpoints are never deleted."""
        source = self.folder / _FOLDERS["last"] / str(step)
        folder = self.folder / "damaged"
        target = next(
            path
            for n in range(1000)
            if not (path := folder / (f"{step}.{n}" if n else f"{step}")).exists()
        )
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            source.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged {step}")
        self.last.reload()
        return target

    def _name(self, which: str, step: int) -> str:
        return f"the checkpoint {self.folder}/{_FOLDERS[which]}/{step}"

    def _existing_step(self, which: str) -> int:
        step = self.step(which)
        if step is None:
            raise UserError(
                f"there is no checkpoint in {self.folder}/{_FOLDERS[which]}: train first (the best "
                "checkpoint needs validation), or check --workdir"
            )
        return step

    def _manager(self, which: str) -> ocp.CheckpointManager:
        return self.last if which == "last" else self.best

    def _open_manager(self, which: str, tidy: bool) -> ocp.CheckpointManager:
        keep = self.keep if which == "last" else 1
        items = ("params", "training", "ema")
        return _Manager(
            self.folder / _FOLDERS[which],
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=tidy,
                max_to_keep=keep,
                # The last and the best checkpoint of a step are saved concurrently. Without
                # different prefixes the barriers of several processes would collide.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    barrier_sync_key_prefix=which
                ),
            ),
            # Registered explicitly, so that shapes can be read before an item is restored.
            item_handlers={name: ocp.StandardCheckpointHandler() for name in items}
            | {_DIGESTS: ocp.JsonCheckpointHandler(_DIGESTS_FILE)},
        )

    def _top1_on_disk(self) -> float | None:
        """Returns the top-1 of the best checkpoint; None if missing or not readable."""
        step = self.best.latest_step()
        if step is None:
            return None
        older = self.folder / _FOLDERS["best"] / str(step) / "metrics" / "metrics"
        try:
            content = self._read_digests("best", step)
            return json.loads(older.read_text())["top1"] if content is None else content.get(_TOP1)
        except (UserError, *io_errors(), ValueError, KeyError, TypeError):
            return None


@functools.cache
def _suppress_tensorstore_tracebacks() -> None:
    """Suppresses TensorStore's "Event loop is closed" tracebacks after a failed write.

    Orbax closes the event loop when a write fails. Each of the other writes then prints a
    traceback: about a hundred in all, which hide the message that matters.
    """
    hook = sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    sys.unraisablehook = filtered


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # The training loop checks for preemption itself, with rising steps. Orbax also checks from
        # a thread that finishes the save of an earlier step. JAX would then agree to stop at a step
        # that has already passed.
        return False


def _items(state: State) -> dict[str, Any]:
    items = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state},
    }
    return items if state.ema is None else items | {"ema": state.ema}


def _crc32(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _on_all_processes(ok: bool) -> bool:
    """Returns True if `ok` is True in all processes."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _disk_error(error: Exception, folder: AnyPath) -> str:
    """Returns the operating system's message, if any, and the free space of the disk."""
    match = re.search(r"([^:\n]*?) \[os_error_code", str(error))
    reason = match[1].strip() if match else getattr(error, "strerror", None) or first_line(error)
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        reason += f"; its disk has {free / 1e6:,.0f} MB free"
    return reason
