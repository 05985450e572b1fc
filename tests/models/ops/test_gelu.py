"""GELU and its gradient against the normal distribution of the standard library."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.ops.gelu import gelu

INPUTS = np.linspace(-6, 6, 97)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_gelu_and_its_gradient_equal_the_normal_distribution(dtype):
    normal = NormalDist()
    with jax.enable_x64(True):
        x = jnp.array(INPUTS, dtype)
        value, gradient = jax.jit(jax.vmap(jax.value_and_grad(gelu)))(x)
        assert value.dtype == gradient.dtype == dtype
        inputs = [float(v) for v in x]
        expected = np.array([v * normal.cdf(v) for v in inputs])
        slope = np.array([normal.cdf(v) + v * normal.pdf(v) for v in inputs])
        tolerance = {"bfloat16": 2e-2, "float32": 1e-6, "float64": 1e-14}[dtype]
        np.testing.assert_allclose(np.array(value, np.float64), expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(np.array(gradient, np.float64), slope, rtol=0, atol=tolerance)
