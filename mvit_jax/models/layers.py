"""The small layers of the model: linear layers, layer norm, stochastic depth and the head."""

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

# Standard deviation of initial linear weights, positional embeddings and class token (reference
# code).
INITIAL_STD = 0.02
linear_init = nnx.initializers.truncated_normal(INITIAL_STD)
# PyTorch's default for weights and biases of convolutions: uniform up to +-1 / sqrt(fan in).
conv_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def linear(inputs: int, outputs: int, dtype, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    """Returns a linear layer with the reference code's initialisation."""
    return nnx.Linear(
        inputs, outputs, use_bias=bias, kernel_init=linear_init, dtype=dtype, rngs=rngs
    )


class LayerNorm(nnx.Module):
    """Layer norm over the channels; scale and bias are float32, the output is in `dtype`."""

    def __init__(self, width: int, dtype, eps: float = 1e-6) -> None:
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Rows) -> Rows:
        return jnp.asarray(layer_norm(x, self.scale[...], self.bias[...], self.eps), self.dtype)


class ClassificationHead(nnx.Module):
    """Dropout and a linear layer, applied to one vector per clip, or per box of a clip."""

    def __init__(self, config: MViTConfig, width: int, *, dtype, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout
        self.classifier = linear(width, config.num_classes, dtype, rngs)

    def __call__(
        self, pooled: Float[Array, "batch *boxes channels"], key: Array | None = None
    ) -> Float[Array, "batch *boxes num_classes"]:
        """Returns logits in float32 (float64 for float64 input); a `key` turns dropout on."""
        if key is not None and self.rate > 0:
            keep = jax.random.bernoulli(key, 1 - self.rate, pooled.shape)
            pooled = jnp.where(keep, pooled / (1 - self.rate), 0)
        logits = self.classifier(pooled)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


# Stochastic depth (drop path): a block's branch is dropped for randomly chosen clips.


def fold_keys(key: Array | None, count: int) -> Sequence[Array | None]:
    """Returns `fold_in(key, i)` for i < count, or Nones without a `key`.

    One vmapped operation makes all keys, and compiles as fast as a single `fold_in`.
    """
    return [None] * count if key is None else list(_folded(key, count))


def _folded(key: Array, count: int) -> Array:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))


def drop_path_masks(key: Array | None, rate: Any, clips: Any) -> Sequence[Array | None]:
    """Draws one mask `[clips, 1, 1]` for each of a block's two branches: True keeps the branch.

    Each entry is True with probability 1 - `rate`. None stands for a mask that is True throughout.
    """
    if key is None or (isinstance(rate, float | int) and rate == 0):
        return None, None
    share = 1 - jnp.asarray(rate, jnp.float32)  # float32, as in a loop over blocks
    keys = _folded(key, 2)
    masks = jax.vmap(lambda key: jax.random.bernoulli(key, share, (clips, 1, 1)))(keys)
    return masks[0], masks[1]


def apply_drop_path(x: Tokens, rate: Any, mask: Array | None) -> Tokens:
    """Zeroes a branch where `mask` is False; divides it by 1 - `rate` elsewhere."""
    if mask is None:
        return x
    share = 1 - jnp.asarray(rate, jnp.float32)
    return jnp.where(mask, x / share.astype(x.dtype), 0)
