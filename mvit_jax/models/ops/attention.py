"""Multi-head pooling attention (MViT, section 3.1), as functions on arrays.

Tokens are one sequence `[batch, 1 + THW, channels]`, class token first, or `[batch, THW, channels]`
in models without a class token. Functions get the grid (T, H, W) as a separate argument.

A class token in a separate array would double the number of operations to compile. A TPU's training
step would also move 1 to 20 % more bytes, depending on the layout. The best such layout moved
42.2 GB and one sequence 41.8 GB (4 clips of MViT-B 16x4, compiled for v5e, 2026-11-22,
`benchmarks/token_layout.py`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mvit_jax.models.ops import attention_cpu, attention_tpu
from mvit_jax.models.ops.dispatch import (
    batch_is_divisible,
    kernels_allowed,
    on_each_device,
    uses_reference,
    with_gradient_of,
)
from mvit_jax.models.plan import Triple

# Leading underscores disable jaxtyping's check that a size is equal in all arguments and outputs.
Tokens = Float[Array, "batch _tokens _channels"]
QueryFeatures = Float[Array, "batch _queries _heads _features"]
KeyFeatures = Float[Array, "_keys _features"]
SAVED = "saved"  # the name of activations marked by `mark_saved`
Record = dict[str, Array]  # the captured intermediates of a block's attention


def mark_saved(x: Any) -> Any:
    """Marks activations that are expensive to compute, so that `remat="cheap"` saves them."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, SAVED), x)


def on_grid(function: Callable[[Array], Array], x: Tokens, grid: Triple) -> Tokens:
    """Returns tokens after applying `function` to them on their grid.

    The class token passes through unchanged; with a class token, `function` must not change the
    number of channels.

    Args:
      function: maps `[batch, T, H, W, channels]` to an array of the same rank.
      x: the tokens, class token first.
      grid: (T, H, W) of the tokens.
    """
    batch, tokens, channels = x.shape
    first = tokens - math.prod(grid)  # 1 with a class token, else 0
    out = function(x[:, first:].reshape(batch, *grid, channels))
    flat = out.reshape(batch, math.prod(out.shape[1:4]), out.shape[-1])
    return jnp.concatenate([x[:, :first], flat], axis=1) if first else flat


