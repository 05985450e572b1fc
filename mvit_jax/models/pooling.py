"""Poolings of tokens on their grid, as modules (MViT, section 3.1).

A pooling is any class made by `pooling(pool, channels, dtype=, rngs=)`, from the plan of one
pooling and the channels of its tokens, and called with `(tokens, grid)`. It maps tokens `[batch,
1 + THW, channels]` on the grid (T, H, W) to tokens on `pool.output(grid)`, and may own parameters.
`on_grid` lets the class token pass by. `ConvPool`, `MaxPool` and `AvgPool` are the papers'.
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
from mvit_jax.models.ops.attention import Tokens, join_heads, keep, on_grid, split_heads
from mvit_jax.models.plan import Pool, Triple


class ConvPool(nnx.Module):
    """A convolution of each channel by itself, and a norm: P(.) of both papers.

    `pool.heads` heads share the weights. A class token is normalised, but not pooled.
    """

    def __init__(self, pool: Pool, channels: int, *, dtype, rngs: nnx.Rngs) -> None:
        self.pool, self.channels, self.dtype = pool, channels, dtype
        width = channels // pool.heads
        # [kt, kh, kw, 1, width] for the initialiser's fan in: one input channel per group.
        kernel = conv_init(rngs.params(), (*pool.kernel, 1, width), jnp.float32)
        self.kernel = nnx.Param(kernel.squeeze(3))
        self.norm = LayerNorm(width, dtype, pool.norm_eps)

    def __call__(self, tokens: Tokens, grid: Triple) -> Tokens:
        """Pools tokens of all channels on `grid`."""
        return self.normalise(keep(pooling.pool_tokens(tokens, grid, self.pool, self.taps())))

    def taps(self) -> Float[Array, "kt kh kw channels"]:
        """Returns the weights of every channel, in the dtype that the tokens have."""
        return jnp.tile(self.kernel[...].astype(self.dtype), self.pool.heads)

    def normalise(self, tokens: Tokens) -> Tokens:
        """Normalises the channels of each head."""
        return join_heads(self.norm(split_heads(tokens, self.pool.heads)))


class MaxPool(nnx.Module):
    """The maximum of each window; padding never wins."""

    def __init__(self, pool: Pool, channels: int | None = None, *, dtype=None, rngs=None) -> None:
        self.pool = pool

    def __call__(self, tokens: Tokens, grid: Triple) -> Tokens:
        """Pools tokens on `grid`."""
        return on_grid(functools.partial(pooling.max_pool, plan=self.pool), tokens, grid)


class AvgPool(nnx.Module):
    """The mean of each window, padding counted as zeros (the reference code's default)."""

    def __init__(self, pool: Pool, channels: int | None = None, *, dtype=None, rngs=None) -> None:
        self.pool = pool

    def __call__(self, tokens: Tokens, grid: Triple) -> Tokens:
        """Pools tokens on `grid`."""
        return on_grid(functools.partial(pooling.average_pool, plan=self.pool), tokens, grid)


POOLINGS = {"conv": ConvPool, "conv_unshared": ConvPool, "max": MaxPool, "avg": AvgPool}


def pooled(module: Callable[..., Any] | None, pool: Pool | None, x: Tokens, grid: Triple) -> Tokens:
    """Pools tokens by `module`, or returns them where there is no `pool`.

    Raises:
      UserError: the module gives another number of tokens than its plan.
    """
    if module is None or pool is None:
        return x
    y = module(x, grid)
    expected = x.shape[1] - math.prod(grid) + math.prod(pool.output(grid))
    if y.shape[1] != expected:
        raise UserError(
            f"{type(module).__name__} gives {y.shape[1]} tokens, and the grid {pool.output(grid)} "
            f"that its plan has for {grid} needs {expected}: see {pool}"
        )
    return y if isinstance(module, ConvPool) else keep(y)  # a convolution's is kept before its norm


def pooled_pair(
    k: Callable[..., Any] | None, v: Callable[..., Any] | None, pool: Pool | None,
    keys: Tokens, values: Tokens, grid: Triple,
) -> tuple[Tokens, Tokens]:  # fmt: skip
    """Pools keys and values; by a built-in pooling side by side, so in one operation."""
    if pool is None or type(k) not in POOLINGS.values() or type(k) is not type(v):
        return pooled(k, pool, keys, grid), pooled(v, pool, values, grid)
    both = jnp.concatenate([keys, values], axis=-1)  # XLA sees that they come from one product
    if not (isinstance(k, ConvPool) and isinstance(v, ConvPool)):
        keys, values = jnp.split(pooled(k, pool, both, grid), 2, axis=-1)
        return keys, values
    taps = jnp.concatenate([k.taps(), v.taps()], axis=-1)
    both = keep(pooling.pool_tokens(both, grid, pool, taps))
    keys, values = jnp.split(both, 2, axis=-1)
    return k.normalise(keys), v.normalise(values)
