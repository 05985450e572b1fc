"""AdamW and SGD as the papers' recipes use them (MViT, appendix D; MViTv2, appendix B).

The arithmetic is PyTorch's, in which the published models were trained, and the learning rate is
that of the reference code, at fractions of epochs. A step does, in this order: gradients are
clipped to a global norm; SGD adds the decay to the gradient (L2), AdamW takes it from the weights
besides (decoupled); everything is multiplied by the learning rate, with layer decay by that of the
tensor's layer.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

CLIP_EPS = 1e-6  # added to the norm, as PyTorch's clip_grad_norm_ does


def learning_rate(
    *,
    lr: float,
    start_lr: float,
    end_lr: float,
    warmup_epochs: float,
    epochs: float,
    steps_per_epoch: float,
) -> Callable[[int], float]:
    """Returns the rate as a function of the step: linear from `start_lr` to `lr`, then half a
    cosine towards `end_lr`.

    Step s, from 0, stands at epoch e = s / `steps_per_epoch`, which may be any positive number;
    the cosine's argument is pi (e - warm-up) / (epochs - warm-up). So the last step is one short of
    `end_lr`. Computed on the host, in float64 as in the reference code: a rate is an argument of
    the compiled step, which other rates do not compile anew.
    """

    def schedule(step: int) -> float:
        epoch = step / steps_per_epoch
        if epoch < warmup_epochs:
            return start_lr + (lr - start_lr) * epoch / max(warmup_epochs, 1 / steps_per_epoch)
        # Where all is warm-up there is no cosine to divide by.
        share = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1 / steps_per_epoch)
        return end_lr + (lr - end_lr) * (1 + math.cos(math.pi * min(share, 1))) / 2

    return schedule


def decayed(params):
    """True for the tensors that weight decay shrinks: all but biases and one-dimensional ones.

    Positions (relative ones too), the class token and pooling kernels are decayed, as in every
    published MViT recipe; each of them has two dimensions or more here.
    """

    def rule(path, leaf) -> bool:
        return jnp.ndim(leaf) > 1 and path[-1].key != "bias"

    return jax.tree_util.tree_map_with_path(rule, params)


def layers(params):
    """The layer of each tensor for layer decay: 0 for cubes, class token and positions, i + 1 for
    block i, and one above the last block's for everything else (the final norm, the head)."""
    depth = len(params["blocks"])

    def rule(path, leaf) -> int:
        room = path[0].key
        if room == "blocks":
            return int(path[1].key) + 1
        return 0 if room in ("patch_embed", "positions") else depth + 1

    return jax.tree_util.tree_map_with_path(rule, params)


def layer_rates(params, layer_decay: float):
    """What each tensor's learning rate is multiplied by: `layer_decay` ^ (depth + 1 - layer)."""
    last = len(params["blocks"]) + 1
    return jax.tree.map(lambda layer: layer_decay ** (last - layer), layers(params))


def adamw(
    *,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    layer_decay: float = 1.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with decoupled decay; gradients are first clipped to a global norm, where above 0."""
    return optax.chain(
        *_clipped(clip_norm),
        optax.chain(
            optax.scale_by_adam(b1=b1, b2=b2, eps=1e-8),
            optax.add_decayed_weights(weight_decay, mask=decayed),
            _by_rate(),
        ),
        *_by_layer(layer_decay),
    )


def sgd(
    *,
    weight_decay: float,
    momentum: float = 0.9,
    layer_decay: float = 1.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """SGD with Nesterov's momentum, no dampening, and decay as a part of the gradient (L2)."""
    return optax.chain(
        *_clipped(clip_norm),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.chain(optax.trace(momentum, nesterov=True), _by_rate()),
        *_by_layer(layer_decay),
    )


def _by_rate() -> optax.GradientTransformationExtraArgs:
    """Scales by minus the rate, which `update` takes as the argument `learning_rate`.

    Its state is that of optax's schedules, a count of steps, as older checkpoints have it.
    """

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        rate = extra["learning_rate"]
        scaled = jax.tree.map(lambda u: jnp.asarray(-rate, u.dtype) * u, updates)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _clipped(clip_norm: float) -> list[optax.GradientTransformation]:
    """Not optax's clip_by_global_norm, which divides by the bare norm."""

    def clip(gradients, params):
        factor = jnp.minimum(1, clip_norm / (optax.tree.norm(gradients) + CLIP_EPS))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)

    return [optax.stateless(clip)] if clip_norm > 0 else []


def _by_layer(layer_decay: float) -> list[optax.GradientTransformation]:
    """Last, where the updates are already negative steps: the decay's share is scaled with them."""

    def scale(updates, params):
        rates = layer_rates(updates, layer_decay)
        return jax.tree.map(lambda update, rate: update * rate, updates, rates)

    return [optax.stateless(scale)] if layer_decay != 1 else []
