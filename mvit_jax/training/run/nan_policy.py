"""What is done where a loss, a gradient or a weight is not finite: the config key `on_nan`.

The update of a step whose loss or gradient is not finite is never made (`training.step`), whatever
the policy is: so the results of runs without such steps are the same, bit for bit, under all three.
What the policy decides is how the run goes on, once the metrics tell:

- stop: it ends; the checkpoints before that step are kept.
- skip: it goes on with the next step. The batch is left out.
- rollback: it goes on from the weights and moments of the last checkpoint, and with the next step:
  as the data are a function of (seed, step), to repeat steps would bring the same numbers. So the
  batches since that checkpoint are left out, and weights that were on their way there are gone.

Each is said, with the step. Metrics are sums over all processes, so that all do the same.
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
# After so many in a row it is not the batch.
SKIPS = 10  # steps whose update is left out
ROLLBACKS = 3  # without a checkpoint of steps in between


class NotFiniteError(UserError):
    """A loss, gradient or weight that is not finite ends the run: the state must not be kept."""


class Policy:
    """Hears of every step whether it was finite, and decides.

    Attributes:
      name: one of `POLICIES`.
      found: what was not finite, and at which step, where the state is now to be rolled back.
      skipped: steps whose update was left out, since the caller last set this to 0.
    """

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name, self._say = name, say
        self.found: str | None = None
        self.skipped = 0
        self._skips = 0  # in a row
        self._landed: int | None = None  # the step to which the last rollback moved the counter
        self._rollbacks = 0  # in a row

    def finite(self) -> None:
        self._skips = 0

    def not_finite(self, step: int, values: dict[str, float]) -> None:
        """Takes the metrics of a step that are not finite, by name.

        Raises:
          NotFiniteError: the run ends here.
        """
        name = "loss" if "loss" in values else next(iter(values))
        what = f"{name} is {values[name]} at step {step}"
        if self.name == "rollback":
            self.found = self.found or what
            return
        # Weights that are not finite were made so by a finite gradient, and stay so.
        if self.name == "skip" and "param_norm" not in values:
            self.skipped += 1
            self._skips += 1
            if self._skips < SKIPS:
                self._say(f"{what}: its update is left out ({self._skips} in a row)")
                return
            what += f", the last of {SKIPS} in a row whose update was left out"
        raise _ended(what)

    def roll_back(self, checkpoints: Checkpoints, state: State, step: int) -> tuple[State, int]:
        """The state of the last checkpoint, as if it were after `step`, and the step that it is of;
        saved at once, so that a kill changes nothing. What `state` holds is freed first.

        Raises:
          NotFiniteError: there is no checkpoint to go back to, or that was done too often.
        """
        what, self.found = self.found, None
        checkpoints.settle(self._say)
        if checkpoints.step() is None:
            raise _ended(f"{what}, before the first checkpoint to go back to")
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        try:
            back = checkpoints.resume(like, self._say)
        except UserError as error:
            raise NotFiniteError(f"{what}, and {error}") from error
        assert back is not None
        was = int(back.step)
        self._rollbacks = self._rollbacks + 1 if was == self._landed else 1
        if self._rollbacks > ROLLBACKS:
            raise _ended(f"{what}, after {ROLLBACKS} rollbacks without a checkpoint in between")
        self._landed = step
        self._say(
            f"{what}: goes on after step {step} from the weights of step {was}, without the "
            "batches in between"
        )
        back = at_step(back, step)
        checkpoints.save(back, step, say=self._say)
        checkpoints.settle(self._say)
        return back, was


def at_step(state: State, step: int) -> State:
    """A state with another count of steps, in the optimiser's state too: its rates follow them."""

    def moved(leaf: Any) -> Any:
        if leaf.ndim > 0 or not jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf
        return jax.device_put(np.asarray(step, leaf.dtype), leaf.sharding)

    return replace(state, step=moved(state.step), opt_state=jax.tree.map(moved, state.opt_state))


def _ended(what: str) -> NotFiniteError:
    return NotFiniteError(
        f"{what}: training stops here and the checkpoints before it are kept; a lower optim.lr or "
        "a longer optim.warmup_epochs usually helps, in another --workdir; to pass over single "
        "batches, go on with --config.on_nan=skip or rollback"
    )
