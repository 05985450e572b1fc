"""An experiment's training step and prediction, jitted for a mesh, and its first state."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from mvit_jax.data.sources import Source
from mvit_jax.models import mvit
from mvit_jax.models.plan import MViTConfig
from mvit_jax.training import evaluation, experiment, sharding
from mvit_jax.training.experiment import Config
from mvit_jax.training.step import State, init_state, train_step


def build(config: Config, model: MViTConfig, videos: Source, mesh: Mesh, **plugs: Any):
    """The jitted training step, the jitted prediction, the learning rates, the first state.

    The state is made in place on the mesh: no device ever holds all of it. `plugs` are the `block`,
    `attention` and `pool` of `MViT`.
    """
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
    predict = evaluation.predictor(apply, recipe, shapes.params, mesh)
    return step, predict, schedule, jax.jit(first_state, out_shardings=shardings)()


def with_params(fresh: State, params: Any) -> State:
    """A fresh state that starts from these parameters, placed like its own."""
    put = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, fresh.params)
    ema = None if fresh.ema is None else jax.tree.map(lambda x: x.copy(), put)
    return dataclasses.replace(fresh, params=put, ema=ema)
