"""AdamW with warm-up and half cosine, as the papers train (MViT, section D.1)."""

import jax
import jax.numpy as jnp
import optax


def learning_rate(
    *, lr: float, start_lr: float, end_lr: float, warmup_steps: int, steps: int
) -> optax.Schedule:
    """Linear from `start_lr` to `lr`, then half a cosine down to `end_lr` at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=start_lr,
        peak_value=lr,
        warmup_steps=warmup_steps,
        decay_steps=max(steps, warmup_steps + 1),
        end_value=end_lr,
    )


def decayed(params):
    """True for the tensors that weight decay shrinks: all but biases and one-dimensional ones.

    Positions and the class token are decayed, as in every published MViT recipe.
    """

    def rule(path, leaf) -> bool:
        return jnp.ndim(leaf) > 1 and path[-1].key != "bias"

    return jax.tree_util.tree_map_with_path(rule, params)


def adamw(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW with decoupled decay; gradients are first clipped to a global norm, where above 0."""
    steps = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    steps.append(optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed))
    return optax.chain(*steps)
