"""Implementations of pooling and their gradients against a loop over windows."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mvit_jax.models.ops import pooling
from mvit_jax.models.plan import Pool
from mvit_jax.training.distributed import sharding

CASES = [  # (kernel, stride, size of the grid), each time x height x width
    ((3, 3, 3), (1, 1, 1), (2, 3, 4)),
    ((3, 3, 3), (1, 2, 2), (2, 5, 6)),  # queries
    ((3, 3, 3), (1, 8, 8), (3, 9, 18)),  # keys and values: distant kernel elements
    ((3, 3, 3), (1, 8, 8), (2, 3, 2)),  # a grid smaller than the stride
    ((3, 3, 3), (2, 2, 2), (1, 4, 5)),  # one frame, with a stride along time
    ((1, 3, 3), (1, 2, 2), (1, 5, 7)),  # images
    ((1, 5, 5), (1, 4, 4), (1, 8, 11)),  # kernel = stride + 1
    ((3, 1, 5), (2, 3, 1), (5, 7, 4)),  # different values on every axis
    ((2, 4, 2), (2, 3, 1), (3, 7, 4)),  # even kernels
    ((1, 1, 1), (1, 2, 2), (2, 5, 4)),  # windows that skip positions
]
BATCH, CHANNELS = 2, 3


def windows(grid, case):
    """Yields each output position and its window's values by kernel index."""
    kernel, stride, size = case
    padding = [k // 2 for k in kernel]
    output = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, *case[:2], padding, strict=True)]
    for position in itertools.product(*(range(n) for n in output)):
        window = {}
        for tap in itertools.product(*(range(k) for k in kernel)):
            index = tuple(
                o * s - p + k for o, s, p, k in zip(position, stride, padding, tap, strict=True)
            )
            if all(0 <= i < n for i, n in zip(index, size, strict=True)):
                window[tap] = grid[:, *index]
        yield position, window


def naive(grid, weight, case, mode):
    kernel, *_ = case
    outputs = {}
    for position, window in windows(grid, case):
        values = np.stack(list(window.values()))
        if mode == "max":
            outputs[position] = values.max(0)
        elif mode == "avg":
            outputs[position] = values.sum(0) / np.prod(kernel)
        else:
            outputs[position] = sum(weight[tap] * value for tap, value in window.items())
    shape = [max(i) + 1 for i in zip(*outputs, strict=True)]
    stacked = np.stack(list(outputs.values()), axis=1)
    return stacked.reshape(len(grid), *shape, grid.shape[-1])


def draw(case, dtype: type = np.float32):
    rng = np.random.default_rng(0)
    grid = rng.standard_normal((BATCH, *case[2], CHANNELS)).astype(dtype)
    weight = rng.standard_normal((*case[0], CHANNELS)).astype(dtype)
    return grid, weight


IMPLEMENTATIONS = {
    "max": ("max", lambda grid, weight, plan: pooling.max_pool(grid, plan)),
    "avg": ("avg", lambda grid, weight, plan: pooling.average_pool(grid, plan)),
    "depthwise_conv": ("conv", pooling.depthwise_conv),
    "depthwise_slices": ("conv", pooling.depthwise_slices),
    "pool, max": ("max", lambda grid, weight, plan: pooling.pool(grid, plan)),
    "pool, avg": ("avg", lambda grid, weight, plan: pooling.pool(grid, plan, None)),
    "pool, conv": ("conv", lambda grid, weight, plan: pooling.pool(grid, plan, weight)),
}


