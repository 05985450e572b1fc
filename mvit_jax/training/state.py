"""The training state and the type of step metrics."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

Metrics = dict[str, tuple[Array, Array]]  # (sum, count), so that a mean over steps is exact


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The training state, which is also the content of a checkpoint.

    The fields may also hold shapes or shardings in place of arrays.
    """

    step: Any  # int32, steps done
    params: Any
    opt_state: Any
    ema: Any  # averaged parameters (EMA), or None

    @property
    def eval_params(self) -> Any:
        """The averaged parameters if the state has them, else the parameters."""
        return self.params if self.ema is None else self.ema


def init_state(params: Any, optimizer: optax.GradientTransformation, ema: float) -> State:
    """Returns the state before the first step, with averaged parameters if `ema` is above 0."""
    averaged = jax.tree.map(jnp.copy, params) if ema > 0 else None
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), averaged)


def with_params(fresh: State, params: Any) -> State:
    """Returns `fresh` with `params` as parameters and their average, sharded as before."""
    put = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, fresh.params)
    ema = None if fresh.ema is None else jax.tree.map(lambda x: x.copy(), put)
    return dataclasses.replace(fresh, params=put, ema=ema)
