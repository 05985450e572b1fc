"""Interpolation, distances and fixed positions against loops and known values."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.positions import distances, linear_weights, resize, sincos


def resized(values: np.ndarray, length: int) -> np.ndarray:
    """Rows at new places: centres at half-integers, linear between old ones, ends repeated."""
    old, out = len(values), []
    for i in range(length):
        place = (i + 0.5) * old / length - 0.5
        low = math.floor(place)
        rows = [values[min(max(j, 0), old - 1)] for j in (low, low + 1)]
        out.append((1 - (place - low)) * rows[0] + (place - low) * rows[1])
    return np.array(out)


@pytest.mark.parametrize(
    ("old", "new"), [(1, 3), (2, 5), (3, 1), (5, 2), (7, 7), (13, 14), (37, 39), (155, 111)]
)
def test_resizing_is_the_loop(old, new):
    table = np.random.default_rng(0).standard_normal((old, 4))
    with jax.enable_x64(True):
        moved = np.array(resize(jnp.array(table), new, 0))
        other_axis = np.array(resize(jnp.array(table.T), new, 1))
    np.testing.assert_allclose(moved, resized(table, new), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(other_axis, moved.T)
    weights = linear_weights(old, new)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=0, atol=1e-12)
    assert (weights >= 0).all()


def test_resizing_in_float32_keeps_dtype_and_precision():
    table = np.random.default_rng(0).standard_normal((37, 4)).astype(np.float32)
    moved = resize(jnp.array(table), 39, 0)
    assert moved.dtype == jnp.float32
    np.testing.assert_allclose(moved, resized(table.astype(np.float64), 39), rtol=0, atol=1e-6)
    same = jnp.array(table)
    assert resize(same, 37, 0) is same


def distance(i: int, j: int, queries: int, keys: int, order: str) -> np.float32:
    """One distance, each operation rounded to float32."""
    f, q_ratio, k_ratio = np.float32, max(keys / queries, 1.0), max(queries / keys, 1.0)
    scaled = np.multiply(f(i), f(q_ratio))
    if order == "torchvision":  # i rq - (j + (1 - K)) rk
        return np.subtract(scaled, np.multiply(np.add(f(j), f(1 - keys)), f(k_ratio)))
    moved = np.subtract(scaled, np.multiply(f(j), f(k_ratio)))  # (i rq - j rk) + (K - 1) rk
    return np.add(moved, f((keys - 1) * k_ratio))


@pytest.mark.parametrize("order", ["slowfast", "torchvision"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (7, 7), (14, 7), (7, 14), (56, 7), (39, 10), (78, 10), (10, 39), (11, 3), (20, 39)],
)
def test_distances_are_the_loop(queries, keys, order):
    found = distances(queries, keys, order)
    assert found.shape == (queries, keys)
    for i, j in itertools.product(range(queries), range(keys)):
        value = distance(i, j, queries, keys, order)
        assert value.dtype == np.float32
        assert found[i, j] == int(value), (i, j)
    assert found.min() >= 0 and found.max() <= 2 * max(queries, keys) - 2


def test_distances_on_grids_that_are_multiples_are_whole_numbers():
    for order in ("slowfast", "torchvision"):
        np.testing.assert_array_equal(distances(4, 2, order), [[2, 0], [3, 1], [4, 2], [5, 3]])
        np.testing.assert_array_equal(distances(2, 4, order), [[3, 2, 1, 0], [5, 4, 3, 2]])


@pytest.mark.parametrize(("grid", "width"), [((2, 3, 4), 16), ((1, 2, 2), 32), ((3, 1, 1), 48)])
def test_sincos_is_the_loop(grid, width):
    table = sincos(grid, width)
    assert table.shape == (*grid, width)
    for place in itertools.product(*(range(n) for n in grid)):
        t, h, w = place
        expected = []
        for where, channels in (
            (t, width // 4),
            (w, width // 4 * 3 // 2),
            (h, width // 4 * 3 // 2),
        ):
            angles = [where * 10000 ** (-i / (channels / 2)) for i in range(channels // 2)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        np.testing.assert_allclose(table[place], expected, rtol=0, atol=1e-12)
