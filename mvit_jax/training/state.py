"""The state that training carries from step to step, and its metrics."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

Metrics = dict[str, tuple[Array, Array]]  # (sum, count): summed before it is divided


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that training carries from step to step, and all that a checkpoint holds."""

    step: Any  # int32, steps done; like the rest, a sharding or shape where the tree holds those
    params: Any
    opt_state: Any
    ema: Any  # averaged parameters, or None

    @property
    def tested(self) -> Any:
        """The averaged parameters, or the parameters where none are averaged."""
        return self.params if self.ema is None else self.ema


def init_state(params: Any, optimizer: optax.GradientTransformation, ema: float) -> State:
    """Returns the state before the first step; `ema` above 0 averages parameters."""
    averaged = jax.tree.map(jnp.copy, params) if ema > 0 else None
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), averaged)


def with_params(fresh: State, params: Any) -> State:
    """Returns a fresh state that starts from `params`, placed like its own."""
    put = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, fresh.params)
    ema = None if fresh.ema is None else jax.tree.map(lambda x: x.copy(), put)
    return dataclasses.replace(fresh, params=put, ema=ema)
