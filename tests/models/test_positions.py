"""Interpolation, distances and sine-cosine embeddings against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.positions import distances, linear_weights, resize, sincos
from tests.models import naive


@pytest.mark.parametrize(
    ("old", "new"), [(1, 3), (2, 5), (3, 1), (5, 2), (7, 7), (13, 14), (37, 39), (155, 111)]
)
def test_resizing_equals_the_naive_loop(old, new):
    table = np.random.default_rng(0).standard_normal((old, 4))
    with jax.enable_x64(True):
        resized = np.array(resize(jnp.array(table), new, 0))
        other_axis = np.array(resize(jnp.array(table.T), new, 1))
    np.testing.assert_allclose(resized, naive.resize(table, new), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(other_axis, resized.T)
    weights = linear_weights(old, new)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=0, atol=1e-12)
    assert (weights >= 0).all()


def test_resizing_in_float32_keeps_dtype_and_precision():
    table = np.random.default_rng(0).standard_normal((37, 4)).astype(np.float32)
    resized = resize(jnp.array(table), 39, 0)
    assert resized.dtype == jnp.float32
    expected = naive.resize(table.astype(np.float64), 39)
    np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-6)
    same = jnp.array(table)
    assert resize(same, 37, 0) is same


@pytest.mark.parametrize("order", ["slowfast", "torchvision"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (7, 7), (14, 7), (7, 14), (56, 7), (39, 10), (78, 10), (10, 39), (11, 3), (20, 39)],
)
def test_distances_equal_the_naive_loop(queries, keys, order):
    actual, expected = distances(queries, keys, order), naive.distances(queries, keys)
    if order == "torchvision":  # i rq - (j + (1 - K)) rk, each operation rounded to float32
        i, j = np.indices((queries, keys), np.float32)
        q_ratio, k_ratio = max(keys / queries, 1.0), max(queries / keys, 1.0)
        expected = (i * q_ratio - (j + (1 - keys)) * k_ratio).astype(int)
    np.testing.assert_array_equal(actual, expected)
    assert actual.min() >= 0 and actual.max() <= 2 * max(queries, keys) - 2


@pytest.mark.parametrize(("grid", "width"), [((2, 3, 4), 16), ((1, 2, 2), 32), ((3, 1, 1), 48)])
def test_sincos_equals_the_naive_loop(grid, width):
    table = sincos(grid, width)
    assert table.shape == (*grid, width)
    expected = naive.sincos(grid, width).reshape(table.shape)
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-12)
