"""AdamW, SGD, averaged parameters and the learning rates of the papers (MViT, D; MViTv2, B).

The arithmetic is the same as in PyTorch, with which the published models were trained. As in the
reference code, the schedule is a function of fractional epochs. A step has this order:

1. Gradients are clipped to a global norm.
2. SGD adds weight decay to the gradient (L2); AdamW's weight decay is decoupled.
3. Updates are multiplied by the learning rate and, with layer decay, by the factor of the layer.
"""

import math
from collections.abc import Callable
from typing import Any

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

    Step s, counted from 0, is at epoch e = s / `steps_per_epoch`. The cosine's argument is
    pi (e - warmup_epochs) / (epochs - warmup_epochs), so the last step's rate is slightly above
    `end_lr`. As in the reference code, rates are computed on the host in float64. The compiled step
    takes the rate as an argument, so that other rates need no recompilation.

    Args:
      lr: learning rate at the end of the warm-up.
      start_lr: learning rate at step 0.
      end_lr: learning rate at epoch `epochs`.
      warmup_epochs: length of the warm-up in epochs.
      epochs: length of the run in epochs.
      steps_per_epoch: a positive number, possibly a fraction.
    """

    def schedule(step: int) -> float:
        epoch = step / steps_per_epoch
        if epoch < warmup_epochs:
            return start_lr + (lr - start_lr) * epoch / max(warmup_epochs, 1 / steps_per_epoch)
        # The maximum avoids division by 0 in runs that are all warm-up.
        progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1 / steps_per_epoch)
        return end_lr + (lr - end_lr) * (1 + math.cos(math.pi * min(progress, 1))) / 2

    return schedule


def ema_step_size(step: Any, decay: float, warmup: bool) -> Any:
    """Returns the weight of the new parameters in their average (EMA): 1 - the decay of a step.

    With `warmup`, the decay is at most 1 - (1 + step)^(-2/3), as in timm's `ModelEmaV3`, and the
    average of step 0 is the new parameters alone.

    Args:
      step: the step, counted from 0; a number or an array.
      decay: the decay after the warm-up.
      warmup: True for a warm-up.
    """
    return jnp.maximum(1 - decay, (1.0 + step) ** (-2 / 3)) if warmup else 1 - decay


def ema_initial_share(steps: int, decay: float, warmup: bool) -> float:
    """Returns the weight of the initial parameters in their average after `steps` steps."""
    return 0.0 if warmup and steps > 0 else decay**steps


def decay_mask(params):
    """Returns the mask of weight decay: True for all but biases and one-dimensional tensors.

    As in every published MViT recipe, weight decay applies to positional embeddings (absolute and
    relative), the class token and pooling kernels. Each has at least two dimensions here.
    """

    def rule(path, leaf) -> bool:
        return jnp.ndim(leaf) > 1 and path[-1].key != "bias"

    return jax.tree_util.tree_map_with_path(rule, params)


def layers(params):
    """Returns the layer of each tensor for layer decay.

    Layer 0 is the patch embedding, class token and positional embeddings. Layer i + 1 is block i.
    Layer depth + 1 is all other tensors (final norm, head). `params` may be the trained parameters
    alone (`partition`).
    """
    depth = 1 + max(map(int, params.get("blocks", {})), default=-1)

    def rule(path, leaf) -> int:
        module = path[0].key
        if module == "blocks":
            return int(path[1].key) + 1
        return 0 if module in ("patch_embed", "positions") else depth + 1

    return jax.tree_util.tree_map_with_path(rule, params)


def layer_rates(params, layer_decay: float):
    """Returns each tensor's learning rate factor, `layer_decay` ^ (depth + 1 - layer)."""
    numbers = layers(params)
    last = max(jax.tree.leaves(numbers))  # of the head
    return jax.tree.map(lambda layer: layer_decay ** (last - layer), numbers)


def partition(params: dict[str, Any], trained_blocks: int | None) -> tuple[Any, Any]:
    """Splits parameters, or any tree of the same keys, into trained and frozen ones.

    Args:
      params: the nested dict.
      trained_blocks: number of trained last blocks. The head is always trained, and the final norm
        if any block is. None trains everything.

    Returns:
      Two nested dicts with disjoint leaves; `merge` is the inverse.
    """
    if trained_blocks is None:
        return params, {}
    first = len(params["blocks"]) - trained_blocks
    trained: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for name, module in params.items():
        if name == "blocks":
            for index, block in module.items():
                part = trained if int(index) >= first else frozen
                part.setdefault(name, {})[index] = block
        else:
            is_trained = name == "head" or (name == "norm" and trained_blocks > 0)
            (trained if is_trained else frozen)[name] = module
    return trained, frozen


def merge(trained: Any, frozen: dict[str, Any]) -> Any:
    """Returns the tree that `partition` has split."""
    if not frozen:
        return trained
    blocks = frozen.get("blocks", {}) | trained.get("blocks", {})
    return frozen | trained | {"blocks": blocks}


def of_trained(
    transform: optax.GradientTransformation, trained_blocks: int | None
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimiser of the trained parameters alone, which has no state of frozen ones.

    `init` and `update` take all parameters; gradients and updates are those of the trained ones.
    """
    transform = optax.with_extra_args_support(transform)

    def init(params):
        return transform.init(partition(params, trained_blocks)[0])

    def update(updates, state, params=None, **extra):
        trained = None if params is None else partition(params, trained_blocks)[0]
        return transform.update(updates, state, trained, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


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
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
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
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.chain(optax.trace(momentum, nesterov=True), _scale_by_learning_rate()),
        *_scale_by_layer(layer_decay),
    )


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus `learning_rate`, an extra argument of `update`.

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
    """Returns layer decay; as the last transformation, it also scales the weight decay."""

    def scale(updates, params):
        rates = layer_rates(updates, layer_decay)
        return jax.tree.map(lambda update, rate: update * rate, updates, rates)

    return [optax.stateless(scale)] if layer_decay != 1 else []
