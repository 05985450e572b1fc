"""Parts that every block uses: linear layers, norms, stochastic depth; and the classifier."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mvit_jax.models.ops.attention import Tokens
from mvit_jax.models.ops.layer_norm import Rows, layer_norm
from mvit_jax.models.plan import MViTConfig

INITIAL_STD = 0.02  # of linear weights, positions and class token (reference code)
linear_init = nnx.initializers.truncated_normal(INITIAL_STD)
# What PyTorch gives a convolution, weight and bias alike: uniform within 1 / sqrt(fan in).
conv_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def linear(inputs: int, outputs: int, dtype, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    """Returns a linear layer that starts as in the reference code."""
    return nnx.Linear(
        inputs, outputs, use_bias=bias, kernel_init=linear_init, dtype=dtype, rngs=rngs
    )


class LayerNorm(nnx.Module):
    """Layer norm over the channels; scale and bias are float32, the result is in `dtype`."""

    def __init__(self, width: int, dtype, eps: float = 1e-6) -> None:
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Rows) -> Rows:
        return jnp.asarray(layer_norm(x, self.scale[...], self.bias[...], self.eps), self.dtype)


class ClassificationHead(nnx.Module):
    """Dropout and a linear layer, on one vector for each clip."""

    def __init__(self, config: MViTConfig, width: int, *, dtype, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout
        self.classifier = linear(width, config.num_classes, dtype, rngs)

    def __call__(
        self, pooled: Float[Array, "batch channels"], key: Array | None = None
    ) -> Float[Array, "batch num_classes"]:
        """Returns logits in float32 (float64 for such input); with a `key`, dropout is on."""
        if key is not None and self.rate > 0:
            keep = jax.random.bernoulli(key, 1 - self.rate, pooled.shape)
            pooled = jnp.where(keep, pooled / (1 - self.rate), 0)
        logits = self.classifier(pooled)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


# Drop path (stochastic depth): a branch of a block is left out for some clips.


def fold(key: Array | None, count: int) -> Sequence[Array | None]:
    """Returns `fold_in(key, i)` for i < count: one operation, which compiles as fast as one key."""
    return [None] * count if key is None else list(_folded(key, count))


def _folded(key: Array, count: int) -> Array:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))


def draw_clips(key: Array | None, rate: Any, clips: Any) -> Sequence[Array | None]:
    """Draws the clips that keep the first and the second branch of a block, `[clips, 1, 1]`.

    A random share 1 - `rate` of them keeps each; None stands for all clips.
    """
    if key is None or (isinstance(rate, float | int) and rate == 0):
        return None, None
    kept = 1 - jnp.asarray(rate, jnp.float32)  # in float32, as a loop over blocks has it
    keys = _folded(key, 2)
    drawn = jax.vmap(lambda key: jax.random.bernoulli(key, kept, (clips, 1, 1)))(keys)
    return drawn[0], drawn[1]


def drop_clips(x: Tokens, rate: Any, kept: Array | None) -> Tokens:
    """Removes a branch from the clips that do not keep it, and scales the others up."""
    if kept is None:
        return x
    share = 1 - jnp.asarray(rate, jnp.float32)
    return jnp.where(kept, x / share.astype(x.dtype), 0)
