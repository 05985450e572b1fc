"""Patch convolutions against a loop over windows, and their gradients against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mvit_jax.models.ops import patch_conv
from mvit_jax.models.ops.patch_conv import convolve

CASES = [  # kernel, stride, padding, size of the clip
    ((3, 7, 7), (2, 4, 4), (1, 3, 3), (4, 9, 12)),
    ((1, 7, 7), (1, 4, 4), (0, 3, 3), (1, 8, 11)),
    ((2, 4, 4), (2, 4, 4), (0, 0, 0), (5, 8, 9)),  # ViT: no overlap, an incomplete last window
]


def draw(case):
    rng = np.random.default_rng(0)
    kernel, _, _, size = case
    return rng.standard_normal((2, *size, 3)), rng.standard_normal((*kernel, 3, 5))


def naive(clip, weight, stride, padding):
    clip = np.pad(clip, [(0, 0), *((p, p) for p in padding), (0, 0)])
    kernel = weight.shape[:3]
    size = [(n - k) // s + 1 for n, k, s in zip(clip.shape[1:4], kernel, stride, strict=True)]
    out = np.zeros((len(clip), *size, weight.shape[-1]))
    for position in np.ndindex(*size):
        cut = [slice(i * s, i * s + k) for i, s, k in zip(position, stride, kernel, strict=True)]
        out[:, *position] = np.tensordot(clip[:, *cut], weight, 4)
    return out


IMPLEMENTATIONS = {"here": convolve, "TPU": patch_conv._by_cubes}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_implementation_equals_the_loop_over_windows(case, implementation):
    clip, weight = draw(case)
    out = jax.jit(IMPLEMENTATIONS[implementation], static_argnums=(2, 3))(
        jnp.array(clip, jnp.float32), jnp.array(weight, jnp.float32), *case[1:3]
    )
    np.testing.assert_allclose(out, naive(clip, weight, *case[1:3]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_those_of_the_convolution(case, implementation):
    _, stride, padding, _ = case
    with jax.enable_x64(True):
        clip, weight = map(jnp.array, draw(case))

        def plain(clip, weight):
            pairs = [(p, p) for p in padding]
            names = ("NDHWC", "DHWIO", "NDHWC")
            return lax.conv_general_dilated(clip, weight, stride, pairs, dimension_numbers=names)

        def gradients(function):
            loss = lambda *arguments: jnp.sin(function(*arguments)).sum()  # noqa: E731
            return jax.jit(jax.grad(loss, (0, 1)))(clip, weight)

        actual = gradients(
            lambda clip, weight: IMPLEMENTATIONS[implementation](clip, weight, stride, padding)
        )
        for gradient, expected in zip(actual, gradients(plain), strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-11)
