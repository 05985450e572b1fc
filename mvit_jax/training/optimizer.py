"""AdamW, SGD and learning rate schedule of the papers' recipes (MViT, app. D; MViTv2, app. B).

The arithmetic is PyTorch's, with which the published models were trained. The schedule is that of
the reference code, a function of fractional epochs. The order of a step:

1. Gradients are clipped to a global norm.
2. SGD adds weight decay to the gradient (L2); AdamW's weight decay is decoupled.
3. Updates are multiplied by the learning rate, with layer decay by the rate of the tensor's layer.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

CLIP_EPS = 1e-6  # added to the norm, as in PyTorch's clip_grad_norm_


def learning_rate(
    *,
    lr: float,
    start_lr: float,
    end_lr: float,
    warmup_epochs: float,
    epochs: float,
    steps_per_epoch: float,
) -> Callable[[int], float]:
    """Returns the learning rate as a function of the step: linear warm-up, then half a cosine.

    The warm-up goes from `start_lr` to `lr`, the cosine from `lr` towards `end_lr`. Step s, from 0,
    is at epoch e = s / `steps_per_epoch`; the cosine's argument is
    pi (e - warmup_epochs) / (epochs - warmup_epochs). The last step therefore has slightly more
    than `end_lr`. Rates are computed on the host, in float64 as in the reference code. They are an
    argument of the compiled step, so that other rates need no recompilation.

    Args:
      lr: at the end of the warm-up.
      start_lr: at step 0.
      end_lr: at epoch `epochs`.
      warmup_epochs: length of the warm-up.
      epochs: length of the run.
      steps_per_epoch: any positive number, also a fraction.
    """

    def schedule(step: int) -> float:
        epoch = step / steps_per_epoch
        if epoch < warmup_epochs:
            return start_lr + (lr - start_lr) * epoch / max(warmup_epochs, 1 / steps_per_epoch)
        # The maximum avoids division by 0 in runs that are all warm-up.
        progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1 / steps_per_epoch)
        return end_lr + (lr - end_lr) * (1 + math.cos(math.pi * min(progress, 1))) / 2

    return schedule


def decayed(params):
    """Returns the mask of weight decay: True for all but biases and one-dimensional tensors.

    As in every published MViT recipe, positional embeddings (also relative ones), the class token
    and pooling kernels are decayed; each has at least two dimensions here.
    """

    def rule(path, leaf) -> bool:
        return jnp.ndim(leaf) > 1 and path[-1].key != "bias"

    return jax.tree_util.tree_map_with_path(rule, params)


def layers(params):
    """Returns the layer of each tensor for layer decay.

    Layer 0 has the patch embedding, class token and positional embeddings, layer i + 1 block i, and
    layer depth + 1 all other tensors (final norm, head).
    """
    depth = len(params["blocks"])

    def rule(path, leaf) -> int:
        module = path[0].key
        if module == "blocks":
            return int(path[1].key) + 1
        return 0 if module in ("patch_embed", "positions") else depth + 1

    return jax.tree_util.tree_map_with_path(rule, params)


def layer_rates(params, layer_decay: float):
    """Returns each tensor's learning rate factor, `layer_decay` ^ (depth + 1 - layer)."""
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
    """Returns AdamW with decoupled weight decay; `clip_norm` 0 turns gradient clipping off."""
    return optax.chain(
        *_clip_by_global_norm(clip_norm),
        optax.chain(
            optax.scale_by_adam(b1=b1, b2=b2, eps=1e-8),
            optax.add_decayed_weights(weight_decay, mask=decayed),
            _scale_by_learning_rate(),
        ),
        *_scale_by_layer(layer_decay),
    )


def sgd(
    *,
    weight_decay: float,
    momentum: float = 0.9,
    layer_decay: float = 1.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Returns SGD with Nesterov momentum, no dampening, and L2 weight decay in the gradient."""
    return optax.chain(
        *_clip_by_global_norm(clip_norm),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.chain(optax.trace(momentum, nesterov=True), _scale_by_learning_rate()),
        *_scale_by_layer(layer_decay),
    )


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Scales by minus the learning rate, the extra argument `learning_rate` of `update`.

    The state is `optax.ScaleByScheduleState`, for compatibility with older checkpoints.
    """

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        rate = extra["learning_rate"]
        scaled = jax.tree.map(lambda u: jnp.asarray(-rate, u.dtype) * u, updates)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _clip_by_global_norm(clip_norm: float) -> list[optax.GradientTransformation]:
    """Returns PyTorch's gradient clipping; optax's clip_by_global_norm has no epsilon."""

    def clip(gradients, params):
        factor = jnp.minimum(1, clip_norm / (optax.tree.norm(gradients) + CLIP_EPS))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)

    return [optax.stateless(clip)] if clip_norm > 0 else []


def _scale_by_layer(layer_decay: float) -> list[optax.GradientTransformation]:
    """Returns layer decay, the last transformation, so that it scales the weight decay too."""

    def scale(updates, params):
        rates = layer_rates(updates, layer_decay)
        return jax.tree.map(lambda update, rate: update * rate, updates, rates)

    return [optax.stateless(scale)] if layer_decay != 1 else []
