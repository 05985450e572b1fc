"""Multi-head pooling attention (MViT, section 3.1), as plain functions on arrays.

Tokens travel as a pair, the class token apart from the grid: pooling, positions and skips touch the
grid alone, and one sequence `[batch, 1 + THW, channels]` would be cut and joined again around every
one of them. `TOKEN_LAYOUT_FIGURE`
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Tokens(NamedTuple):
    """The tokens of a batch of clips. Functions of single tokens go over both by `jax.tree.map`."""

    cls: Float[Array, "batch 1 channels"] | None  # the class token, where the model has one
    grid: Float[Array, "batch time height width channels"]


def split_heads(x: Float[Array, "*grid channels"], heads: int) -> Float[Array, "*grid heads dim"]:
    """Channels are head-major: all of the first head, then all of the second, ..."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def join_heads(x: Float[Array, "*grid heads dim"]) -> Float[Array, "*grid channels"]:
    return x.reshape(*x.shape[:-2], -1)


def sequence(tokens: Tokens) -> Float[Array, "batch tokens channels"]:
    """Class token first, then the grid by time, height, width."""
    batch, *_, channels = tokens.grid.shape
    flat = tokens.grid.reshape(batch, -1, channels)
    return flat if tokens.cls is None else jnp.concatenate([tokens.cls, flat], axis=1)


def attend(
    queries: Float[Array, "batch *grid channels"],
    keys: Float[Array, "batch tokens channels"],
    values: Float[Array, "batch tokens channels"],
    heads: int,
) -> Float[Array, "batch *grid channels"]:
    """softmax(Q K^T / sqrt(dim)) V for each head, in the shape of the queries (section 3.1).

    Each query is answered by itself, so the class token and the grid may ask in separate calls. The
    softmax is taken in float32, or in float64 where the queries are.
    """
    q = split_heads(queries.reshape(queries.shape[0], -1, queries.shape[-1]), heads)
    k, v = split_heads(keys, heads), split_heads(values, heads)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))
    out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
    return join_heads(out).reshape(queries.shape)
