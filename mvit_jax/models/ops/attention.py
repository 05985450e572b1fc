"""Multi-head pooling attention (MViT, section 3.1), as plain functions on arrays.

Tokens travel as one sequence `[batch, 1 + THW, channels]`, class token first (or `[batch, THW,
channels]` where a model has none), beside the grid (T, H, W) that they lie on; only pooling unfolds
them. Keeping the class token apart from the grid instead moves 1 to 20 % more bytes in a training
step on a TPU (41.8 GB for 4 clips of MViT-B 16x4 against 42.2 with a flat grid; compiled for v5e,
2026-11-22, `benchmarks/token_layout.py`), and doubles the operations to compile.
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
    by_definition,
    each_device_has_clips,
    kernels_allowed,
    on_each_device,
    with_gradient_of,
)
from mvit_jax.models.plan import Triple

# Not bound to one number each, since what goes in and what comes out differ.
Tokens = Float[Array, "batch _tokens _channels"]
QueryFeatures = Float[Array, "batch _queries _heads _places"]
KeyFeatures = Float[Array, "_keys _places"]
KEPT = "kept"  # the name of what `keep` marks
Record = dict[str, Array]  # what one block's attention lets out for inspection


def keep(x: Any) -> Any:
    """Marks what costs much to compute, so that `remat="cheap"` keeps it."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, KEPT), x)


def on_grid(function: Callable[[Array], Array], x: Tokens, grid: Triple) -> Tokens:
    """Applies `function`, from `[batch, T, H, W, channels]` to any grid, to tokens that lie on one.

    A class token before them passes by, so `function` must keep the channels where there is one.
    """
    batch, tokens, channels = x.shape
    first = tokens - math.prod(grid)  # 1 with a class token, else 0
    out = function(x[:, first:].reshape(batch, *grid, channels))
    flat = out.reshape(batch, math.prod(out.shape[1:4]), out.shape[-1])
    return jnp.concatenate([x[:, :first], flat], axis=1) if first else flat


def split_heads(x: Float[Array, "*rows channels"], heads: int) -> Float[Array, "*rows heads dim"]:
    """Channels are head-major: all of the first head, then all of the second, ..."""
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
    """Relative positions as features to append to queries and keys (MViTv2, equation 4).

    A score gets q.R for the distance along each axis. That is the product of appended features:
    those of a query are its q.R for each place along an axis, those of a key are one-hot rows of
    its own place. So no table of all pairs is made, and a fused attention kernel can be used. The
    queries are the pooled, normalised ones, not scaled (unlike the paper's equation, the reference
    code scales only Q K^T). The class token, as query and as key, gets zeros.

    Args:
      queries: all of the channels, class token first where there is one.
      tables: for some of "time", "height", "width", the rows R of each pair of places.
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
    places = zip(products, key_grid, np.indices(key_grid), strict=True)
    by_key = np.concatenate([np.eye(n)[place.ravel()] for a, n, place in places if a in tables], 1)
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
    """softmax(Q K^T / sqrt(dim) + relative positions) V for each head (section 3.1).

    The softmax is taken in float32, or in float64 where the queries are. `relative` comes from
    `relative_features`. A `record` gets the probabilities, which are made for it alone: where they
    are not asked for, a platform that has a kernel for it never writes them.
    """
    scaled = queries * (queries.shape[-1] // heads) ** -0.5
    by_query, by_key = (None, None) if relative is None else (join_heads(relative[0]), relative[1])
    if record is not None or by_definition():
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
    """softmax(Q K^T + by_query by_key^T) V for each head, all scores written: the definition.

    Queries come scaled; `by_query` [batch, queries, heads * places], `by_key` [keys, places].
    """
    q, k, v = _by_head(queries, keys, values, by_query, by_key, heads)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))
    if record is not None:
        record["attention"] = weights
    return join_heads(jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v))


def _by_head(queries, keys, values, by_query, by_key, heads: int) -> tuple[Array, Array, Array]:
    """Splits heads; relative positions are appended to queries and keys."""
    q, k, v = (split_heads(x, heads) for x in (queries, keys, values))
    if by_query is not None:
        by_key = jnp.broadcast_to(by_key[None, :, None], (*k.shape[:3], by_key.shape[-1]))
        q = jnp.concatenate([q, split_heads(by_query, heads)], -1)
        k = jnp.concatenate([k, by_key], -1)
    return q, k, v


# One operation, and the form that each platform runs: chosen when the step is lowered for it, in
# the forward and the backward pass alike.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def fused(
    queries: Tokens,
    keys: Tokens,
    values: Tokens,
    by_query: Tokens | None,
    by_key: KeyFeatures | None,
    heads: int,
) -> Tokens:
    """What `materialised` gives, without a gradient for `by_key`, in the platform's own form."""
    return _fused_forward(queries, keys, values, by_query, by_key, heads)[0]


