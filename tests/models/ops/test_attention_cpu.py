"""Attention by blocks of queries against the definition, in NumPy, and autodiff of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.ops import attention, attention_cpu

BATCH, HEADS, DIM = 2, 3, 4
FORMS = {"kept": 2**20, "blocks": 0}  # scores that are kept


def draw(queries, keys, places, dtype):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, n, HEADS * DIM) for n in (queries, keys, keys)]
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    if places is None:
        return [*arrays, None, None]
    by_query = rng.standard_normal((BATCH, queries, HEADS * places)).astype(dtype)
    return [*arrays, by_query, np.eye(places)[np.arange(keys) % places].astype(dtype)]


def defined(q, k, v, r, e):
    """One clip, head and query after the other."""
    out = np.zeros(q.shape)
    for clip, head, query in np.ndindex(BATCH, HEADS, q.shape[1]):
        part = slice(head * DIM, (head + 1) * DIM)
        scores = k[clip, :, part] @ q[clip, query, part]
        if r is not None:
            places = e.shape[1]
            scores = scores + e @ r[clip, query, head * places : (head + 1) * places]
        weights = np.exp(scores)
        out[clip, query, part] = weights / weights.sum() @ v[clip, :, part]
    return out


def plain(q, k, v, r, e):
    q, k, v = (x.reshape(*x.shape[:2], HEADS, DIM) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    if r is not None:
        r = r.reshape(*r.shape[:2], HEADS, -1)
        scores = scores + jnp.einsum("bqhp,kp->bhqk", r, e)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return out.reshape(*out.shape[:2], -1)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    monkeypatch.setattr(attention_cpu, "KEPT_SCORES", FORMS[request.param])
    monkeypatch.setattr(attention_cpu, "BLOCK_SCORES", BATCH * HEADS * 11 * 32)
    return request.param


@pytest.mark.parametrize("places", [None, 5])
@pytest.mark.parametrize("queries", [7, 64, 71])  # one block, two, and a last one not full
def test_it_is_the_definition(form, queries, places):
    arguments = draw(queries, 11, places, np.float32)
    run = jax.jit(attention.fused, static_argnums=5)
    out = run(*jax.tree.map(jnp.array, arguments), HEADS)
    expected = defined(*(None if x is None else x.astype(np.float64) for x in arguments))
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("places", [None, 5])
@pytest.mark.parametrize("queries", [7, 71])
def test_gradients_are_those_of_autodiff(form, queries, places):
    arguments = draw(queries, 11, places, np.float64)
    factors = np.random.default_rng(1).standard_normal(arguments[0].shape)
    which = tuple(range(3 if places is None else 4))  # the places of keys are constants
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.array, arguments)

        def gradients(function):
            loss = lambda *arguments: (function(*arguments) * factors).sum()  # noqa: E731
            return jax.jit(jax.grad(loss, which))(*given)

        mine = gradients(lambda *arguments: attention.fused(*arguments, HEADS))
        for gradient, expected in zip(mine, gradients(plain), strict=True):
            assert gradient.dtype == np.float64
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12)


def test_large_scores_do_not_overflow(form):
    arguments = draw(40, 11, None, np.float32)
    arguments[0] *= 1000
    out = attention.fused(*jax.tree.map(jnp.array, arguments), HEADS)
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= np.abs(arguments[2]).max() * (1 + 1e-6)  # a mean of values


def test_bfloat16(form):
    arguments = draw(71, 11, 5, np.float32)
    given = jax.tree.map(lambda x: jnp.array(x, jnp.bfloat16), arguments)
    loss = lambda q: attention.fused(q, *given[1:], HEADS).sum()  # noqa: E731
    assert jax.jit(jax.grad(loss))(given[0]).dtype == jnp.bfloat16
    out = attention.fused(*given, HEADS)
    assert out.dtype == jnp.bfloat16
    expected = defined(*(np.array(x, np.float64) for x in given))
    difference = np.array(out, np.float64) - expected
    assert np.sqrt(np.mean(difference**2)) < 2e-2 * expected.std()