@pytest.mark.parametrize(
    "implementation", [name for name in IMPLEMENTATIONS if not name.startswith("pool,")]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_implementation_equals_the_loop_over_windows(case, implementation):
    mode, function = IMPLEMENTATIONS[implementation]
    grid, weight = draw(case)
    plan = Pool(mode, *case[:2])
    pooled = jax.jit(function, static_argnums=2)(jnp.array(grid), jnp.array(weight), plan)
    expected = naive(grid.astype(np.float64), weight.astype(np.float64), case, mode)
    assert pooled.dtype == jnp.float32
    assert pooled.shape[1:4] == plan.output(case[2])
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_output_has_the_dtype_of_the_grid(dtype, implementation):
    mode, function = IMPLEMENTATIONS[implementation]
    case = CASES[1]
    grid, weight = draw(case, np.float64)
    with jax.enable_x64(True):
        grid, weight = jnp.array(grid, dtype), jnp.array(weight, dtype)
        pooled = jax.jit(function, static_argnums=2)(grid, weight, Pool(mode, *case[:2]))
        assert pooled.dtype == dtype
        expected = naive(np.array(grid, np.float64), np.array(weight, np.float64), case, mode)
        tolerance = {"bfloat16": 3e-2, "float32": 1e-6, "float64": 1e-14}[dtype] * np.abs(
            expected
        ).max()
        np.testing.assert_allclose(np.array(pooled, np.float64), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_custom_gradients_equal_those_of_the_convolution(case, dtype, tolerance):
    plan = Pool("conv", *case[:2])
    shape = (BATCH, *plan.output(case[2]), CHANNELS)
    factors = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    with jax.enable_x64(True):
        arrays = [jnp.array(x) for x in draw(case, dtype)]

        def gradients(function):
            loss = lambda *arrays: (function(*arrays, plan) * factors).sum()  # noqa: E731
            return jax.jit(jax.grad(loss, (0, 1)))(*arrays)

        actual, correct = map(gradients, (pooling.depthwise_slices, pooling.depthwise_conv))
        for gradient, expected in zip(actual, correct, strict=True):
            assert gradient.dtype == dtype
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernel_gradients_are_summed_by_rows_in_float32(rows, dtype, monkeypatch):
    """Sums as many rows as a large grid has, too many for bfloat16."""
    monkeypatch.setattr(pooling, "_rows_in_cache", lambda grid: rows)
    case = ((3, 3, 3), (1, 2, 1), (8, 36, 5))
    grid, weight = (jnp.array(x, dtype) for x in draw(case))
    factors = np.random.default_rng(1).standard_normal((BATCH, 8, 18, 5, CHANNELS))
    factors = jnp.array(factors, dtype)
    pooled = functools.partial(pooling.depthwise_slices, grid, plan=Pool("conv", *case[:2]))
    (taps,) = jax.jit(lambda weight: jax.vjp(pooled, weight)[1](factors))(weight)
    padded = np.pad(np.float64(grid), [(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)])
    expected = np.zeros((3, 3, 3, CHANNELS))
    for t, y, x in np.ndindex(3, 3, 3):
        values = padded[:, t : t + 8, y : y + 36 : 2, x : x + 5]
        expected[t, y, x] = (values * np.float64(factors)).sum((0, 1, 2, 3))
    assert taps.dtype == dtype
    error = (np.float64(taps) - expected) / expected.std()
    if dtype == jnp.bfloat16:
        assert np.sqrt(np.square(error).mean()) < 5e-3
    else:
        assert np.abs(error).max() < 1e-5


def test_kernel_gradients_require_one_all_reduce():
    """Each device sums over the rows of its clip before the all-reduce."""
    case = ((3, 3, 3), (1, 2, 2), (4, 6, 6))
    rng = np.random.default_rng(0)
    grid = rng.standard_normal((8, *case[2], CHANNELS)).astype(np.float32)
    weight = rng.standard_normal((*case[0], CHANNELS)).astype(np.float32)

    def taps(weight, grid):
        return jax.grad(lambda w: (pooling.depthwise_slices(grid, w, by_conv) ** 2).sum())(weight)

    by_conv = Pool("conv", *case[:2])
    mesh = sharding.make_mesh(devices=jax.devices())
    with jax.set_mesh(mesh):
        by_clip = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        program = jax.jit(taps, in_shardings=(None, by_clip)).lower(weight, grid).compile()
        split = program(weight, jax.device_put(grid, by_clip))
    assert (program.as_text() or "").count(" all-reduce(") == 1
    whole = jax.jit(taps)(weight, grid)
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-5 * np.std(whole))


def test_a_convolution_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="requires weight"):
        pooling.pool(jnp.zeros((1, 1, 2, 2, 1)), Pool("conv", (1, 3, 3), (1, 2, 2)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_first_of_equal_maxima_gets_the_gradient(case):
    rng = np.random.default_rng(0)
    grid = rng.integers(-1, 2, (BATCH, *case[2], CHANNELS)).astype(np.float32)
    plan = Pool("max", *case[:2])
    factors = rng.standard_normal((BATCH, *plan.output(case[2]), CHANNELS)).astype(np.float32)
    expected = np.zeros(grid.shape)
    for position, window in windows(grid, case):
        first = np.stack(list(window.values())).argmax(0)  # in the order of kernel elements
        for b, c in np.ndindex(first.shape):
            tap = list(window)[first[b, c]]
            index = [
                o * s - p + k
                for o, s, p, k in zip(position, plan.stride, plan.padding, tap, strict=True)
            ]
            expected[b, *index, c] += factors[b, *position, c]
    loss = jax.jit(jax.grad(lambda grid: (pooling.max_pool(grid, plan) * factors).sum()))
    np.testing.assert_allclose(loss(jnp.array(grid)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["max", "avg", "conv"])
def test_empty_and_symbolic_batches_are_pooled(mode):
    """Symbolic batches are those of exported programs."""
    plan = Pool(mode, (1, 3, 3), (1, 2, 2))
    weight = jnp.ones((1, 3, 3, 4)) if mode == "conv" else None
    assert pooling.pool(jnp.ones((0, 2, 6, 6, 4)), plan, weight).shape == (0, 2, 3, 3, 4)
    (batch,) = jax.export.symbolic_shape("b")
    grid = jax.ShapeDtypeStruct((batch, 2, 6, 6, 4), jnp.float32)
    exported = jax.export.export(jax.jit(lambda grid: pooling.pool(grid, plan, weight)))(grid)
    three = jnp.arange(3.0 * 2 * 6 * 6 * 4).reshape(3, 2, 6, 6, 4)
    np.testing.assert_allclose(exported.call(three), pooling.pool(three, plan, weight), rtol=1e-6)
