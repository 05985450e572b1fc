"""softmax(Q K^T) V on TPUs, as Pallas kernels that never write scores to HBM.

Pooled keys are few. Most blocks of MViT-B 16x4 have 393, and the first blocks of stages 2 to 4 have
1,569; in MViTv2-L 40x3 at 352 pixels these are 2,421 and 9,681. All keys and values of a clip
therefore stay in VMEM while the kernel visits blocks of queries. Each row of scores is complete, so
no online softmax is needed. The backward kernel rematerialises the softmax from the inputs: a TPU
has arithmetic to spare, while memory traffic bounds the step. Heads stay side by side in the
channels, as the projections produce them, so nothing is transposed.

Relative positional embeddings are a second product in the kernel: query features times key features
(see `attention.relative_features`).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

# Scores of one head and one block of queries: 1 MB in float32. Kernels hold about five such arrays.
BLOCK_SCORES = 2**18

Queries = Float[Array, "batch queries channels"]
Keys = Float[Array, "batch keys channels"]


def vmem_budget() -> int:
    """Returns the bytes of VMEM that a kernel may use; operations that need more use no kernel."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    large = kind.startswith("TPU") and kind not in ("TPU v2", "TPU v3", "TPU v4")
    return 2**20 * (48 if large else 14)  # of 64 MiB or more, or of 16 MiB (old or unknown)


def fits(queries: Queries, keys: Keys) -> bool:
    """Returns True if the kernels support the dtype and their buffers fit into VMEM.

    The buffers are those of the backward kernel, which needs more than the forward kernel.
    """
    count, channels, itemsize = keys.shape[1], keys.shape[2], keys.dtype.itemsize
    # Keys and values, double-buffered, and their gradients.
    whole = count * channels * (4 * itemsize + 4 * 4)
    block = block_of(queries.shape[1], count)
    supported = keys.dtype in (jnp.float32, jnp.bfloat16)
    return supported and whole + block * (6 * channels * itemsize + 5 * 4 * count) < vmem_budget()


