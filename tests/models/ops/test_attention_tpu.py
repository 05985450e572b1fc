"""The TPU's attention kernels, interpreted on the CPU, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.ops import attention_tpu
from mvit_jax.models.ops.attention import materialised

CASES = {  # (queries, keys, heads, channels of a head, places of keys)
    "one block": (20, 11, 2, 6, 0),
    "relative positions": (20, 11, 2, 6, 5),
    "a last block not full": (70, 11, 1, 6, 5),
    "blocks that end evenly": (64, 11, 3, 4, 0),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_tpu, "BLOCK_SCORES", 32 * 11)  # 32 queries at a time


def draw(case):
    queries, keys, heads, dim, places = CASES[case]
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.array(rng.standard_normal((2, *shape)), jnp.float32)  # noqa: E731
    arrays = [make(queries, heads * dim), make(keys, heads * dim), make(keys, heads * dim)]
    if not places:
        return [*arrays, None, None], heads
    by_key = jnp.array(rng.standard_normal((keys, places)), jnp.float32)
    return [*arrays, make(queries, heads * places), by_key], heads


@pytest.mark.parametrize("case", CASES)
def test_the_forward_kernel_is_the_definition(case):
    arrays, heads = draw(case)
    out = attention_tpu.forward(*arrays, heads=heads, interpret=True)
    np.testing.assert_allclose(out, materialised(*arrays, heads), rtol=0, atol=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_backward_kernel_gives_the_gradients_of_the_definition(case):
    arrays, heads = draw(case)
    gradient = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)
    mine = attention_tpu.backward(*arrays, gradient, heads=heads, interpret=True)
    form = lambda q, k, v, r: materialised(q, k, v, r, arrays[4], heads)  # noqa: E731
    expected = jax.vjp(form, *arrays[:4])[1](gradient)
    for a, b in zip(mine, expected, strict=True):
        if b is None:
            assert a is None
        else:
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_bfloat16_stays_bfloat16_and_sums_in_float32():
    arrays, heads = draw("a last block not full")
    exact = materialised(*arrays, heads)
    halves = [x.astype(jnp.bfloat16) for x in arrays]
    out = attention_tpu.forward(*halves, heads=heads, interpret=True)
    assert out.dtype == jnp.bfloat16
    difference = np.array(out, np.float32) - np.array(exact)
    assert np.sqrt((difference**2).mean()) < 2e-2 * np.array(exact).std()
    gradients = attention_tpu.backward(*halves, halves[0], heads=heads, interpret=True)
    assert {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}


def test_scores_too_large_for_exp_are_no_trouble():
    arrays, heads = draw("one block")
    arrays[0] = 1000 * arrays[0]
    assert np.isfinite(attention_tpu.forward(*arrays, heads=heads, interpret=True)).all()


@pytest.mark.parametrize("keys", [393, 2421])
def test_blocks_are_of_about_equal_length_and_fit(keys, monkeypatch):
    monkeypatch.undo()
    for queries in (393, 1569, 6273, 25089):
        block = attention_tpu.block_of(queries, keys)
        assert block % 16 == 0 and block * keys <= attention_tpu.BLOCK_SCORES + 16 * keys
        blocks = -(-queries // block)
        assert blocks * block - queries < 16 * blocks  # hardly any rows for nothing
