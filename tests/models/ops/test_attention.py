"""Attention against loops over clips, heads and queries, and its gradients against autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.ops import attention_cpu, dispatch
from mvit_jax.models.ops.attention import attend, fused, materialised

BATCH, HEADS, DIM = 2, 3, 4
SAVED_SCORES = {"saved": 2**20, "blocks": 0}


def draw(queries, keys, positions, dtype):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, n, HEADS * DIM) for n in (queries, keys, keys)]
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    if positions is None:
        return [*arrays, None, None]
    by_query = rng.standard_normal((BATCH, queries, HEADS * positions)).astype(dtype)
    return [*arrays, by_query, np.eye(positions)[np.arange(keys) % positions].astype(dtype)]


def naive(q, k, v, r, e):
    """Computes attention one clip, head and query at a time."""
    out = np.zeros(q.shape)
    for clip, head, query in np.ndindex(BATCH, HEADS, q.shape[1]):
        part = slice(head * DIM, (head + 1) * DIM)
        scores = k[clip, :, part] @ q[clip, query, part]
        if r is not None:
            positions = e.shape[1]
            scores = scores + e @ r[clip, query, head * positions : (head + 1) * positions]
        weights = np.exp(scores)
        out[clip, query, part] = weights / weights.sum() @ v[clip, :, part]
    return out


@pytest.fixture(params=SAVED_SCORES)
def implementation(request, monkeypatch):
    monkeypatch.setattr(attention_cpu, "SAVED_SCORES", SAVED_SCORES[request.param])
    monkeypatch.setattr(attention_cpu, "BLOCK_SCORES", BATCH * HEADS * 11 * 32)
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("positions", [None, 5])
@pytest.mark.parametrize("queries", [7, 64, 71])  # one block, two, and an incomplete last block
def test_attention_equals_the_naive_loop(implementation, queries, positions, dtype, tolerance):
    arguments = draw(queries, 11, positions, dtype)
    expected = naive(*(None if x is None else x.astype(np.float64) for x in arguments))
    with jax.enable_x64(True):
        q, k, v, r, e = jax.tree.map(jnp.array, arguments)
        relative = None if r is None else (r.reshape(BATCH, queries, HEADS, positions), e)
        for ops in dispatch.OPS:
            with dispatch.operations(ops):
                run = jax.jit(functools.partial(attend, heads=HEADS))
                out = run(q * DIM**0.5, k, v, relative=relative)
            assert out.dtype == dtype
            np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("positions", [None, 5])
@pytest.mark.parametrize("queries", [7, 71])
def test_gradients_equal_autodiff(implementation, queries, positions):
    arguments = draw(queries, 11, positions, np.float64)
    factors = np.random.default_rng(1).standard_normal(arguments[0].shape)
    which = tuple(range(3 if positions is None else 4))  # the positions of keys are constants
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.array, arguments)

        def gradients(function):
            loss = lambda *arguments: (function(*arguments, HEADS) * factors).sum()  # noqa: E731
            return jax.jit(jax.grad(loss, which))(*arrays)

        for gradient, expected in zip(gradients(fused), gradients(materialised), strict=True):
            assert gradient.dtype == np.float64
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12)


def test_large_scores_do_not_overflow(implementation):
    arguments = draw(40, 11, None, np.float32)
    arguments[0] *= 1000
    out = fused(*jax.tree.map(jnp.array, arguments), HEADS)
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= np.abs(arguments[2]).max() * (1 + 1e-6)  # a mean of values


def test_bfloat16_agrees_with_float64_to_two_percent(implementation):
    arguments = draw(71, 11, 5, np.float32)
    arrays = jax.tree.map(lambda x: jnp.array(x, jnp.bfloat16), arguments)
    loss = lambda q: fused(q, *arrays[1:], HEADS).sum()  # noqa: E731
    assert jax.jit(jax.grad(loss))(arrays[0]).dtype == jnp.bfloat16
    out = fused(*arrays, HEADS)
    assert out.dtype == jnp.bfloat16
    expected = naive(*(np.array(x, np.float64) for x in arrays))
    difference = np.array(out, np.float64) - expected
    assert np.sqrt(np.mean(difference**2)) < 2e-2 * expected.std()


def test_the_softmax_of_bfloat16_is_computed_in_float32():
    # 512 equal scores: weights of 1/512 are exact, and sums of weights in bfloat16 would stop at 1.
    # Values alternate between 1 and 3, so that the mean is 2 to the last bit.
    q, k = jnp.ones((1, 1, 2), jnp.bfloat16), jnp.ones((1, 512, 2), jnp.bfloat16)
    v = jnp.tile(jnp.array([[1.0], [3.0]], jnp.bfloat16), (256, 2))[None]
    jaxpr = str(jax.make_jaxpr(lambda q, k, v: attend(q, k, v, 1))(q, k, v))
    assert "f32[1,1,1,512] = exp" in jaxpr.replace("\n", " ") or ":f32[1,1,1,512] = exp" in jaxpr
    np.testing.assert_array_equal(np.array(attend(q, k, v, 1), np.float32), 2.0)


@pytest.fixture
def ampere(monkeypatch):
    """Replaces the queries of tracing by those of an NVIDIA Ampere GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    class Ampere:
        compute_capability = "8.0"
        device_kind = "NVIDIA A100"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [Ampere()])
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: False)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)


@pytest.mark.parametrize(("queries", "keys"), [(40, 24), (39, 23)], ids=["even", "odd"])
@pytest.mark.parametrize("positions", [0, 22])
def test_bfloat16_and_its_gradients_use_cudnn_on_gpus(positions, queries, keys, ampere):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)  # noqa: E731
    arrays = [shape(2, queries, 192), shape(2, keys, 192), shape(2, keys, 192)]
    relative = (shape(2, queries, 2, positions), shape(keys, positions)) if positions else None

    def loss(q, k, v, relative):
        return attend(q, k, v, 2, relative).astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = gradients.trace(*arrays, relative).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn$fmhaSoftmax" in text and "cudnn$fmhaSoftmaxBackward" in text
    assert "stablehlo.dot_general" not in text  # no scores
    # Queries of 118 channels are padded to 120, and to even numbers of tokens.
    assert ("tensor<2x40x2x120xbf16>" in text) == bool(positions)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "platform"),
    [
        ("8.0", jnp.float32, 96, "cuda"),
        ("8.0", jnp.bfloat16, 132, "cuda"),
        ("7.5", jnp.bfloat16, 96, "cuda"),
        ("gfx90a", jnp.bfloat16, 96, "cuda"),
        ("8.0", jnp.bfloat16, 96, "cpu"),  # on a machine with a GPU
    ],
)
def test_unsupported_cases_do_not_use_cudnn(capability, dtype, width, platform, ampere):
    jax.devices()[0].__class__.compute_capability = capability
    q, k = (jax.ShapeDtypeStruct((1, n, width), dtype) for n in (8, 5))
    traced = jax.jit(jax.grad(lambda q, k: attend(q, k, k, 1).astype(float).sum())).trace(q, k)
    assert "cudnn" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_second_derivatives_equal_the_reference_implementation():
    q, k, v, *_ = jax.tree.map(jnp.array, draw(5, 7, None, np.float32))

    def second(implementation):
        first = jax.grad(lambda q: (implementation(q, k, v, None, None, HEADS) ** 2).sum())
        return jax.jit(jax.grad(lambda q: (first(q) ** 2).sum()))(q)

    expected = second(materialised)
    np.testing.assert_allclose(second(fused), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
