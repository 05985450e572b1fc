"""Attention against loops over heads and queries."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.ops.attention import (
    attend,
    fused,
    join_heads,
    materialised,
    on_grid,
    split_heads,
)

BATCH, QUERIES, KEYS, HEADS, DIM = 2, 5, 7, 3, 4


def draw(dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, n, HEADS * DIM) for n in (QUERIES, KEYS, KEYS)]
    # Scores that differ by several units: a wrong scale or axis of the softmax shows.
    return [2 * rng.standard_normal(shape).astype(dtype) for shape in shapes]


def naive(queries, keys, values):
    out = np.zeros(queries.shape)
    for b in range(BATCH):
        for head in range(HEADS):
            channels = slice(head * DIM, (head + 1) * DIM)
            for i in range(queries.shape[1]):
                scores = [
                    queries[b, i, channels] @ keys[b, j, channels] / math.sqrt(DIM)
                    for j in range(keys.shape[1])
                ]
                weights = np.exp(scores) / np.exp(scores).sum()
                out[b, i, channels] = weights @ values[b, :, channels]
    return out


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 5e-2), ("float32", 5e-6), ("float64", 1e-14)]
)
def test_attention_is_the_loop_in_every_dtype(dtype, tolerance):
    with jax.enable_x64(True):
        arguments = [jnp.array(x, dtype) for x in draw()]
        out = jax.jit(attend, static_argnums=3)(*arguments, HEADS)
        assert out.dtype == dtype
        expected = naive(*(np.array(x, np.float64) for x in arguments))
        np.testing.assert_allclose(np.array(out, np.float64), expected, rtol=0, atol=tolerance)


def test_the_softmax_of_bfloat16_is_taken_in_float32():
    # 512 equal scores: weights of 1/512 are exact, and sums of weights in bfloat16 would stop at 1.
    # Values alternate between 1 and 3, so that the mean is 2 to the last bit.
    q, k = jnp.ones((1, 1, 2), jnp.bfloat16), jnp.ones((1, 512, 2), jnp.bfloat16)
    v = jnp.tile(jnp.array([[1.0], [3.0]], jnp.bfloat16), (256, 2))[None]
    jaxpr = str(jax.make_jaxpr(lambda q, k, v: attend(q, k, v, 1))(q, k, v))
    assert "f32[1,1,1,512] = exp" in jaxpr.replace("\n", " ") or ":f32[1,1,1,512] = exp" in jaxpr
    np.testing.assert_array_equal(np.array(attend(q, k, v, 1), np.float32), 2.0)


def test_scores_too_large_for_exp_are_no_trouble():
    q, k, v = (jnp.array(x, jnp.float32) for x in draw())
    out = attend(100 * q, k, v, HEADS)
    assert np.isfinite(out).all()


def test_queries_are_answered_each_by_itself():
    q, k, v = (jnp.array(x, jnp.float32) for x in draw())
    together = attend(q, k, v, HEADS)
    class_token, others = attend(q[:, :1], k, v, HEADS), attend(q[:, 1:], k, v, HEADS)
    np.testing.assert_allclose(
        jnp.concatenate([class_token, others], axis=1), together, rtol=0, atol=1e-6
    )


def test_heads_are_blocks_of_channels():
    x = jnp.arange(2 * 12.0).reshape(2, 12)
    split = split_heads(x, 3)
    assert split.shape == (2, 3, 4)
    np.testing.assert_array_equal(split[1, 2], [20, 21, 22, 23])
    np.testing.assert_array_equal(join_heads(split), x)


@pytest.mark.parametrize("first", [0, 1], ids=["no class token", "class token"])
def test_tokens_lie_on_the_grid_by_time_height_width(first):
    t, h, w = 2, 3, 4
    places = [(i, j, k) for i in range(t) for j in range(h) for k in range(w)]
    tokens = np.array([[(-1, -1, -1)] * first + places], np.float32)
    seen = []

    def every_other_column(grid):
        seen.append(grid)
        return grid[:, :, :, ::2] + 10

    out = on_grid(every_other_column, jnp.array(tokens), (t, h, w))
    for i, j, k in places:
        np.testing.assert_array_equal(seen[0][0, i, j, k], (i, j, k))
    expected = [(i + 10, j + 10, k + 10) for i, j, k in places if k % 2 == 0]
    np.testing.assert_array_equal(out[0], [(-1, -1, -1)] * first + expected)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What tracing asks of a GPU, answered for one of NVIDIA's Ampere chips."""
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
@pytest.mark.parametrize("places", [0, 22])
def test_on_a_gpu_bfloat16_goes_to_cudnn_with_its_gradients(places, queries, keys, as_on_a_gpu):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)  # noqa: E731
    arrays = [shape(2, queries, 192), shape(2, keys, 192), shape(2, keys, 192)]
    relative = (shape(2, queries, 2, places), shape(keys, places)) if places else None

    def loss(q, k, v, relative):
        return attend(q, k, v, 2, relative).astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = gradients.trace(*arrays, relative).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn$fmhaSoftmax" in text and "cudnn$fmhaSoftmaxBackward" in text
    assert "stablehlo.dot_general" not in text  # no scores
    # 118 channels of queries are filled up to 120, and to even numbers of tokens.
    assert ("tensor<2x40x2x120xbf16>" in text) == bool(places)


def test_on_a_gpu_float32_and_wide_heads_go_another_way(as_on_a_gpu):
    for dtype, width in ((jnp.float32, 96), (jnp.bfloat16, 132)):
        q, k = (jax.ShapeDtypeStruct((1, n, width), dtype) for n in (8, 5))
        lowered = jax.jit(lambda q, k: attend(q, k, k, 1)).trace(q, k)
        assert "cudnn" not in lowered.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("capability", ["7.5", "gfx90a"])
def test_gpus_that_cudnn_does_not_serve_go_another_way(capability, as_on_a_gpu):
    jax.devices()[0].__class__.compute_capability = capability
    q, k = (jax.ShapeDtypeStruct((1, n, 96), jnp.bfloat16) for n in (8, 5))
    lowered = jax.jit(lambda q, k: attend(q, k, k, 1)).trace(q, k)
    assert "cudnn" not in lowered.lower(lowering_platforms=("cuda",)).as_text()


def test_on_a_gpu_machine_its_cpu_still_works(as_on_a_gpu):
    q, k = (jax.ShapeDtypeStruct((1, n, 96), jnp.bfloat16) for n in (8, 5))
    traced = jax.jit(jax.grad(lambda q, k: attend(q, k, k, 1).sum().astype(float))).trace(q, k)
    assert "cudnn" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_second_derivatives_are_those_of_the_definition():
    q, k, v = (jnp.array(x, jnp.float32) for x in draw())

    def second(form):
        first = jax.grad(lambda q: (form(q, k, v, None, None, HEADS) ** 2).sum())
        return jax.jit(jax.grad(lambda q: (first(q) ** 2).sum()))(q)

    expected = second(materialised)
    np.testing.assert_allclose(second(fused), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
