"""The pooling operator P(.; kernel, stride, padding) on token grids (MViT, section 3.1).

Pooling maps a grid `[batch, T, H, W, channels]` to `[batch, T', H', W', channels]` in the same
dtype, with `plan.padding` and sizes rounded down. The modules that hold the weights are in
`models/pooling.py`.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Shaped

from mvit_jax.models.ops import pooling_tpu
from mvit_jax.models.ops.attention import Tokens, on_grid
from mvit_jax.models.ops.dispatch import (
    batch_is_divisible,
    batch_is_sharded,
    on_each_device,
    saving_inputs,
    uses_reference,
    with_gradient_of,
)
from mvit_jax.models.plan import Pool, Triple

Grid = Float[Array, "batch time height width channels"]
Pooled = Float[Array, "batch pooled_time pooled_height pooled_width channels"]
Taps = Float[Array, "kt kh kw channels"]


def pool(grid: Grid, plan: Pool, weight: Taps | None = None) -> Pooled:
    """Returns the pooled grid; the convolution modes require `weight`, the depthwise kernel."""
    batch, t, h, w, channels = grid.shape
    tokens = pool_tokens(grid.reshape(batch, t * h * w, channels), (t, h, w), plan, weight)
    return tokens.reshape(batch, *plan.output((t, h, w)), channels)


def pool_tokens(x: Tokens, grid: Triple, plan: Pool, weight: Taps | None = None) -> Tokens:
    """Returns tokens on `grid` after pooling; a class token passes through unchanged.

    Raises:
      ValueError: `weight` is missing in a convolution mode.
    """
    if plan.mode in ("max", "avg"):
        function = max_pool if plan.mode == "max" else average_pool
        return on_grid(functools.partial(function, plan=plan), x, grid)
    if weight is None:
        raise ValueError('pooling by convolution requires weight: pass it, or a plan of mode "max"')
    fits = pooling_tpu.fits(x, grid, plan) and batch_is_divisible(x.shape[0])
    return (_pool_tokens if fits and not uses_reference() else _pool_grid)(x, weight, grid, plan)


def _convolve(grid: Grid, plan: Pool, weight: Taps) -> Pooled:
    """Returns the depthwise convolution of a grid, computed without Pallas kernels."""
    if uses_reference():
        return depthwise_conv(grid, weight, plan)
    return lax.platform_dependent(
        grid,
        weight,
        cpu=lambda grid, weight: depthwise_slices(grid, weight, plan),
        default=lambda grid, weight: depthwise_conv(grid, weight, plan),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _pool_tokens(x: Tokens, weight: Taps, grid: Triple, plan: Pool) -> Tokens:
    def on_tpu(x, weight):
        return pooling_tpu.forward(x, weight, grid=grid, plan=plan)

    def default(x, taps):
        return _pool_grid(x, taps.reshape(weight.shape), grid, plan)

    return lax.platform_dependent(
        x,
        weight.reshape(-1, weight.shape[-1]),
        tpu=with_gradient_of(default, on_each_device(on_tpu)),
        default=default,
    )


def _pool_grid(x: Tokens, weight: Taps, grid: Triple, plan: Pool) -> Tokens:
    return on_grid(lambda tokens: _convolve(tokens, plan, weight), x, grid)


def _pool_tokens_backward(grid: Triple, plan: Pool, saved: tuple[Tokens, Taps], gradient: Tokens):
    x, weight = saved

    def on_tpu(x, taps, gradient):
        def on_device(x, taps, gradient):
            dx, dtaps = pooling_tpu.backward(x, taps, gradient, grid=grid, plan=plan)
            return dx, dtaps[None]

        dx, dtaps = on_each_device(on_device)(x, taps, gradient)
        return dx, dtaps.sum(0)

    def default(x, taps, gradient):
        plain = lambda x, taps: _pool_grid(x, taps.reshape(weight.shape), grid, plan)  # noqa: E731
        dx, dtaps = jax.vjp(plain, x, taps)[1](gradient)
        return dx, dtaps

    dx, dtaps = lax.platform_dependent(
        x,
        weight.reshape(-1, weight.shape[-1]),
        gradient,
        tpu=with_gradient_of(default, on_tpu),
        default=default,
    )
    return dx, dtaps.reshape(weight.shape)


_pool_tokens.defvjp(saving_inputs(_pool_tokens), _pool_tokens_backward)


def max_pool(grid: Grid, plan: Pool) -> Pooled:
    """Returns the maximum over each window; padding is minus infinity.

    If several positions of a window have the maximum, the first gets the gradient, as in XLA.
    """
    return (_max if uses_reference() else _max_pool)(grid, plan)


def _max(grid: Grid, plan: Pool) -> Pooled:
    return lax.reduce_window(grid, -jnp.inf, lax.max, *_windows(plan))


_max_pool = jax.custom_vjp(_max, nondiff_argnums=(1,))


def _max_backward(plan: Pool, grid: Grid, gradient: Pooled) -> tuple[Grid]:
    gradient = lax.platform_dependent(
        grid,
        gradient,
        cpu=lambda grid, gradient: _max_gradient_by_phases(grid, gradient, plan),
        default=lambda grid, gradient: jax.vjp(lambda grid: _max(grid, plan), grid)[1](gradient)[0],
    )
    return (gradient,)


_max_pool.defvjp(lambda grid, plan: (_max_pool(grid, plan), grid), _max_backward)


def _max_gradient_by_phases(grid: Grid, gradient: Pooled, plan: Pool) -> Grid:
    """Returns the gradient of `max_pool` by operations that are fast on CPUs.

    Comparisons of shifted slices of the grid find the tap that reads each window's maximum. The
    position that this tap reads gets the window's gradient. Gradients are summed for each phase
    (position modulo the stride), see `_grid_gradient`. This takes 0.05 to 0.13 of the processor
    time of XLA's select-and-scatter (`max_pool` with its gradient, in the skip connections of
    MViT-B 16x4, 2026-11-23).
    """
    padded = _pad(grid, plan.padding, -jnp.inf)
    taps = jnp.arange(math.prod(plan.kernel), dtype=jnp.int32)
    best = winner = None
    for i, tap in enumerate(_indices(plan.kernel)):
        shifted = _shifted(padded, tap, gradient.shape, plan.stride)
        if best is None or winner is None:
            best, winner = shifted, jnp.zeros(shifted.shape, jnp.int32)
        else:
            winner = jnp.where(shifted > best, i, winner)
            best = jnp.maximum(shifted, best)
    assert winner is not None
    phases = _split_phases(taps.reshape(*plan.kernel, 1), _chunks(plan), plan.stride, fill=-1)
    return _by_phases(
        lambda gradient, winner, taps: jnp.where(winner == taps, gradient, 0),
        phases, (gradient, winner), grid.shape, plan,
    )  # fmt: skip


def average_pool(grid: Grid, plan: Pool) -> Pooled:
    """Returns the mean over each window; padding counts as zeros (the reference code's default)."""
    return lax.reduce_window(grid, 0.0, lax.add, *_windows(plan)) / math.prod(plan.kernel)


def _windows(plan: Pool):
    padding = [(0, 0), *((p, p) for p in plan.padding), (0, 0)]
    return (1, *plan.kernel, 1), (1, *plan.stride, 1), padding


def depthwise_conv(grid: Grid, weight: Taps, plan: Pool) -> Pooled:
    """Returns the depthwise convolution of a grid by XLA's grouped convolution."""
    channels = grid.shape[-1]
    return lax.conv_general_dilated(
        grid,
        weight.reshape(*plan.kernel, 1, channels),
        window_strides=plan.stride,
        padding=[(p, p) for p in plan.padding],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=channels,
    )


# Depthwise convolution for CPUs, as a sum of shifted slices. On CPUs, XLA's grouped convolution and
# its gradients take 64 to 188 times as long. The gradients are hand-written, since autodiff's
# gradients of the slices take 1.1 to 3.2 times as long (`python -m benchmarks.pooling`, 2 cores,
# 2026-11-23). On TPUs slices are probably slower: with slices, a prototype's training step moved
# twice the bytes (compiled for v5e).


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_slices(grid: Grid, weight: Taps, plan: Pool) -> Pooled:
    """Returns the result of `depthwise_conv`, as a sum of shifted slices times a tap's weights."""
    batch, t, h, w, channels = grid.shape
    output = plan.output((t, h, w))
    padded = _pad(grid, plan.padding)
    total = jnp.zeros((batch, *output, channels), grid.dtype)
    taps = weight.reshape(*plan.kernel, 1, 1, 1, 1, channels)
    for tap in _indices(plan.kernel):
        shifted = _shifted(padded, tap, total.shape, plan.stride)
        total = total + shifted * taps[tap]
    return total


def _shifted(padded: Array, tap, shape, stride: Triple) -> Pooled:
    """Returns the strided slice of the padded grid that `tap` reads for an output of `shape`."""
    batch, *output, channels = shape
    end = [k + (n - 1) * s + 1 for k, n, s in zip(tap, output, stride, strict=True)]
    return lax.slice(padded, (0, *tap, 0), (batch, *end, channels), (1, *stride, 1))


def _slices_backward(plan: Pool, saved: tuple[Grid, Taps], gradient: Pooled) -> tuple[Grid, Taps]:
    grid, weight = saved

    def on_device(gradient, grid):
        return _weight_gradient(gradient, grid, plan)[None]

    # If XLA partitioned the loop, devices would run an all-reduce for every block of rows and tap.
    sharded = batch_is_sharded() and batch_is_divisible(grid.shape[0])
    taps = (on_each_device(on_device) if sharded else on_device)(gradient, grid).sum(0)
    return _grid_gradient(gradient, weight, grid, plan), taps.astype(weight.dtype)


depthwise_slices.defvjp(saving_inputs(depthwise_slices), _slices_backward)


def _grid_gradient(gradient: Pooled, weight: Taps, grid: Grid, plan: Pool) -> Grid:
    """Returns the gradient of the grid, computed for each phase (position modulo the stride).

    Along each axis of the padded grid, only taps chunk * stride + phase read the position
    m * stride + phase. The position's gradient is the sum over chunks of gradient[m - chunk] *
    weight[chunk, phase]. This sum has ceil(kernel / stride) terms per axis, and each term covers
    all phases. A sum over taps would have one zero-padded term for each tap.
    """
    phases = _split_phases(weight, _chunks(plan), plan.stride)
    return _by_phases(
        lambda gradient, weight: gradient * weight, phases, (gradient,), grid.shape, plan
    )


def _by_phases(term, phases: Array, pooled: tuple[Array, ...], shape, plan: Pool) -> Grid:
    """Returns the sum of `term(*pooled, taps)` over the windows that contain each position.

    Args:
      term: maps slices of `pooled` and the taps of one chunk to a summand.
      phases: the taps' weights or indices, arranged by `_split_phases`.
      pooled: arrays on the pooled grid.
      shape: shape of the result.
      plan: the pooling.
    """
    batch, *size, channels = shape
    chunks = _chunks(plan)
    padded = [_pad(x, [c - 1 for c in chunks]) for x in pooled]
    positions = [n + c - 1 for n, c in zip(pooled[0].shape[1:4], chunks, strict=True)]
    total = jnp.zeros((), pooled[0].dtype)
    for chunk in _indices(chunks):
        start = [c - 1 - i for c, i in zip(chunks, chunk, strict=True)]
        end = [i + n for i, n in zip(start, positions, strict=True)]
        slices = [
            jnp.expand_dims(lax.slice(x, (0, *start, 0), (batch, *end, channels)), (2, 4, 6))
            for x in padded
        ]
        # [batch, T', phase, H', phase, W', phase, channels]
        total = total + term(*slices, phases[chunk][None, None, :, None, :, None, :])
    whole = [n * s for n, s in zip(positions, plan.stride, strict=True)]
    total = total.reshape(batch, *whole, channels)
    # Crops the padding; appends zeros for positions at the end that no window contains.
    cut = [(-p, n + p - m, 0) for p, n, m in zip(plan.padding, size, whole, strict=True)]
    return lax.pad(total, jnp.zeros((), total.dtype), [(0, 0, 0), *cut, (0, 0, 0)])


def _chunks(plan: Pool) -> list[int]:
    return [-(-k // s) for k, s in zip(plan.kernel, plan.stride, strict=True)]


def _split_phases(weight: Array, chunks, stride: Triple, fill: int = 0):
    """Returns taps `[kt, kh, kw, channels]` as `[chunk t, h, w, phase t, h, w, channels]`."""
    padding = [c * s - k for c, s, k in zip(chunks, stride, weight.shape, strict=False)]
    weight = jnp.pad(weight, [*((0, n) for n in padding), (0, 0)], constant_values=fill)
    pattern = "(ct st) (ch sh) (cw sw) channels -> ct ch cw st sh sw channels"
    return rearrange(weight, pattern, st=stride[0], sh=stride[1], sw=stride[2])


def _weight_gradient(gradient: Pooled, grid: Grid, plan: Pool) -> Taps:
    """Returns the gradient of the taps, in float32 at least.

    Loops over blocks of rows, and over taps, so that products stay in the cache. This takes 0.2 to
    0.8 of the time without blocks. A matrix product with ones takes 0.5 to 0.8 of the time of
    `sum`. The taps are not unrolled, as XLA would merge them into one loop and not vectorise this
    loop (2026-11-23).
    """
    batch, t, h, w, channels = gradient.shape
    _, stride_h, stride_w = plan.stride
    rows = _rows_in_cache(gradient)
    padded = _pad(grid, plan.padding)
    ones = jnp.ones((1, batch * rows * w), gradient.dtype)
    taps = jnp.array(list(_indices(plan.kernel)))
    span = (batch, 1, (rows - 1) * stride_h + 1, (w - 1) * stride_w + 1, channels)

    def add(total, position):
        frame, row = position
        part = lax.dynamic_slice(gradient, (0, frame, row, 0, 0), (batch, 1, rows, w, channels))
        corner = position * jnp.array(plan.stride[:2])

        def one_tap(tap):
            start = (0, corner[0] + tap[0], corner[1] + tap[1], tap[2], 0)
            shifted = lax.dynamic_slice(padded, start, span)
            shifted = lax.slice(shifted, (0,) * 5, span, (1, 1, stride_h, stride_w, 1))
            products = (shifted * part).reshape(-1, channels)
            return jnp.matmul(ones, products, preferred_element_type=total.dtype)[0]

        return total + lax.map(one_tap, taps), None

    positions = jnp.array([(frame, row) for frame in range(t) for row in range(0, h, rows)])
    total = jnp.zeros((len(taps), channels), jnp.promote_types(gradient.dtype, jnp.float32))
    total = lax.scan(add, total, positions)[0]
    return total.reshape(*plan.kernel, channels)


def _rows_in_cache(grid: Grid) -> int:
    """Returns the rows per block: the largest divisor of the height with up to 150 kB a block."""
    batch, _, height, width, channels = grid.shape
    size = batch * width * channels * grid.dtype.itemsize
    fit = [n for n in range(1, height + 1) if height % n == 0 and n * size <= 150_000]
    return max(fit, default=1)


def _pad(
    grid: Shaped[Array, "batch time height width channels"], padding, value: float = 0.0
) -> Shaped[Array, "batch padded_time padded_height padded_width channels"]:
    return jnp.pad(grid, [(0, 0), *((p, p) for p in padding), (0, 0)], constant_values=value)


def _indices(shape):
    return itertools.product(*(range(n) for n in shape))
