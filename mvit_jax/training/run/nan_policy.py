"""Policies for NaN and Inf in loss, gradients or weights (`config.on_nan`).

Under all policies the training step skips the update if its loss or gradient is not finite
(`training.step`). So runs without such steps are equal, bit for bit, under all policies. When the
metrics of the step arrive, the policy decides:

- stop: the run ends. Earlier checkpoints remain.
- skip: the run continues with the next step, without this batch.
- rollback: the run restores the weights and moments of the last checkpoint, and continues with the
  next step. The batches since this checkpoint are not repeated, and their updates are lost. Data
  and random draws depend only on (seed, step), so repeated steps would have the same result.

Each event is logged with its step. Metrics are sums over all processes, so all processes decide
alike.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.training.state import State

POLICIES = ("stop", "skip", "rollback")
# The run ends after this many in a row, as a single bad batch is then not the cause.
SKIPS = 10  # steps with a skipped update
ROLLBACKS = 3  # rollbacks without a new checkpoint in between


class NotFiniteError(UserError):
    """A non-finite loss, gradient or weight that ends the run; the state must not be saved."""


class Policy:
    """State machine of one policy; the caller reports each step as finite or not.

    Attributes:
      name: one of `POLICIES`.
      rollback_reason: the non-finite metric and its step while a rollback is pending, else None.
      skipped: steps with a skipped update, since the caller last set this to 0.
    """

    def __init__(self, name: str, log: Callable[[str], None]) -> None:
        self.name, self._log = name, log
        self.rollback_reason: str | None = None
        self.skipped = 0
        self._skips = 0  # in a row
        self._landed: int | None = None  # the step to which the last rollback moved the counter
        self._rollbacks = 0  # in a row

    def report_finite(self) -> None:
        """Reports a finite step."""
        self._skips = 0

    def report_non_finite(self, step: int, values: dict[str, float]) -> None:
        """Reports the non-finite metrics of a step, by name.

        Raises:
          NotFiniteError: the policy ends the run.
        """
        name = "loss" if "loss" in values else next(iter(values))
        what = f"{name} is {values[name]} at step {step}"
        if self.name == "rollback":
            self.rollback_reason = self.rollback_reason or what
            return
        # Skipping cannot repair weights that an applied update has made non-finite.
        if self.name == "skip" and "param_norm" not in values:
            self.skipped += 1
            self._skips += 1
            if self._skips < SKIPS:
                self._log(f"{what}: its update is skipped ({self._skips} in a row)")
                return
            what += f", the last of {SKIPS} skipped updates in a row"
        raise _ended(what)

    def roll_back(self, checkpoints: Checkpoints, state: State, step: int) -> tuple[State, int]:
        """Rolls back to the last checkpoint, and saves its state as the state after `step`.

        A restart after a kill then continues from this state. The buffers of `state` are freed.

        Returns:
          The restored state with its step count set to `step`, and the checkpoint's step.

        Raises:
          NotFiniteError: there is no checkpoint, or there were more than `ROLLBACKS` rollbacks
            without a new checkpoint in between.
        """
        what, self.rollback_reason = self.rollback_reason, None
        checkpoints.wait_and_log(self._log)
        if checkpoints.step() is None:
            raise _ended(f"{what}, before the first checkpoint")
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        try:
            back = checkpoints.resume(like, self._log)
        except UserError as error:
            raise NotFiniteError(f"{what}, and {error}") from error
        assert back is not None
        origin = int(back.step)
        self._rollbacks = self._rollbacks + 1 if origin == self._landed else 1
        if self._rollbacks > ROLLBACKS:
            raise _ended(f"{what}, after {ROLLBACKS} rollbacks to the same weights")
        self._landed = step
        self._log(
            f"{what}: training continues after step {step} with the weights of step {origin}; the "
            "batches in between have no effect"
        )
        back = at_step(back, step)
        checkpoints.save(back, step, log=self._log)
        checkpoints.wait_and_log(self._log)
        return back, origin


def at_step(state: State, step: int) -> State:
    """Returns the state with `step` as its step count, in the optimiser too."""

    def set_step(leaf: Any) -> Any:
        if leaf.ndim > 0 or not jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf
        return jax.device_put(np.asarray(step, leaf.dtype), leaf.sharding)

    return replace(
        state, step=set_step(state.step), opt_state=jax.tree.map(set_step, state.opt_state)
    )


def _ended(what: str) -> NotFiniteError:
    return NotFiniteError(
        f"{what}: training stops, and earlier checkpoints remain; a lower optim.lr or a longer "
        "optim.warmup_epochs in another --workdir usually helps; to skip single batches, resume "
        "with --config.on_nan=skip or rollback"
    )
