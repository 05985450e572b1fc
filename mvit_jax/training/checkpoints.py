"""Checkpoints by Orbax: written in the background, whole or not at all, sharded as the state is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mvit_jax.errors import UserError
from mvit_jax.models.trees import first_difference
from mvit_jax.training.step import State


class Checkpoints:
    """The last states of a run, and the one that validated best.

    A checkpoint holds "params" (nested as in the model), "ema" where it is on, and "training": the
    step and the optimiser's state.
    """

    def __init__(self, workdir: str | Path, keep: int = 1) -> None:
        folder = Path(workdir).absolute()
        self.last = _manager(folder / "checkpoints", max_to_keep=keep)
        self.best = _manager(folder / "best", max_to_keep=1, best_fn=_top1, best_mode="max")
        step = self.best.best_step()
        # Held here, since Orbax has the metrics of a step only once it is written.
        self.best_top1 = None if step is None else _top1(self.best.metrics(step))

    def save(self, state: State, step: int) -> None:
        # The best of this step is on disk before the last one is: a run that is killed in between
        # validates again.
        self.best.wait_until_finished()
        if step not in self.last.all_steps():
            self.last.save(step, args=_save(state), force=True)

    def save_params(self, params: Any) -> None:
        """Parameters alone, as step 0: of a model that was trained elsewhere."""
        self.last.save(0, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))

    def save_if_best(self, state: State, step: int, top1: float) -> None:
        """Keeps a state that validated better than all before; of equals, the first."""
        # A run that was killed between this save and the next `save` comes here again with the very
        # same state, which is then no better than itself.
        if self.best_top1 is None or top1 > self.best_top1:
            self.best.save(step, args=_save(state), metrics={"top1": top1}, force=True)
            self.best_top1 = top1

    def restore(self, like: State) -> State | None:
        """The newest state, in the shapes, dtypes and shardings of `like`, or None.

        A `UserError` where it is of another architecture.
        """
        if self.last.latest_step() is None:
            return None
        items = _items(like)
        read = _restore(self.last, items)
        return State(params=read["params"], ema=read.get("ema"), **read["training"])

    def restore_params(self, like: Any, which: str = "last", item: str = "params") -> Any:
        """Only the parameters of the "last" or "best" checkpoint (item "ema": averaged ones)."""
        return _restore(self._existing(which), {item: like})[item]

    def shapes(self, which: str = "last") -> Any:
        """The parameters of the "last" or "best" checkpoint, with shapes in place of arrays."""
        manager = self._existing(which)
        with _readable(manager) as step:
            return manager.item_metadata(step)["params"]

    def has_training(self) -> bool:
        """Whether the last checkpoint is a whole state, and not weights alone."""
        manager = self._existing("last")
        with _readable(manager) as step:
            return manager.item_metadata(step)["training"] is not None

    def read_params(self, which: str = "last", item: str = "params") -> Any:
        """The parameters of a checkpoint as NumPy arrays, of whatever architecture they are."""
        manager = self._existing(which)
        with _readable(manager) as step:
            like = manager.item_metadata(step)[item]
            like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
            wanted = {item: ocp.args.StandardRestore(like)}
            return manager.restore(step, args=ocp.args.Composite(**wanted))[item]

    def step(self, which: str = "last") -> int | None:
        return (self.last if which == "last" else self.best).latest_step()

    def _existing(self, which: str) -> ocp.CheckpointManager:
        manager = self.last if which == "last" else self.best
        if manager.latest_step() is None:
            raise UserError(
                f"there is no checkpoint in {manager.directory}: train first (a best one needs "
                "validation), or check --workdir"
            )
        return manager

    def wait(self) -> None:
        """Until all is written."""
        for manager in (self.last, self.best):
            manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        for manager in (self.last, self.best):
            manager.close()


def _top1(metrics: Any) -> float:
    return metrics["top1"]


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(**options),
        # Named here, so that their shapes can be read before they are restored.
        item_handlers={
            name: ocp.StandardCheckpointHandler() for name in ("params", "training", "ema")
        },
    )


def _items(state: State) -> dict[str, Any]:
    items = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state},
    }
    return items if state.ema is None else items | {"ema": state.ema}


def _save(state: State) -> ocp.args.Composite:
    return ocp.args.Composite(**{k: ocp.args.StandardSave(v) for k, v in _items(state).items()})


def _restore(manager: ocp.CheckpointManager, items: dict[str, Any]) -> Any:
    with _readable(manager) as step:
        found = manager.item_metadata(step)
        for name in items.keys() & {"params", "ema"}:
            difference = first_difference(items[name], found[name])
            if difference:
                raise UserError(
                    f"the checkpoint {manager.directory}/{step} is of another architecture: "
                    f"{difference}; use the config that it was trained with, or another --workdir"
                )
        wanted = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        return manager.restore(step, args=ocp.args.Composite(**wanted))


@contextmanager
def _readable(manager: ocp.CheckpointManager) -> Iterator[int]:
    """Gives the newest step; says in one sentence that what is done with it failed."""
    step = manager.latest_step()
    assert step is not None
    try:
        yield step
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the checkpoint {manager.directory}/{step} cannot be read ({_first_line(error)}): if "
            "it is damaged, move that folder away, and the one before it is used, where there is "
            "one"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
