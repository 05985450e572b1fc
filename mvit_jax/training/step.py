"""One step of training, as a pure function, and the state that it carries."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mvit_jax.training import mixing
from mvit_jax.training.losses import cross_entropy, soft_targets

Metrics = dict[str, tuple[Array, Array]]  # (sum, count): summed before it is divided


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that training carries from step to step, and all that a checkpoint holds."""

    step: Any  # int32, steps done; like the rest, a sharding or shape where the tree holds those
    params: Any
    opt_state: Any
    ema: Any  # averaged parameters, or None


@dataclass(frozen=True)
class Recipe:
    """What a step does besides model and optimiser; the fields are config keys of these names."""

    seed: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: float
    mixup: float
    cutmix: float
    switch: float
    group: int
    label_smoothing: float
    ema: float
    accumulate: int
    dtype: Any = jnp.float32


def init_state(params: Any, optimizer: optax.GradientTransformation, ema: float) -> State:
    averaged = jax.tree.map(jnp.copy, params) if ema > 0 else None
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), averaged)


def train_step(
    state: State,
    batch: dict[str, Array],
    *,
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[State, Metrics]:
    """One update from one batch: "clip" uint8 [batch, T, H, W, 3], "label" int32 [batch].

    `apply` is `models.mvit.apply` with its config. Nothing random is stored: every draw follows
    from the seed and the step.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    key_batch, key_model = jax.random.split(key)
    clip, targets = _augmented(batch, key_batch, recipe)

    def loss(params, clip, targets, labels, key):
        logits, _ = apply(params, clip, train=True, key=key, dtype=recipe.dtype)
        correct = jnp.sum(jnp.argmax(logits, -1) == labels)
        return jnp.mean(cross_entropy(logits, targets)), correct

    (value, correct), grads = _accumulated(
        jax.value_and_grad(loss, has_aux=True),
        recipe.accumulate,
        state.params,
        (clip, targets, batch["label"]),
        key_model,
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1 - recipe.ema)
    state = replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
    clips = jnp.asarray(batch["label"].shape[0])
    metrics = {
        "loss": (value * clips, clips),
        "accuracy": (100 * correct, clips),  # percent, on the augmented clips
        "grad_norm": (optax.tree.norm(grads), jnp.asarray(1)),
        "param_norm": (optax.tree.norm(params), jnp.asarray(1)),  # after the update
    }
    return state, metrics


def predict_step(params: Any, clip: Array, *, apply: Callable[..., Any], recipe: Recipe) -> Array:
    """Class probabilities [batch, num_classes] of uint8 views [batch, views, T, H, W, 3]: softmax
    per view, then the mean over views (MViT, section 4)."""
    batch, views = clip.shape[:2]
    flat = clip.reshape(batch * views, *clip.shape[2:])
    flat = mixing.normalise(flat, recipe.mean, recipe.std, recipe.dtype)
    logits, _ = apply(params, flat, dtype=recipe.dtype)
    return jax.nn.softmax(logits).reshape(batch, views, -1).mean(1)


def _augmented(batch: dict[str, Array], key: Array, recipe: Recipe) -> tuple[Array, Array]:
    key_flip, key_mix = jax.random.split(key)
    clip = mixing.normalise(batch["clip"], recipe.mean, recipe.std, recipe.dtype)
    targets = soft_targets(batch["label"], recipe.num_classes, recipe.label_smoothing)
    if recipe.flip > 0:
        clip = mixing.flip(clip, key_flip, recipe.flip)
    return mixing.mix(
        clip,
        targets,
        key_mix,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        switch=recipe.switch,
        group=recipe.group,
    )


def _accumulated(value_and_grad, parts: int, params, batch: tuple, key: Array):
    """Mean of loss and gradients over `parts` of the batch, one after the other.

    Part p takes rows p, p + parts, ...: each device's rows are cut, none move to another device.
    """
    if parts == 1:
        return value_and_grad(params, *batch, key)
    cut = [jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0) for x in batch]

    def add(total, part):
        index, *rows = part
        out = value_and_grad(params, *rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, out), None

    shapes = jax.eval_shape(value_and_grad, params, *(x[0] for x in cut), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    ((value, correct), grads), _ = jax.lax.scan(add, zeros, (jnp.arange(parts), *cut))
    return (value / parts, correct), jax.tree.map(lambda g: g / parts, grads)
