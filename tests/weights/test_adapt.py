"""Adapted weights: cubic interpolation against torch, kernels between images and video."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.ops import pooling
from mvit_jax.models.plan import Pool
from mvit_jax.weights.adapt import INFLATIONS, cubic_weights, fit, inflate_kernel

# torch.nn.functional.interpolate(table, mode="bicubic", align_corners=False), torch 2.14, float64.
BICUBIC = {
    (2, 5): [
        [-0.50262975, -0.395162, -0.1615, 0.072162, 0.17962975],
        [0.181588, 0.436896, 0.992, 1.547104, 1.802412],
        [1.66925, 2.246, 3.5, 4.754, 5.33075],
        [3.156912, 4.055104, 6.008, 7.960896, 8.859088],
        [3.84112975, 4.887162, 7.1615, 9.435838, 10.48187025],
    ],
    (7, 3): [
        [10.30761317, 14.77777778, 9.89437586],
        [11.18518519, 15.0, 13.62962963],
        [5.43312757, 12.37037037, 8.90466392],
    ],
}


@pytest.mark.parametrize(("old", "new"), BICUBIC)
def test_cubic_interpolation_equals_torch(old, new):
    weights = cubic_weights(old, new)
    table = (np.arange(old * old) ** 2 % 17).reshape(old, old)
    resized = weights @ table @ weights.T
    np.testing.assert_allclose(resized, BICUBIC[old, new], rtol=0, atol=1e-7)


def cubic(values, length):
    """Interpolates a row from its four nearest values with a = -0.75, ends repeated."""
    a, old, out = -0.75, len(values), np.zeros(length)
    near, far = [a + 2, -(a + 3), 0, 1], [a, -5 * a, 8 * a, -4 * a]  # distances to 1, to 2
    for i in range(length):
        position = (i + 0.5) * old / length - 0.5
        for j in range(math.floor(position) - 1, math.floor(position) + 3):
            distance = abs(position - j)
            weight = np.polyval(near if distance <= 1 else far, distance)
            out[i] += weight * values[min(max(j, 0), old - 1)]
    return out


@pytest.mark.parametrize(("old", "new"), [(1, 4), (2, 3), (5, 5), (7, 3), (7, 14), (14, 20)])
def test_cubic_weights_equal_a_loop(old, new):
    values = np.random.default_rng(0).standard_normal(old)
    np.testing.assert_allclose(cubic_weights(old, new) @ values, cubic(values, new), atol=1e-12)


def test_positions_are_resized_cubically_in_space_and_linearly_in_time():
    rng = np.random.default_rng(0)
    joint = rng.standard_normal((2, 3, 3, 4))
    fitted = fit("positions/joint", (4, 5, 3, 4), {"positions/joint": joint})
    assert fitted.done == "resized" and fitted.values is not None
    rows = np.apply_along_axis(cubic, 1, joint, 5)
    # Two frames to four, centres at half-integers: ends repeated, thirds would be aligned corners.
    weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    expected = np.einsum("ij,jhwc->ihwc", weights, rows)
    np.testing.assert_allclose(fitted.values, expected, rtol=0, atol=1e-12)


# Kernels.


@pytest.mark.parametrize("inflation", INFLATIONS)
@pytest.mark.parametrize("frames", [1, 3, 4])
def test_deflation_reverses_inflation(inflation, frames):
    kernel = np.random.default_rng(0).standard_normal((1, 3, 2, 5))
    deep = inflate_kernel(kernel, frames, inflation)
    assert deep.shape == (frames, 3, 2, 5)
    np.testing.assert_allclose(inflate_kernel(deep, 1, inflation), kernel, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inflation", INFLATIONS)
def test_an_inflated_kernel_on_equal_frames_is_a_multiple_of_the_image(inflation):
    """On equal frames "centre" and "mean" are equal to the image's kernel, "repeat" is thrice it.

    At the first and the last frame, which meet the padding, only "centre" is equal to it.
    """
    rng = np.random.default_rng(0)
    image, kernel = rng.standard_normal((1, 1, 5, 4, 2)), rng.standard_normal((1, 3, 3, 2))
    still = np.repeat(image, 4, axis=1)
    with jax.enable_x64(True):
        flat = pooling.pool(jnp.array(image), Pool("conv", (1, 3, 3), (1, 2, 2)), jnp.array(kernel))
        frames = jnp.array(inflate_kernel(kernel, 3, inflation))
        deep = pooling.pool(jnp.array(still), Pool("conv", (3, 3, 3), (1, 2, 2)), frames)
    inner = {"centre": 1, "mean": 1, "repeat": 3}[inflation]
    outer = {"centre": 1, "mean": 2 / 3, "repeat": 2}[inflation]
    for frame, factor in enumerate((outer, inner, inner, outer)):
        np.testing.assert_allclose(deep[0, frame], factor * np.array(flat[0, 0]), atol=1e-12)
