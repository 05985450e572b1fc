"""Pooling modules for tokens on a grid (MViT, section 3.1).

A pooling module is built by `pooling(pool, channels, dtype=, rngs=)`, from a `Pool` and the width
of its tokens, and called with `(tokens, grid)`. It maps tokens `[batch, 1 + THW, channels]` (THW
without a class token) on the grid (T, H, W) to tokens on `pool.output(grid)`, and may have
parameters. The helper `on_grid` passes a class token through. `ConvPool`, `MaxPool` and `AvgPool`
are the papers' poolings.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mvit_jax.common.errors import UserError
from mvit_jax.models.layers import LayerNorm, conv_init
from mvit_jax.models.ops import pooling
from mvit_jax.models.ops.attention import Tokens, join_heads, mark_saved, on_grid, split_heads
from mvit_jax.models.plan import Pool, Triple


class ConvPool(nnx.Module):
    """A depthwise convolution and a layer norm: the pooling of both papers' models.

    `pool.heads` heads share the weights. The class token is normalised, but not pooled.
    """

    def __init__(self, pool: Pool, channels: int, *, dtype, rngs: nnx.Rngs) -> None:
        self.pool, self.channels, self.dtype = pool, channels, dtype
        width = channels // pool.heads
        # [kt, kh, kw, 1, width] for the initialiser's fan in: one input channel per group
        kernel = conv_init(rngs.params(), (*pool.kernel, 1, width), jnp.float32)
        self.kernel = nnx.Param(kernel.squeeze(3))
        self.norm = LayerNorm(width, dtype, pool.norm_eps)

    def __call__(self, tokens: Tokens, grid: Triple) -> Tokens:
        """Returns the pooled, normalised tokens."""
        pooled = pooling.pool_tokens(tokens, grid, self.pool, self.taps())
        return self.normalise(mark_saved(pooled))

    def taps(self) -> Float[Array, "kt kh kw channels"]:
        """Returns the convolution's weights for all heads, in the dtype of the computation."""
        return jnp.tile(self.kernel[...].astype(self.dtype), self.pool.heads)

    def normalise(self, tokens: Tokens) -> Tokens:
        """Returns the tokens after a layer norm over the channels of each head."""
        return join_heads(self.norm(split_heads(tokens, self.pool.heads)))


class MaxPool(nnx.Module):
    """The maximum over the pooling kernel; padding is minus infinity."""

    def __init__(self, pool: Pool, channels: int | None = None, *, dtype=None, rngs=None) -> None:
        self.pool = pool

    def __call__(self, tokens: Tokens, grid: Triple) -> Tokens:
        """Returns the pooled tokens."""
        return on_grid(functools.partial(pooling.max_pool, plan=self.pool), tokens, grid)


class AvgPool(nnx.Module):
    """The mean over the pooling kernel; padding counts as zeros (the reference code's default)."""

    def __init__(self, pool: Pool, channels: int | None = None, *, dtype=None, rngs=None) -> None:
        self.pool = pool

    def __call__(self, tokens: Tokens, grid: Triple) -> Tokens:
        """Returns the pooled tokens."""
        return on_grid(functools.partial(pooling.average_pool, plan=self.pool), tokens, grid)


POOLINGS = {"conv": ConvPool, "conv_unshared": ConvPool, "max": MaxPool, "avg": AvgPool}


def apply_pooling(
    module: Callable[..., Any] | None, pool: Pool | None, x: Tokens, grid: Triple
) -> Tokens:
    """Returns the tokens pooled by `module`, or the tokens themselves without a `pool`.

    Raises:
      UserError: the module returns a number of tokens that does not fit `pool.output(grid)`.
    """
    if module is None or pool is None:
        return x
    y = module(x, grid)
    expected = x.shape[1] - math.prod(grid) + math.prod(pool.output(grid))
    if y.shape[1] != expected:
        raise UserError(
            f"{type(module).__name__} returns {y.shape[1]} tokens, but the pooled grid "
            f"{pool.output(grid)} requires {expected}: it pools the grid {grid} by {pool}"
        )
    return y if isinstance(module, ConvPool) else mark_saved(y)  # ConvPool marks its norm's input


def apply_pooling_pair(
    k: Callable[..., Any] | None, v: Callable[..., Any] | None, pool: Pool | None,
    keys: Tokens, values: Tokens, grid: Triple,
) -> tuple[Tokens, Tokens]:  # fmt: skip
    """Returns pooled keys and values; built-in poolings pool both in one operation."""
    if pool is None or type(k) not in POOLINGS.values() or type(k) is not type(v):
        return apply_pooling(k, pool, keys, grid), apply_pooling(v, pool, values, grid)
    # XLA cancels this concatenation against the split in `PooledAttention._project`.
    both = jnp.concatenate([keys, values], axis=-1)
    if not (isinstance(k, ConvPool) and isinstance(v, ConvPool)):
        keys, values = jnp.split(apply_pooling(k, pool, both, grid), 2, axis=-1)
        return keys, values
    taps = jnp.concatenate([k.taps(), v.taps()], axis=-1)
    both = mark_saved(pooling.pool_tokens(both, grid, pool, taps))
    keys, values = jnp.split(both, 2, axis=-1)
    return k.normalise(keys), v.normalise(values)