def split_heads(x: Float[Array, "*rows channels"], heads: int) -> Float[Array, "*rows heads dim"]:
    """Returns `x` with channels split into heads: the first `dim` channels are the first head."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def join_heads(x: Float[Array, "*rows heads dim"]) -> Float[Array, "*rows channels"]:
    return x.reshape(*x.shape[:-2], -1)


def relative_features(
    queries: Tokens,
    tables: dict[str, Float[Array, "queries_of_axis keys_of_axis dim"]],
    query_grid: Triple,
    key_grid: Triple,
    heads: int,
) -> tuple[QueryFeatures, KeyFeatures]:
    """Returns relative positional embeddings as features of queries and keys (MViTv2, equation 4).

    Equation 4 adds one product q.R per axis to the score of a query q and a key. R is the embedding
    of their distance along the axis. With features appended to queries and keys, the score's dot
    product includes these products. A query's features are its products q.R for every key index
    along each axis. A key's features are its indices as one-hot vectors. No array of all query-key
    pairs is needed, so fused attention kernels can be used. The q in q.R is not scaled, as in the
    reference code and unlike in the paper. The class token's features are zeros.

    Args:
      queries: pooled and normalised queries, class token first.
      tables: the embeddings R for each pair of query and key index, by axis: any of "time",
        "height" and "width".
      query_grid: (T, H, W) of the queries.
      key_grid: (T, H, W) of the keys.
      heads: number of heads.
    """
    first = queries.shape[1] - math.prod(query_grid)
    q = split_heads(queries[:, first:], heads)
    q = q.reshape(q.shape[0], *query_grid, *q.shape[2:])
    products = {
        "time": "bthwnd,tkd->bthwnk",
        "height": "bthwnd,hkd->bthwnk",
        "width": "bthwnd,wkd->bthwnk",
    }
    by_query = jnp.concatenate([jnp.einsum(products[a], q, tables[a]) for a in tables], axis=-1)
    by_query = by_query.reshape(q.shape[0], -1, *by_query.shape[4:])
    axes = zip(products, key_grid, np.indices(key_grid), strict=True)
    by_key = np.concatenate([np.eye(n)[index.ravel()] for a, n, index in axes if a in tables], 1)
    by_query = jnp.pad(by_query, [(0, 0), (first, 0), (0, 0), (0, 0)])
    return by_query, jnp.asarray(np.pad(by_key, [(first, 0), (0, 0)]), by_query.dtype)


def attend(
    queries: Float[Array, "batch queries channels"],
    keys: Float[Array, "batch keys channels"],
    values: Float[Array, "batch keys channels"],
    heads: int,
    relative: "tuple[QueryFeatures, KeyFeatures] | None" = None,
    record: Record | None = None,
) -> Float[Array, "batch queries channels"]:
    """Returns softmax(Q K^T / sqrt(dim) + relative embeddings) V for each head (section 3.1).

    The softmax is computed in float32, or in float64 for float64 queries.

    Args:
      queries: not scaled, head-major.
      keys: head-major.
      values: head-major.
      heads: number of heads.
      relative: the result of `relative_features`, or None.
      record: if not None, `record["attention"]` is set to the probabilities. This materialises
        them, which fused kernels avoid.
    """
    scaled = queries * (queries.shape[-1] // heads) ** -0.5
    by_query, by_key = (None, None) if relative is None else (join_heads(relative[0]), relative[1])
    if record is not None or uses_reference():
        return materialised(scaled, keys, values, by_query, by_key, heads, record)
    return fused(scaled, keys, values, by_query, by_key, heads)


def materialised(
    queries: Tokens,
    keys: Tokens,
    values: Tokens,
    by_query: Tokens | None,
    by_key: KeyFeatures | None,
    heads: int,
    record: Record | None = None,
) -> Tokens:
    """Returns softmax(Q K^T + by_query by_key^T) V for each head: the reference implementation.

    All scores are materialised. Queries must be scaled; `by_query` is
    `[batch, queries, heads * features]`, `by_key` is `[keys, features]`.
    """
    q, k, v = _by_head(queries, keys, values, by_query, by_key, heads)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))
    if record is not None:
        record["attention"] = weights
    return join_heads(jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v))


def _by_head(queries, keys, values, by_query, by_key, heads: int) -> tuple[Array, Array, Array]:
    """Splits heads and appends relative positional features to queries and keys."""
    q, k, v = (split_heads(x, heads) for x in (queries, keys, values))
    if by_query is not None:
        by_key = jnp.broadcast_to(by_key[None, :, None], (*k.shape[:3], by_key.shape[-1]))
        q = jnp.concatenate([q, split_heads(by_query, heads)], -1)
        k = jnp.concatenate([k, by_key], -1)
    return q, k, v


# The implementation of `fused` is chosen when a program is lowered for a platform, for the forward
# and for the backward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def fused(
    queries: Tokens,
    keys: Tokens,
    values: Tokens,
    by_query: Tokens | None,
    by_key: KeyFeatures | None,
    heads: int,
) -> Tokens:
    """Returns the result of `materialised`, computed by the platform's fastest implementation.

    The gradient of `by_key` is zero.
    """
    return _fused_forward(queries, keys, values, by_query, by_key, heads)[0]


def _fused_forward(queries, keys, values, by_query, by_key, heads: int):
    arrays = queries, keys, values, by_query, by_key
    on_cpu = functools.partial(attention_cpu.forward, heads=heads)
    softmax = jax.eval_shape(on_cpu, *arrays)[1]

    # `platform_dependent` requires equal outputs; only the CPU implementation saves the softmax.
    def without_softmax(function):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), softmax)  # not allocated
        return lambda *arrays: (function(*arrays), zeros)

    implementations: dict[str, Callable] = {"cpu": on_cpu}
    if _tpu_supports(queries, keys):
        on_tpu = on_each_device(functools.partial(attention_tpu.forward, heads=heads))
        plain = functools.partial(materialised, heads=heads)
        implementations["tpu"] = without_softmax(with_gradient_of(plain, on_tpu))
    if _cudnn_supports(queries, by_key, heads):
        implementations["cuda"] = without_softmax(functools.partial(_cudnn, heads=heads))
    default = without_softmax(functools.partial(materialised, heads=heads))
    out, softmax = lax.platform_dependent(*arrays, default=default, **implementations)
    out, softmax = mark_saved((out, softmax))
    return out, (*arrays, out, softmax)


def _fused_backward(heads: int, saved: tuple, gradient: Tokens):
    def default(queries, keys, values, by_query, by_key, out, softmax, gradient):
        function = functools.partial(materialised, by_key=by_key, heads=heads)
        return jax.vjp(function, queries, keys, values, by_query)[1](gradient)

    def on_tpu(queries, keys, values, by_query, by_key, out, softmax, gradient):
        kernel = on_each_device(functools.partial(attention_tpu.backward, heads=heads))

        def plain(queries, keys, values, by_query, by_key, gradient):
            return default(queries, keys, values, by_query, by_key, out, softmax, gradient)

        kernel = with_gradient_of(plain, kernel)
        return kernel(queries, keys, values, by_query, by_key, gradient)

    def on_cuda(queries, keys, values, by_query, by_key, out, softmax, gradient):
        function = functools.partial(_cudnn, by_key=by_key, heads=heads)
        return jax.vjp(function, queries, keys, values, by_query)[1](gradient)

    implementations: dict[str, Callable] = {
        "cpu": functools.partial(attention_cpu.backward, heads=heads)
    }
    if _tpu_supports(*saved[:2]):
        implementations["tpu"] = on_tpu
    if _cudnn_supports(saved[0], saved[4], heads):
        implementations["cuda"] = on_cuda
    gradients = lax.platform_dependent(*saved, gradient, default=default, **implementations)
    by_key = saved[4]  # one-hot indices, which have no gradient
    return *gradients, None if by_key is None else jnp.zeros_like(by_key)


fused.defvjp(_fused_forward, _fused_backward)


def _tpu_supports(queries: Tokens, keys: Tokens) -> bool:
    return attention_tpu.fits(queries, keys) and batch_is_divisible(queries.shape[0])


def _cudnn_supports(queries: Tokens, by_key: KeyFeatures | None, heads: int) -> bool:
    """Returns True if cuDNN's fused attention supports the GPU, the dtype and the head width."""
    if jax.default_backend() != "gpu" or queries.dtype.itemsize != 2 or not kernels_allowed():
        return False
    # "8.0" for Ampere, the first supported generation; on AMD GPUs the value is a name.
    generation = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
    if not generation.isdecimal() or int(generation) < 8:
        return False
    features = 0 if by_key is None else by_key.shape[-1]
    limit = 256 if int(generation) >= 9 else 128  # from Hopper on, 256
    return queries.shape[-1] // heads + features <= limit


def _cudnn(queries, keys, values, by_query, by_key, heads: int):
    """Computes attention by cuDNN, with relative positional features appended.

    cuDNN requires one width for Q, K and V, a multiple of 8. Its gradients require even numbers of
    queries and keys. Q, K and V are padded with zeros to fit, and sequence lengths mask the padded
    tokens.
    """
    q, k, v = _by_head(queries, keys, values, by_query, by_key, heads)
    width = -(-q.shape[-1] // 8) * 8
    lengths: dict[str, Any] = {}
    if q.shape[1] % 2 or k.shape[1] % 2:
        lengths = {
            "query_seq_lengths": jnp.full(len(q), q.shape[1], jnp.int32),
            "key_value_seq_lengths": jnp.full(len(k), k.shape[1], jnp.int32),
        }

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, width - x.shape[-1])])

    out = jax.nn.dot_product_attention(
        pad(q), pad(k), pad(v), scale=1.0, implementation="cudnn", **lengths
    )
    return join_heads(out[:, : q.shape[1], :, : v.shape[-1]])