def block_of(queries: int, keys: int) -> int:
    """Returns the number of queries in a block, for about `BLOCK_SCORES` scores at most.

    Blocks have about equal length, a multiple of 16.
    """
    length = max(16, BLOCK_SCORES // keys // 16 * 16)
    blocks = -(-queries // length)
    return -(-queries // blocks // 16) * 16


@functools.partial(jax.jit, static_argnames=("heads", "interpret"))
def forward(
    queries: Queries,
    keys: Keys,
    values: Keys,
    by_query: Float[Array, "batch queries head_features"] | None,
    by_key: Float[Array, "keys features"] | None,
    *,
    heads: int,
    interpret: bool = False,
) -> Queries:
    """Returns softmax(Q K^T + by_query by_key^T) V for each head.

    Queries must be scaled. Unlike the reference implementation, this one rounds the softmax's
    numerators to the values' dtype, and normalises only the output.
    """
    arrays = _named(queries, keys, values, by_query, by_key)
    return _call(_forward, arrays, {"o": queries}, heads, interpret)[0]


@functools.partial(jax.jit, static_argnames=("heads", "interpret"))
def backward(
    queries: Queries,
    keys: Keys,
    values: Keys,
    by_query: Float[Array, "batch queries head_features"] | None,
    by_key: Float[Array, "keys features"] | None,
    gradient: Queries,
    *,
    heads: int,
    interpret: bool = False,
) -> tuple[Queries, Keys, Keys, Float[Array, "batch queries head_features"] | None]:
    """Returns the gradients of queries, keys, values and by_query, from the output's gradient."""
    arrays = _named(queries, keys, values, by_query, by_key) | {"do": gradient}
    # Sums over blocks of queries are float32.
    wide = jax.ShapeDtypeStruct(keys.shape, jnp.float32)
    outputs = {"dq": queries, "dk": wide, "dv": wide}
    if by_query is not None:
        outputs["dr"] = by_query
    dq, dk, dv, *dr = _call(_backward, arrays, outputs, heads, interpret)
    return dq, dk.astype(keys.dtype), dv.astype(values.dtype), dr[0] if dr else None


def _named(queries, keys, values, by_query, by_key) -> dict[str, Array]:
    relative = {} if by_query is None else {"r": by_query, "e": by_key}
    return {"q": queries, "k": keys, "v": values} | relative


def _call(kernel, arrays: dict, outputs: dict, heads: int, interpret: bool):
    """Runs a kernel for each clip and block of queries, with a dict of refs as its argument."""
    batch, queries, channels = arrays["q"].shape
    keys = arrays["k"].shape[1]
    block = block_of(queries, keys)

    def spec(name: str, array) -> pl.BlockSpec:
        if name == "e":
            return pl.BlockSpec(array.shape, lambda clip, i: (0, 0))
        if name in ("k", "v", "dk", "dv"):
            return pl.BlockSpec((1, *array.shape[1:]), lambda clip, i: (clip, 0, 0))
        return pl.BlockSpec((1, block, array.shape[2]), lambda clip, i: (clip, i, 0))

    def body(*refs):
        kernel(dict(zip([*arrays, *outputs], refs, strict=True)), heads, queries, block)

    products = 2 if kernel is _forward else 5
    return pl.pallas_call(
        body,
        grid=(batch, -(-queries // block)),
        in_specs=[spec(*item) for item in arrays.items()],
        out_specs=[spec(*item) for item in outputs.items()],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_budget()
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * batch * queries * keys * channels,
            transcendentals=batch * heads * queries * keys,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (arrays | outputs).values()),
        ),
        interpret=interpret,
    )(*arrays.values())


def _forward(refs: dict, heads: int, queries: int, block: int) -> None:
    for head in range(heads):
        weights, total, *_ = _weights(refs, head, heads)
        v = _head(refs["v"], head, heads)
        out = _dot(weights.astype(v.dtype), v, ((1,), (0,))) / total
        _put(refs["o"], head, heads, out)


def _backward(refs: dict, heads: int, queries: int, block: int) -> None:
    index = pl.program_id(1)
    # Rows beyond the last query hold arbitrary values, which must not reach the keys' gradients.
    row = index * block + lax.broadcasted_iota(jnp.int32, (block, 1), 0)
    inside = row < queries

    @pl.when(index == 0)
    def _():
        for name in ("dk", "dv"):
            refs[name][...] = jnp.zeros_like(refs[name])

    for head in range(heads):
        weights, total, q, r = _weights(refs, head, heads, inside)
        weights = weights / total
        k, v = _head(refs["k"], head, heads), _head(refs["v"], head, heads)
        do = jnp.where(inside, _head(refs["do"], head, heads), 0)
        dweights = _dot(do, v, ((1,), (1,)))
        dscores = weights * (dweights - jnp.sum(weights * dweights, -1, keepdims=True))
        dscores = dscores.astype(k.dtype)
        _put(refs["dq"], head, heads, _dot(dscores, k, ((1,), (0,))))
        _put(refs["dk"], head, heads, _dot(dscores, q, ((0,), (0,))), add=True)
        _put(refs["dv"], head, heads, _dot(weights.astype(v.dtype), do, ((0,), (0,))), add=True)
        if r is not None:
            _put(refs["dr"], head, heads, _dot(dscores, refs["e"][...], ((1,), (0,))))


def _weights(refs: dict, head: int, heads: int, inside=None):
    """Returns a head's softmax numerators, their sums, its queries and its query features."""
    q, r = _head(refs["q"], head, heads), None
    if inside is not None:
        q = jnp.where(inside, q, 0)
    scores = _dot(q, _head(refs["k"], head, heads), ((1,), (1,)))
    if "r" in refs:
        r = _head(refs["r"], head, heads)
        r = r if inside is None else jnp.where(inside, r, 0)
        scores = scores + _dot(r, refs["e"][...], ((1,), (1,)))
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    return weights, jnp.sum(weights, -1, keepdims=True), q, r


def _head(ref, head: int, heads: int):
    width = ref.shape[-1] // heads
    return ref[0, :, head * width : (head + 1) * width]


def _put(ref, head: int, heads: int, value, add: bool = False) -> None:
    width = ref.shape[-1] // heads
    index = (0, slice(None), slice(head * width, (head + 1) * width))
    ref[index] = ref[index] + value if add else value.astype(ref.dtype)


def _dot(a, b, axes):
    # Pallas supports only DEFAULT, and HIGHEST for float32: "high" becomes HIGHEST.
    setting = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    exact = a.dtype == jnp.float32 and setting in ("high", "highest", "tensorfloat32", "float32")
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
