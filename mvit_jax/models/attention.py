"""Multi-head pooling attention (MViT, section 3.1), as plain functions on arrays.

Tokens travel as one sequence `[batch, 1 + THW, channels]`, class token first (or `[batch, THW,
channels]` where a model has none), beside the grid (T, H, W) that they lie on; only pooling unfolds
them. Keeping the class token apart from the grid instead moves 1 to 20 % more bytes in a training
step on a TPU (41.8 GB for 4 clips of MViT-B 16x4 against 42.2 with a flat grid; compiled for v5e,
2026-11-22, `benchmarks/token_layout.py`), and doubles the operations to compile.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mvit_jax.models.plan import Triple

# Not bound to one number each, since what goes in and what comes out differ.
Tokens = Float[Array, "batch _tokens _channels"]


def on_grid(function: Callable[[Array], Array], x: Tokens, grid: Triple) -> tuple[Tokens, Triple]:
    """Applies `function`, from grid `[batch, T, H, W, channels]` to grid, to the tokens that lie on
    it; a class token before them stays as it is. Returns the tokens and their new grid."""
    batch, tokens, channels = x.shape
    first = tokens - math.prod(grid)  # 1 with a class token, else 0
    out = function(x[:, first:].reshape(batch, *grid, channels))
    t, h, w = out.shape[1:4]
    flat = out.reshape(batch, t * h * w, out.shape[-1])
    return (jnp.concatenate([x[:, :first], flat], axis=1) if first else flat), (t, h, w)


def split_heads(x: Float[Array, "*rows channels"], heads: int) -> Float[Array, "*rows heads dim"]:
    """Channels are head-major: all of the first head, then all of the second, ..."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def join_heads(x: Float[Array, "*rows heads dim"]) -> Float[Array, "*rows channels"]:
    return x.reshape(*x.shape[:-2], -1)


def attend(
    queries: Float[Array, "batch queries channels"],
    keys: Float[Array, "batch keys channels"],
    values: Float[Array, "batch keys channels"],
    heads: int,
) -> Float[Array, "batch queries channels"]:
    """softmax(Q K^T / sqrt(dim)) V for each head (section 3.1).

    The softmax is taken in float32, or in float64 where the queries are.
    """
    q, k, v = (split_heads(x, heads) for x in (queries, keys, values))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))
    return join_heads(jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v))
