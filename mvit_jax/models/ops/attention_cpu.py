"""softmax(Q K^T) V on CPUs, in blocks of queries whose scores stay in cache.

In a training step, materialised scores pass through memory six times. In MViT's early blocks,
scores are the largest tensor (79 MB for a clip in block 1 of MViT-B 16x4). Here a loop runs over
blocks of queries, and the backward pass rematerialises the softmax, so scores never reach memory.
If all scores fit into the cache, the softmax is saved for the backward pass instead.

In both cases the outputs are divided by the softmax's sums, as outputs are much smaller than
scores. The softmax's gradient needs no sum over scores: sum(P * dP) equals sum(O * dO) in each row.

Processor time of MViT-B 16x4's attention, relative to the reference implementation with XLA's
gradients (2 cores, float32, 2026-11-23):

* block 1: 0.38 forward, 0.49 with gradients;
* blocks 4 to 13: 0.75 forward, 0.78 with gradients.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Number of scores in a block of queries, 4 MB in float32. Blocks of a quarter of this size take up
# to 1.2 times as long; blocks of twice this size take the same time.
BLOCK_SCORES = 2**20
# Maximum number of scores whose softmax is saved: 20 MB in float32.
SAVED_SCORES = 5 * 2**20

Queries = Float[Array, "batch queries channels"]
Keys = Float[Array, "batch keys channels"]
# The softmax's numerators and the reciprocals of their sums; None if rematerialised.
Softmax = (
    tuple[Float[Array, "batch heads queries keys"], Float[Array, "batch heads queries 1"]] | None
)


def forward(
    queries: Queries,
    keys: Keys,
    values: Keys,
    by_query: Float[Array, "batch queries head_features"] | None,
    by_key: Float[Array, "keys features"] | None,
    *,
    heads: int,
) -> tuple[Queries, Softmax]:
    """Returns softmax(Q K^T + by_query by_key^T) V for each head, and the softmax for `backward`.

    Queries must be scaled. Unlike the reference implementation, this one rounds the softmax's
    numerators to the inputs' dtype, and normalises only the output.
    """
    q, k = _with_features(queries, keys, by_query, by_key, heads)
    v = _split(values, heads)
    block = _block(q.shape, k.shape[2])
    if block is None:
        weights, scale = _weights(q, k)
        return _join(_out(weights, scale, v)), (weights, scale)
    out = lax.map(lambda q: _out(*_weights(q, k), v), _blocks(q, block))
    return _join(_unblocked(out, q.shape[2])), None


def backward(
    queries: Queries,
    keys: Keys,
    values: Keys,
    by_query: Float[Array, "batch queries head_features"] | None,
    by_key: Float[Array, "keys features"] | None,
    out: Queries,
    softmax: Softmax,
    gradient: Queries,
    *,
    heads: int,
) -> tuple[Queries, Keys, Keys, Float[Array, "batch queries head_features"] | None]:
    """Returns the gradients of queries, keys, values and by_query, from the output's gradient."""
    q, k = _with_features(queries, keys, by_query, by_key, heads)
    v, out, do = (_split(x, heads) for x in (values, out, gradient))
    if softmax is not None:
        dq, dk, dv = _gradients(q, k, v, softmax[0], softmax[1], out, do)
    else:
        block = _block(q.shape, k.shape[2])
        assert block is not None

        def add_block(sums, rows):
            q, out, do = rows
            dq, dk, dv = _gradients(q, k, v, *_weights(q, k), out, do)
            return (sums[0] + dk, sums[1] + dv), dq

        zeros = [jnp.zeros((*x.shape[:2], x.shape[3], x.shape[2]), _wide(x)) for x in (k, v)]
        rows = tuple(_blocks(x, block) for x in (q, out, do))
        (dk, dv), dq = lax.scan(add_block, tuple(zeros), rows)
        dq = _unblocked(dq, q.shape[2])
    dim = queries.shape[-1] // heads
    dk, dv = (jnp.swapaxes(x, 2, 3).astype(keys.dtype) for x in (dk, dv))
    dfeatures = None if by_query is None else _join(dq[..., dim:])
    return _join(dq[..., :dim]), _join(dk[..., :dim]), _join(dv), dfeatures


def _weights(q, k) -> tuple[Array, Array]:
    """Returns the softmax's numerators, and the reciprocals of their sums."""
    scores = _dot(q, k, 3, 3)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights.astype(q.dtype), 1 / weights.sum(-1, keepdims=True)


def _out(weights, scale, v) -> Array:
    return (_dot(weights, v, 3, 2) * scale).astype(v.dtype)


def _gradients(q, k, v, weights, scale, out, do) -> tuple[Array, Array, Array]:
    """Returns the gradients of q, `[batch, heads, queries, dim]`, and of k and v, transposed.

    The gradients of k and v are `[batch, heads, dim, keys]`. Computing them in this layout avoids a
    transpose of the scores, the largest operand.
    """
    do = do * scale
    row_sums = (do * out).sum(-1, keepdims=True)
    do = do.astype(v.dtype)
    dscores = (weights * (_dot(do, v, 3, 3) - row_sums)).astype(k.dtype)
    dq = _dot(dscores, k, 3, 2).astype(q.dtype)
    return dq, _dot(q, dscores, 2, 2), _dot(do, weights, 2, 2)


def _block(q: tuple[Any, ...], keys: int) -> int | None:
    """Returns the number of queries in a block; None if the softmax of all scores is saved.

    All blocks have about equal length.
    """
    batch, heads, queries, _ = q
    batch = batch if isinstance(batch, int) else 1  # symbolic in an exported program
    if batch * heads * queries * keys <= SAVED_SCORES:
        return None
    blocks = -(-batch * heads * queries * keys // BLOCK_SCORES)
    return max(32, -(-queries // blocks // 8) * 8)


def _with_features(queries, keys, by_query, by_key, heads: int) -> tuple[Array, Array]:
    """Returns queries and keys split into heads, with relative positional features appended."""
    q, k = _split(queries, heads), _split(keys, heads)
    if by_query is None:
        return q, k
    by_key = jnp.broadcast_to(by_key.astype(k.dtype), (*k.shape[:3], by_key.shape[-1]))
    return jnp.concatenate([q, _split(by_query, heads)], -1), jnp.concatenate([k, by_key], -1)


def _split(x, heads: int) -> Float[Array, "batch heads tokens dim"]:
    return jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)


def _join(x) -> Float[Array, "batch tokens channels"]:
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def _blocks(x, block: int) -> Float[Array, "blocks batch heads block dim"]:
    batch, heads, tokens, dim = x.shape
    blocks = -(-tokens // block)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, blocks * block - tokens), (0, 0)])
    return jnp.moveaxis(x.reshape(batch, heads, blocks, block, dim), 2, 0)


def _unblocked(x, tokens: int) -> Float[Array, "batch heads {tokens} dim"]:
    blocks, batch, heads, block, dim = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(batch, heads, blocks * block, dim)[:, :, :tokens]


def _dot(a, b, contract_a: int, contract_b: int) -> Array:
    axes = (((contract_a,), (contract_b,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, axes, preferred_element_type=_wide(a))


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)
