"""Layer norm against NumPy, and its gradient against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mvit_jax.models.ops.layer_norm import layer_norm

EPS = 1e-6


def draw(shape, dtype):
    rng = np.random.default_rng(0)
    x = 2 + 3 * rng.standard_normal(shape)
    return [a.astype(dtype) for a in (x, *rng.standard_normal((2, shape[-1])))]


def naive(x, scale, bias):
    rows = [(row - row.mean()) / np.sqrt(row.var() + EPS) for row in x.reshape(-1, x.shape[-1])]
    return np.stack(rows).reshape(x.shape) * scale + bias


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 4, 6)])  # tokens; tokens by head
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_layer_norm_equals_the_naive_computation(shape, dtype):
    arguments = draw(shape, np.float64)
    with jax.enable_x64(True):
        x = jnp.array(arguments[0], dtype)
        scale, bias = (jnp.array(a, jnp.promote_types(dtype, jnp.float32)) for a in arguments[1:])
        out = jax.jit(layer_norm, static_argnums=3)(x, scale, bias, EPS)
        assert out.dtype == scale.dtype
        expected = naive(*(np.array(a, np.float64) for a in (x, scale, bias)))
        tolerance = 1e-12 if dtype == "float64" else 5e-6
        np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 4, 6)])
def test_gradients_equal_finite_differences(shape):
    run = jax.jit(lambda *arguments: layer_norm(*arguments, EPS))
    with jax.enable_x64(True):
        check_grads(run, draw(shape, np.float64), 1, ["rev"], atol=1e-7, rtol=1e-7, eps=1e-5)


def test_a_large_mean_causes_no_cancellation():
    x = 1000 + np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    out = layer_norm(jnp.array(x), jnp.ones(64), jnp.zeros(64), EPS)
    np.testing.assert_allclose(out, naive(x.astype(np.float64), 1, 0), rtol=0, atol=2e-3)


def test_gradients_have_the_dtypes_of_their_arguments():
    x = jnp.ones((2, 3, 4), jnp.bfloat16) * jnp.arange(4, dtype=jnp.bfloat16)[None, None]
    loss = lambda *arguments: layer_norm(*arguments, EPS).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(x, jnp.ones(4), jnp.zeros(4))
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
