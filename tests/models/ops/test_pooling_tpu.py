"""TPU pooling kernels, interpreted on the CPU, against XLA's convolution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.ops import pooling, pooling_tpu
from mvit_jax.models.ops.attention import on_grid
from mvit_jax.models.plan import Pool

CASES = [  # (kernel, stride, grid)
    ((3, 3, 3), (1, 8, 8), (3, 8, 18)),  # keys and values
    ((3, 3, 3), (2, 2, 2), (3, 4, 4)),  # a stride along time
    ((3, 3, 3), (1, 1, 1), (2, 4, 8)),
    ((3, 3, 3), (1, 2, 2), (3, 8, 6)),  # queries
    ((1, 3, 3), (1, 2, 2), (1, 6, 8)),  # images
    ((1, 3, 3), (1, 2, 2), (1, 7, 7)),  # only as whole clips
    ((2, 4, 2), (2, 3, 1), (3, 8, 4)),  # even kernels
    ((1, 1, 1), (1, 2, 2), (2, 4, 4)),  # windows that skip positions
    ((3, 3, 3), (1, 8, 8), (2, 4, 4)),  # a grid smaller than the stride
]
WHOLE = {"all frames at once": 2048, "a frame at a time": 0}
CHANNELS = 130  # more than a TPU's vector length, and no multiple of it


def draw(case, first, dtype=np.float32):
    kernel, stride, grid = case
    rng = np.random.default_rng(0)
    plan = Pool("conv", kernel, stride)
    x = rng.standard_normal((2, first + math.prod(grid), CHANNELS))
    weight = rng.standard_normal((*kernel, CHANNELS))
    gradient = rng.standard_normal((2, first + math.prod(plan.output(grid)), CHANNELS))
    return plan, *(jnp.array(array, dtype) for array in (x, weight, gradient))


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("first", [pytest.param(0, marks=pytest.mark.nightly), 1])
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if i in (0, 3) else pytest.mark.slow) for i, c in enumerate(CASES)],
    ids=str,
)
def test_the_kernels_equal_the_convolution_and_its_gradients(case, first, whole, monkeypatch):
    monkeypatch.setattr(pooling_tpu, "WHOLE", WHOLE[whole])
    plan, x, weight, gradient = draw(case, first)
    grid = case[2]
    if not pooling_tpu.fits(x, grid, plan):
        assert grid[1] * grid[2] % pooling_tpu.TILE and not WHOLE[whole]
        return

    def conv(x, weight):
        return on_grid(lambda g: pooling.depthwise_conv(g, weight, plan), x, grid)

    expected, vjp = jax.vjp(conv, x, weight)
    dx, dweight = vjp(gradient)
    taps = weight.reshape(-1, CHANNELS)
    y = pooling_tpu.forward(x, taps, grid=grid, plan=plan, interpret=True)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
    gradients = pooling_tpu.backward(x, taps, gradient, grid=grid, plan=plan, interpret=True)
    np.testing.assert_allclose(gradients[0], dx, rtol=0, atol=2e-5)
    np.testing.assert_allclose(gradients[1].reshape(weight.shape), dweight, rtol=0, atol=5e-5)


def test_bfloat16_is_summed_in_float32():
    case = CASES[2]
    plan, x, weight, gradient = draw(case, 1, jnp.bfloat16)
    taps, options = weight.reshape(-1, CHANNELS), {"grid": case[2], "plan": plan, "interpret": True}
    y = pooling_tpu.forward(x, taps, **options)
    wide = pooling_tpu.forward(x.astype(jnp.float32), taps.astype(jnp.float32), **options)
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
    dtypes = {g.dtype for g in pooling_tpu.backward(x, taps, gradient, **options)}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}


def test_unsupported_grids_and_modes_do_not_use_the_kernels():
    x = jnp.zeros((1, 1 + 8 * 78 * 78, 96))
    plan = Pool("conv", (3, 3, 3), (1, 2, 2))
    assert not pooling_tpu.fits(x, (8, 78, 78), plan)  # frames of 6,084 rows begin within tiles
    assert not pooling_tpu.fits(x, (8, 78, 78), Pool("max", (3, 3, 3), (1, 2, 2)))
    jax.eval_shape(lambda x: pooling.pool_tokens(x, (8, 78, 78), plan, jnp.ones((3, 3, 3, 96))), x)