def _fused_forward(queries, keys, values, by_query, by_key, heads: int):
    arrays = queries, keys, values, by_query, by_key
    on_cpu = functools.partial(attention_cpu.forward, heads=heads)
    kept = jax.eval_shape(on_cpu, *arrays)[1]

    def nothing_kept(function):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)  # of which XLA makes none
        return lambda *arrays: (function(*arrays), zeros)

    forms: dict[str, Callable] = {"cpu": on_cpu}
    if _tpu_takes(queries, keys):
        on_tpu = on_each_device(functools.partial(attention_tpu.forward, heads=heads))
        plain = functools.partial(materialised, heads=heads)
        forms["tpu"] = nothing_kept(with_gradient_of(plain, on_tpu))
    if _cudnn_takes(queries, by_key, heads):
        forms["cuda"] = nothing_kept(functools.partial(_cudnn, heads=heads))
    default = nothing_kept(functools.partial(materialised, heads=heads))
    out, kept = lax.platform_dependent(*arrays, default=default, **forms)
    out, kept = keep((out, kept))
    return out, (*arrays, out, kept)


def _fused_backward(heads: int, saved: tuple, gradient: Tokens):
    def default(queries, keys, values, by_query, by_key, out, kept, gradient):
        form = functools.partial(materialised, by_key=by_key, heads=heads)
        return jax.vjp(form, queries, keys, values, by_query)[1](gradient)

    def on_tpu(queries, keys, values, by_query, by_key, out, kept, gradient):
        kernel = on_each_device(functools.partial(attention_tpu.backward, heads=heads))

        def plain(queries, keys, values, by_query, by_key, gradient):
            return default(queries, keys, values, by_query, by_key, out, kept, gradient)

        kernel = with_gradient_of(plain, kernel)
        return kernel(queries, keys, values, by_query, by_key, gradient)

    def on_cuda(queries, keys, values, by_query, by_key, out, kept, gradient):
        form = functools.partial(_cudnn, by_key=by_key, heads=heads)
        return jax.vjp(form, queries, keys, values, by_query)[1](gradient)

    forms: dict[str, Callable] = {"cpu": functools.partial(attention_cpu.backward, heads=heads)}
    if _tpu_takes(*saved[:2]):
        forms["tpu"] = on_tpu
    if _cudnn_takes(saved[0], saved[4], heads):
        forms["cuda"] = on_cuda
    gradients = lax.platform_dependent(*saved, gradient, default=default, **forms)
    by_key = saved[4]  # the places of keys, which are fixed
    return *gradients, None if by_key is None else jnp.zeros_like(by_key)


fused.defvjp(_fused_forward, _fused_backward)


def _tpu_takes(queries: Tokens, keys: Tokens) -> bool:
    return attention_tpu.fits(queries, keys) and each_device_has_clips(queries.shape[0])


def _cudnn_takes(queries: Tokens, by_key: KeyFeatures | None, heads: int) -> bool:
    """Whether cuDNN's fused attention, of 16-bit numbers on a GPU, takes heads of this width."""
    if jax.default_backend() != "gpu" or queries.dtype.itemsize != 2 or not kernels_allowed():
        return False
    # "8.0" for Ampere, the first that it runs on; AMD's chips have names.
    generation = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
    if not generation.isdecimal() or int(generation) < 8:
        return False
    places = 0 if by_key is None else by_key.shape[-1]
    # Up to 256 from Hopper on.
    return queries.shape[-1] // heads + places <= (256 if int(generation) >= 9 else 128)


def _cudnn(queries, keys, values, by_query, by_key, heads: int):
    """cuDNN's kernel has no relative positions, so they become features of queries and keys. It
    wants one width for all three, a multiple of 8, and for gradients even numbers of queries and
    keys: zeros fill up, and lengths leave them out."""
    q, k, v = _by_head(queries, keys, values, by_query, by_key, heads)
    width = -(-q.shape[-1] // 8) * 8
    lengths: dict[str, Any] = {}
    if q.shape[1] % 2 or k.shape[1] % 2:
        lengths = {
            "query_seq_lengths": jnp.full(len(q), q.shape[1], jnp.int32),
            "key_value_seq_lengths": jnp.full(len(k), k.shape[1], jnp.int32),
        }

    def fill(x):
        return jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, width - x.shape[-1])])

    out = jax.nn.dot_product_attention(
        fill(q), fill(k), fill(v), scale=1.0, implementation="cudnn", **lengths
    )
    return join_heads(out[:, : q.shape[1], :, : v.shape[-1]])
