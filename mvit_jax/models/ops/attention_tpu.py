"""softmax(Q K^T) V on TPUs, as Pallas kernels that keep the scores on the chip.

Pooled keys are few (393 in every stage of MViT-B 16x4, 2,421 in the largest variant), so all keys
and values of a clip stay in fast memory while blocks of queries pass. Each row of scores is then
whole, and the softmax is the plain one. Of the forward pass nothing is kept but its arguments: the
backward kernel takes the softmax again, which costs arithmetic where a TPU has plenty, and saves
the memory traffic that bounds the step. Heads stay side by side in the channels, as the projections
leave them: nothing is transposed.

Relative positions are a second product of the kernel, of what `attention.relative_features` gives:
the score matrix of their sum is not written either.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

# Scores of one head and one block of queries that the kernels hold at a time: 1 MB in float32, of
# which they need about five at once.
BLOCK_SCORES = 2**18

Queries = Float[Array, "batch queries channels"]
Keys = Float[Array, "batch keys channels"]


def memory() -> int:
    """Bytes of fast memory that a kernel may take; what needs more goes another way."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    large = kind.startswith("TPU") and kind not in ("TPU v2", "TPU v3", "TPU v4")
    return 2**20 * (48 if large else 14)  # of at least 64, or of 16 (and where nobody knows)


def fits(queries: Queries, keys: Keys) -> bool:
    """Whether the kernels' blocks find room on the chip, by a count of what the backward holds."""
    count, channels, itemsize = keys.shape[1], keys.shape[2], keys.dtype.itemsize
    # Keys and values, each twice since the next ones are on their way, and their gradients.
    whole = count * channels * (4 * itemsize + 4 * 4)
    block = block_of(queries.shape[1], count)
    known = keys.dtype in (jnp.float32, jnp.bfloat16)
    return known and whole + block * (6 * channels * itemsize + 5 * 4 * count) < memory()


def block_of(queries: int, keys: int) -> int:
    """Queries that go at a time: as many as fast memory takes, in blocks of about equal length."""
    most = max(16, BLOCK_SCORES // keys // 16 * 16)
    blocks = -(-queries // most)
    return -(-queries // blocks // 16) * 16


@functools.partial(jax.jit, static_argnames=("heads", "interpret"))
def forward(
    queries: Queries,
    keys: Keys,
    values: Keys,
    by_query: Float[Array, "batch queries head_places"] | None,
    by_key: Float[Array, "keys places"] | None,
    *,
    heads: int,
    interpret: bool = False,
) -> Queries:
    """softmax(Q K^T + by_query by_key^T) V for each head; queries come scaled. Probabilities are
    rounded to the values' dtype before they are normalised, not after."""
    arrays = _given(queries, keys, values, by_query, by_key)
    return _call(_forward, arrays, {"o": queries}, heads, interpret)[0]


@functools.partial(jax.jit, static_argnames=("heads", "interpret"))
def backward(
    queries: Queries,
    keys: Keys,
    values: Keys,
    by_query: Float[Array, "batch queries head_places"] | None,
    by_key: Float[Array, "keys places"] | None,
    gradient: Queries,
    *,
    heads: int,
    interpret: bool = False,
) -> tuple[Queries, Keys, Keys, Float[Array, "batch queries head_places"] | None]:
    """Gradients of queries, keys, values and by_query, from that of what `forward` gives."""
    arrays = _given(queries, keys, values, by_query, by_key) | {"do": gradient}
    # What is summed over blocks of queries is summed in float32.
    wide = jax.ShapeDtypeStruct(keys.shape, jnp.float32)
    outputs = {"dq": queries, "dk": wide, "dv": wide}
    if by_query is not None:
        outputs["dr"] = by_query
    dq, dk, dv, *dr = _call(_backward, arrays, outputs, heads, interpret)
    return dq, dk.astype(keys.dtype), dv.astype(values.dtype), dr[0] if dr else None


def _given(queries, keys, values, by_query, by_key) -> dict[str, Array]:
    relative = {} if by_query is None else {"r": by_query, "e": by_key}
    return {"q": queries, "k": keys, "v": values} | relative


def _call(kernel, arrays: dict, outputs: dict, heads: int, interpret: bool):
    """Runs a kernel over clips and, within each, blocks of queries; it gets its blocks by name."""
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
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=memory()
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
    # Beyond the last query a block holds anything, and keys would take it up.
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
        by_weight = _dot(do, v, ((1,), (1,)))
        of_scores = weights * (by_weight - jnp.sum(weights * by_weight, -1, keepdims=True))
        of_scores = of_scores.astype(k.dtype)
        _put(refs["dq"], head, heads, _dot(of_scores, k, ((1,), (0,))))
        _put(refs["dk"], head, heads, _dot(of_scores, q, ((0,), (0,))), add=True)
        _put(refs["dv"], head, heads, _dot(weights.astype(v.dtype), do, ((0,), (0,))), add=True)
        if r is not None:
            _put(refs["dr"], head, heads, _dot(of_scores, refs["e"][...], ((1,), (0,))))


def _weights(refs: dict, head: int, heads: int, inside=None):
    """Of one head: the softmax's numerators and their sums, and what of the queries made them."""
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
    place = (0, slice(None), slice(head * width, (head + 1) * width))
    ref[place] = ref[place] + value if add else value.astype(ref.dtype)


def _dot(a, b, axes):
    # Kernels know two precisions, and the higher one for float32 alone; "high" becomes "highest".
    wanted = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    exact = a.dtype == jnp.float32 and wanted in ("high", "highest", "tensorfloat32", "float32")
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
