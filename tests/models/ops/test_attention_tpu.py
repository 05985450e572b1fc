"""TPU attention kernels, interpreted on the CPU, against the reference implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.ops import attention_tpu
from mvit_jax.models.ops.attention import materialised

CASES = {  # (queries, keys, heads, channels of a head, positions of keys)
    "one block": (20, 11, 2, 6, 0),
    "relative positions": (20, 11, 2, 6, 5),
    "an incomplete last block": (70, 11, 1, 6, 5),
    "complete blocks": (64, 11, 3, 4, 0),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_tpu, "BLOCK_SCORES", 32 * 11)  # 32 queries at a time


def draw(case):
    queries, keys, heads, dim, positions = CASES[case]
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.array(rng.standard_normal((2, *shape)), jnp.float32)  # noqa: E731
    arrays = [make(queries, heads * dim), make(keys, heads * dim), make(keys, heads * dim)]
    if not positions:
        return [*arrays, None, None], heads
    by_key = jnp.array(rng.standard_normal((keys, positions)), jnp.float32)
    return [*arrays, make(queries, heads * positions), by_key], heads


@pytest.mark.parametrize("case", CASES)
def test_the_forward_kernel_equals_the_reference_implementation(case):
    arrays, heads = draw(case)
    out = attention_tpu.forward(*arrays, heads=heads, interpret=True)
    np.testing.assert_allclose(out, materialised(*arrays, heads), rtol=0, atol=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_backward_kernel_equals_the_reference_gradients(case):
    arrays, heads = draw(case)
    gradient = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)
    gradients = attention_tpu.backward(*arrays, gradient, heads=heads, interpret=True)
    reference = lambda q, k, v, r: materialised(q, k, v, r, arrays[4], heads)  # noqa: E731
    expected = jax.vjp(reference, *arrays[:4])[1](gradient)
    for actual, correct in zip(gradients, expected, strict=True):
        if correct is None:
            assert actual is None
        else:
            np.testing.assert_allclose(actual, correct, rtol=0, atol=2e-5)


def test_bfloat16_attention_accumulates_in_float32():
    arrays, heads = draw("an incomplete last block")
    exact = materialised(*arrays, heads)
    halves = [x.astype(jnp.bfloat16) for x in arrays]
    out = attention_tpu.forward(*halves, heads=heads, interpret=True)
    assert out.dtype == jnp.bfloat16
    difference = np.array(out, np.float32) - np.array(exact)
    assert np.sqrt((difference**2).mean()) < 2e-2 * np.array(exact).std()
    gradients = attention_tpu.backward(*halves, halves[0], heads=heads, interpret=True)
    assert {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}


def test_large_scores_do_not_overflow():
    arrays, heads = draw("one block")
    arrays[0] = 1000 * arrays[0]
    assert np.isfinite(attention_tpu.forward(*arrays, heads=heads, interpret=True)).all()


@pytest.mark.parametrize("keys", [393, 2421])
def test_blocks_fit_and_have_similar_lengths(keys, monkeypatch):
    monkeypatch.undo()
    for queries in (393, 1569, 6273, 25089):
        block = attention_tpu.block_of(queries, keys)
        assert block % 16 == 0 and block * keys <= attention_tpu.BLOCK_SCORES + 16 * keys
        blocks = -(-queries // block)
        assert blocks * block - queries < 16 * blocks  # few rows of padding
