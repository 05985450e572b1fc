"""An experiment's training step and prediction, jitted for a mesh, and its first state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mvit_jax.data.source import Source
from mvit_jax.models import mvit
from mvit_jax.models.plan import MViTConfig
from mvit_jax.training import evaluation, experiment
from mvit_jax.training.distributed import sharding
from mvit_jax.training.experiment import Config
from mvit_jax.training.step import State, init_state, train_step


@dataclasses.dataclass(frozen=True)
class Jitted:
    """What is known of an experiment before anything is computed: its devices need not be there,
    as long as the functions are only lowered and compiled for them.

    Attributes:
      step: `(state, batch) -> (state, metrics)`; the state is donated.
      predict: `(params, clips [batch, views, T, H, W, 3]) -> probabilities`.
      schedule: the learning rate of each step.
      first_state: makes the state that training starts from.
      state: its shapes and dtypes, and where on the mesh each array lies.
    """

    step: Any  # of jax.jit, whose type has no name
    predict: Any
    schedule: optax.Schedule
    first_state: Callable[[], State]
    state: State


def describe(config: Config, model: MViTConfig, videos: Source, mesh: Mesh, **plugs: Any) -> Jitted:
    """The functions of an experiment on `mesh`, and the shapes of its state. `plugs` are the
    `block`, `attention` and `pool` of `MViT`."""
    optimizer, schedule = experiment.make_optimizer(config, videos)
    recipe = experiment.recipe(config, model.num_classes)
    apply = functools.partial(experiment.model_apply(config, model, mesh), **plugs)

    def first_state() -> State:
        params = mvit.init(model, jax.random.key(config.seed), **plugs)
        return init_state(params, optimizer, config.optim.ema)

    shapes = jax.eval_shape(first_state)
    shardings = sharding.state_shardings(mesh, shapes)
    rows, copied = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    step = jax.jit(
        functools.partial(train_step, apply=apply, optimizer=optimizer, recipe=recipe),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, copied),
        donate_argnums=0,
    )
    return Jitted(
        step=step,
        predict=evaluation.predictor(apply, recipe, shapes.params, mesh),
        schedule=schedule,
        first_state=jax.jit(first_state, out_shardings=shardings),
        state=_placed(shapes, shardings),
    )


def build(config: Config, model: MViTConfig, videos: Source, mesh: Mesh, **plugs: Any):
    """The jitted training step, the jitted prediction, the learning rates, the first state.

    The state is made in place on the mesh: no device ever holds all of it. `plugs` are the `block`,
    `attention` and `pool` of `MViT`.
    """
    jitted = describe(config, model, videos, mesh, **plugs)
    return jitted.step, jitted.predict, jitted.schedule, jitted.first_state()


def batch_shapes(config: Config, model: MViTConfig, mesh: Mesh) -> dict[str, Any]:
    """Shapes, dtypes and places of a step's batch (see `train_step`), for compiling ahead of it."""
    clip = (config.batch, model.frames, model.size, model.size, 3)
    several = (model.num_classes,) if config.data.multi_label else ()
    batch = {
        "clip": jax.ShapeDtypeStruct(clip, np.uint8),
        "label": jax.ShapeDtypeStruct(
            (config.batch, *several), jnp.uint8 if several else jnp.int32
        ),
        "broken": jax.ShapeDtypeStruct((config.batch,), jnp.int32),
    }
    return _placed(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))


def with_params(fresh: State, params: Any) -> State:
    """A fresh state that starts from these parameters, placed like its own."""
    put = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, fresh.params)
    ema = None if fresh.ema is None else jax.tree.map(lambda x: x.copy(), put)
    return dataclasses.replace(fresh, params=put, ema=ema)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )
