"""Checkpoints by Orbax: written in the background, whole or not at all, sharded as the state is,
and verified when they are read (`training.run.checksums`)."""

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
from mvit_jax.common.files import AnyPath, faults, is_local, to_path
from mvit_jax.common.text import first_line
from mvit_jax.models.functional import first_difference
from mvit_jax.training.distributed import coordination
from mvit_jax.training.run import checksums
from mvit_jax.training.state import State

# Saves that may fail one after the other before a run ends: somebody should have looked by then.
FAILED_SAVES = 3
_FOLDERS = {"last": "checkpoints", "best": "best"}
_DIGESTS = "digests"
_DIGESTS_FILE = "digests.json"
_TOP1 = "top1"
# What TensorStore says where a file may be whole, and cannot be had just now, or by this user.
_NOT_DAMAGE = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED"
)


class DamagedError(UserError):
    """A checkpoint that cannot be read, or does not hold what was saved."""


class NotSavedError(HungError):
    """A checkpoint that cannot be written: the disk is full, say. See `threads_left`."""


def threads_left() -> bool:
    """Whether threads of a save that failed are there: Orbax's wait for each other for minutes, and
    Python at its end for them."""
    return any(type(thread).__name__ == "_SignalingThread" for thread in threading.enumerate())


class Checkpoints:
    """The last states of a run, and the one that validated best.

    A checkpoint holds "params" (nested as in the model), "ema" where it is on, "training": the step
    and the optimiser's state, and "digests", by which the others are verified. Older ones, without
    digests, are taken as they are.
    """

    def __init__(self, workdir: str | AnyPath, keep: int = 1, *, tidy: bool = False) -> None:
        """`tidy` removes what saves that were broken off have left: for the one who saves."""
        if tidy:
            _hush_tensorstore()
        folder = to_path(workdir)
        self.folder, self.keep = folder.absolute() if is_local(folder) else folder, keep
        self.last = self._manager("last", tidy)
        self.best = self._manager("best", tidy)
        self.best_top1 = self._top1_on_disk()
        self._under_way: dict[str, int] = {}  # the step of each save that is being written
        self._failed = 0  # saves, one after the other

    # Writing.

    def save(
        self, state: State, step: int, *, end: bool = False, say: Callable[[str], None] = print
    ) -> None:
        """Saves a state in the background: it may be donated at once.

        A save that fails, on a full disk say, is said, and the next one is another try: to end
        there would lose what was trained since the last. The one at the `end`, after which nothing
        is trained, is waited for, and tried twice.

        Raises:
          NotSavedError: it was the end; or saves failed `FAILED_SAVES` times in a row; or there
            are several processes, of which only some may know. The checkpoints before are whole.
        """
        self.settle(say)
        if step in self.last.all_steps():
            return
        error = self._start("last", _items(state), step)
        if end:
            error = error or self._settle("last")
            if error:  # what it left behind is gone by now, and some faults are brief
                say(f"{error}; once more")
                error = self._start("last", _items(state), step) or self._settle("last")
            if error:
                raise error
        self._bear(error, say)

    def save_params(self, params: Any) -> None:
        """Parameters alone, as step 0: of a model that was trained elsewhere."""
        error = self._start("last", {"params": params}, 0)
        if error:
            raise error

    def save_if_best(
        self, state: State, step: int, top1: float, say: Callable[[str], None] = print
    ) -> None:
        """Keeps a state that validated better than all before; of equals, the first."""
        # A run that was killed after this save, and before it noted the validation, comes here
        # again with the very same state, which is then no better than itself.
        if self.best_top1 is None or top1 > self.best_top1:
            self._bear(self._settle("best"), say)
            self.best_top1 = top1
            error = self._start("best", _items(state), step, top1)
            self._bear(error, say)

    def settle(self, say: Callable[[str], None] = print) -> None:
        """Waits until all is written; says where that failed."""
        for which in ("best", "last"):
            self._bear(self._settle(which), say)

    def wait(self) -> None:
        """Waits until all is written; a `NotSavedError` where that failed."""
        errors = [self._settle(which) for which in _FOLDERS]
        for error in filter(None, errors):
            raise error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            for manager in (self.last, self.best):
                manager.close()

    def _start(self, which: str, items: dict[str, Any], step: int, top1: float | None = None):
        """Starts a save; gives the error where that is known at once. What it was found to be
        worth goes with the digests: Orbax cannot open a folder where one file of its own, which
        would hold it, is damaged."""
        self._under_way[which] = step
        args: dict[str, Any] = {n: ocp.args.StandardSave(item) for n, item in items.items()}
        kept: dict[str, Any] = {name: checksums.digests(item) for name, item in items.items()}
        kept |= {} if top1 is None else {_TOP1: top1}
        args[_DIGESTS] = ocp.args.JsonSave(kept | {"crc32": _crc32(kept)})
        if self._failed:  # what was still writing when it was cleared away is done by now
            self._clear(which)
        try:
            manager = self._of(which)
            manager.save(step, args=ocp.args.Composite(**args), force=True)
        except Exception as error:
            return self._not_saved(which, error)
        return None

    def _settle(self, which: str) -> NotSavedError | None:
        """Waits until a save is on disk; gives the error where it failed."""
        if which not in self._under_way:
            return None
        try:
            self._of(which).wait_until_finished()
        except Exception as error:
            return self._not_saved(which, error)
        del self._under_way[which]
        self._failed = 0
        return None

    def _bear(self, error: NotSavedError | None, say: Callable[[str], None]) -> None:
        """Says that a save failed; raises where there were too many."""
        if error is None:
            return
        if self._failed >= FAILED_SAVES:
            raise NotSavedError(f"{error}; that makes {self._failed} in a row") from error
        say(f"{error}; training goes on, and the next save is another try")

    def _not_saved(self, which: str, error: Exception) -> NotSavedError:
        """Clears up after a save that failed, and says why it did."""
        step = self._under_way.pop(which)
        self._failed += 1
        folder = self.folder / _FOLDERS[which]
        sentence = f"the checkpoint {folder}/{step} could not be written ({_why(error, folder)})"
        if jax.process_count() > 1:  # Orbax's managers are made anew by all processes or none
            raise NotSavedError(
                f"{sentence}: the same command goes on from the one before"
            ) from error
        # Orbax goes on raising what it once met, and forgets the checkpoints that are there.
        with suppress(Exception):
            self._of(which).close()
        self._clear(which)
        setattr(self, which, self._manager(which, tidy=False))
        self.best_top1 = self._top1_on_disk()
        before = self._of(which).latest_step()
        whole = "there is none before it" if before is None else f"that of step {before} is whole"
        problem = NotSavedError(f"{sentence}; {whole}")
        problem.__cause__ = error
        return problem

    def _clear(self, which: str) -> None:
        """Removes what saves that failed have left: it takes room that the next one needs."""
        if not is_local(self.folder):  # where there is room, and Orbax removes it for the next one
            return
        for left in (self.folder / _FOLDERS[which]).glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)

    # Reading.

    def restore(self, like: State, step: int | None = None) -> State | None:
        """The newest state, in the shapes, dtypes and shardings of `like`, or None.

        Raises:
          UserError: it is of another architecture or optimiser, or cannot be read just now.
          DamagedError: it is damaged.
        """
        step = self.last.latest_step() if step is None else step
        if step is None:
            return None
        read = self._read("last", step, _items(like))
        return State(params=read["params"], ema=read.get("ema"), **read["training"])

    def resume(self, like: State, say: Callable[[str], None] = print) -> State | None:
        """As `restore`, but where the newest checkpoint is damaged, the newest that is not.

        Damaged ones that are newer are moved to DIR/damaged, and said. With several processes all
        must call this.

        Raises:
          UserError: as for `restore`, or all are damaged; then nothing is moved.
        """
        damaged: list[tuple[int, DamagedError]] = []
        steps = coordination.from_first("checkpoints", sorted(self.last.all_steps(), reverse=True))
        if steps:  # the newest may not have arrived in all caches of a network's file system
            coordination.wait_for_file(self.folder / _FOLDERS["last"] / str(steps[0]))
            self.last.reload()
        for step in steps:
            try:
                state = self.restore(like, step)
            except DamagedError as error:
                damaged.append((step, error))
                continue
            for bad, error in damaged:
                say(f"{error}: it is now {self._set_aside(bad)}, and training goes on from {step}")
            return state
        if damaged:
            problems = "; ".join(str(error) for _, error in damaged)
            raise UserError(
                f"no checkpoint is left to go on from: {problems}; bring one back from a copy, or "
                "start anew in another --workdir"
            )
        return None

    def restore_params(self, like: Any, which: str = "last", item: str = "params") -> Any:
        """Only the parameters of the "last" or "best" checkpoint (item "ema": averaged ones)."""
        step = self._existing(which)
        coordination.same_everywhere("workdir", {"checkpoint": step})
        try:
            return self._read(which, step, {item: like})[item]
        except DamagedError as error:
            raise DamagedError(
                f"{error}: move that folder away, and the one before it is used, where there is one"
            ) from error

    def read_params(self, which: str = "last", item: str = "params") -> Any:
        """The parameters of a checkpoint as NumPy arrays, of whatever architecture they are."""
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), self.shapes(which, item))
        return self.restore_params(like, which, item)

    def shapes(self, which: str = "last", item: str = "params") -> Any:
        """The parameters of the "last" or "best" checkpoint, with shapes in place of arrays."""
        step = self._existing(which)
        structure = self._structure(which, step)
        if item not in structure:
            raise DamagedError(f"{self._name(which, step)} is no checkpoint: it has no {item}")
        return structure[item]

    def has_training(self) -> bool:
        """Whether the last checkpoint is a whole state, and not weights alone."""
        return "training" in self._structure("last", self._existing("last"))

    def step(self, which: str = "last") -> int | None:
        return self._of(which).latest_step()

    def _read(self, which: str, step: int, items: dict[str, Any]) -> Any:
        """Items in the shapes, dtypes and shardings of those given, verified."""
        error: UserError | None = None
        try:
            self._check_items(which, step, items)
        except UserError as problem:
            error = problem
        self._agree(which, step, error)
        wanted = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        read: Any = None
        try:
            manager = self._of(which)
            read = manager.restore(step, args=ocp.args.Composite(**wanted))
        except Exception as problem:
            error = self._unreadable(which, step, problem)
        self._agree(which, step, error)
        kept = self._digests(which, step)
        mismatches = [] if kept is None else [
            f"{name}/{path}"
            for name in items
            if (path := checksums.first_mismatch(read[name], kept[name]))
        ]  # fmt: skip
        if mismatches:
            name = self._name(which, step)
            error = DamagedError(f"{name} is damaged: {mismatches[0]} is not as saved")
        self._agree(which, step, error)
        return read

    def _agree(self, which: str, step: int, error: UserError | None = None) -> None:
        """Raises where a process could not read, in all of them: they must go the same way.

        That asks the others, and so tells a file that cannot be read from a process that has died
        while all of them read it together: then this fails like any other collective operation.
        """
        if not _on_all_processes(error is None):
            raise error or DamagedError(f"{self._name(which, step)} cannot be read elsewhere")

    def _check_items(self, which: str, step: int, items: dict[str, Any]) -> None:
        structure = self._structure(which, step)
        if "params" not in structure:
            raise DamagedError(f"{self._name(which, step)} is no checkpoint: it has no parameters")
        for name in items:
            self._check_structure(which, step, name, items[name], structure.get(name, {}))

    def _check_structure(self, which: str, step: int, name: str, ours: Any, theirs: Any) -> None:
        if name == "training":
            ours, theirs = checksums.by_path(ours), checksums.by_path(theirs)
            kind = "optimiser"
        else:
            kind = "architecture"
        difference = first_difference(ours, theirs)
        if difference:
            raise UserError(
                f"{self._name(which, step)} is of another {kind}: {difference}; use the config "
                "that it was trained with, or another --workdir"
            )

    def _structure(self, which: str, step: int) -> dict[str, Any]:
        """What a checkpoint holds, with shapes in place of arrays; "training" is flat."""
        kept = self._digests(which, step)
        if kept is None:
            try:
                found = self._of(which).item_metadata(step)
                return {
                    name: checksums.by_path(item) if name == "training" else item
                    for name, item in found.items()
                    if item is not None and name != _DIGESTS
                }
            except Exception as error:
                raise self._unreadable(which, step, error) from error
        shapes = {
            name: {
                path: jax.ShapeDtypeStruct(tuple(tensor["shape"]), tensor["dtype"])
                for path, tensor in tensors.items()
            }
            for name, tensors in kept.items()
        }
        return {
            name: tensors if name == "training" else unflatten_dict(tensors, sep="/")
            for name, tensors in shapes.items()
        }

    def _digests(self, which: str, step: int) -> Mapping[str, Any] | None:
        """Digests by item and path; None for a checkpoint older than they are."""
        kept = self._kept(which, step)
        return None if kept is None else {k: v for k, v in kept.items() if k != _TOP1}

    def _kept(self, which: str, step: int) -> dict[str, Any] | None:
        folder = self.folder / _FOLDERS[which] / str(step)
        path = folder / _DIGESTS / _DIGESTS_FILE
        try:
            if not path.parent.exists():
                contents = folder / "_CHECKPOINT_METADATA"  # Orbax's, with the names of all items
                if not contents.exists() or f'"{_DIGESTS}"' not in contents.read_text():
                    return None
            kept = json.loads(path.read_text())
            if kept.pop("crc32") == _crc32(kept):
                return kept
        except (*faults(), ValueError, KeyError) as error:
            raise self._unreadable(which, step, error) from error
        raise DamagedError(f"{self._name(which, step)} is damaged: {path.name} is not as saved")

    def _unreadable(self, which: str, step: int, error: Exception) -> UserError:
        kind = UserError if _NOT_DAMAGE.search(str(error)) else DamagedError
        if isinstance(error, MemoryError | PermissionError):
            kind = UserError
        if isinstance(error, faults()) and not isinstance(error, OSError):  # of a bucket
            kind = UserError
        problem = kind(f"{self._name(which, step)} cannot be read ({first_line(error)})")
        problem.__cause__ = error
        return problem

    def _set_aside(self, step: int) -> AnyPath:
        """Moves a checkpoint out of the way; nothing is ever deleted for being damaged."""
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

    def _existing(self, which: str) -> int:
        step = self.step(which)
        if step is None:
            raise UserError(
                f"there is no checkpoint in {self.folder}/{_FOLDERS[which]}: train first (a best "
                "one needs validation), or check --workdir"
            )
        return step

    def _of(self, which: str) -> ocp.CheckpointManager:
        return self.last if which == "last" else self.best

    def _manager(self, which: str, tidy: bool) -> ocp.CheckpointManager:
        keep = self.keep if which == "last" else 1
        items = ("params", "training", "ema")
        return _Manager(
            self.folder / _FOLDERS[which],
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=tidy,
                max_to_keep=keep,
                # The last and the best of one step are saved at once; without names of their own
                # the barriers of several processes collide.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    barrier_sync_key_prefix=which
                ),
            ),
            # Named here, so that their shapes can be read before they are restored.
            item_handlers={name: ocp.StandardCheckpointHandler() for name in items}
            | {_DIGESTS: ocp.JsonCheckpointHandler(_DIGESTS_FILE)},
        )

    def _top1_on_disk(self) -> float | None:
        """None where there is no best checkpoint, or it cannot be told what it was worth."""
        step = self.best.latest_step()
        if step is None:
            return None
        older = self.folder / _FOLDERS["best"] / str(step) / "metrics" / "metrics"
        try:
            kept = self._kept("best", step)
            return json.loads(older.read_text())["top1"] if kept is None else kept.get(_TOP1)
        except (UserError, *faults(), ValueError, KeyError, TypeError):
            return None


@functools.cache
def _hush_tensorstore() -> None:
    """When a write fails Orbax closes the event loop of all, and TensorStore then calls that for
    each of the others: a hundred tracebacks that say nothing around the sentence that counts."""
    hook = sys.unraisablehook

    def tell(told: Any) -> None:
        if "Event loop is closed" not in str(told.exc_value):
            hook(told)

    sys.unraisablehook = tell


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # The training loop asks that, with numbers that rise; Orbax also from a thread that ends a
        # save of an earlier step, and JAX would then let all stop at a step that has passed.
        return False


def _items(state: State) -> dict[str, Any]:
    items = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state},
    }
    return items if state.ema is None else items | {"ema": state.ema}


def _crc32(kept: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(kept, sort_keys=True).encode())


def _on_all_processes(fine: bool) -> bool:
    """Whether all is well everywhere: every process must go the same way."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def _why(error: Exception, folder: AnyPath) -> str:
    """What is the matter with a disk, in the operating system's words where they can be found."""
    known = re.search(r"([^:\n]*?) \[os_error_code", str(error))
    why = known[1].strip() if known else getattr(error, "strerror", None) or first_line(error)
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        why += f"; its disk has {free / 1e6:,.0f} MB free"
    return why
