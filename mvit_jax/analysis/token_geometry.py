"""Positions of tokens in the clip, from the geometry of patch embedding and pooling alone."""

import math

import numpy as np
from jaxtyping import Float, Float32

from mvit_jax.models.plan import MViTConfig, Pool, Triple, grids, patch_grid, plan

Axes = tuple[np.ndarray, ...]  # one array each for time, height and width


def windows(pool: Pool | None, grid: Triple) -> Axes:
    """Returns average pooling as one matrix per axis, each `[pooled, positions]`.

    A pooling kernel is a box, so a position's weight is the product of its weights on the three
    axes. Padding has no weight, and each row sums to 1. The parameters of pooling convolutions are
    ignored.
    """
    if pool is None:
        return tuple(np.eye(n) for n in grid)
    axes = zip(grid, pool.output(grid), pool.kernel, pool.stride, pool.padding, strict=True)
    return tuple(_windows(*axis) for axis in axes)


def _windows(positions: int, pooled: int, kernel: int, stride: int, padding: int) -> np.ndarray:
    start = np.arange(pooled)[:, None] * stride - padding
    position = np.arange(positions)[None]
    inside = ((position >= start) & (position < start + kernel)).astype(float)
    return inside / np.maximum(inside.sum(1, keepdims=True), 1)


def cube_centres(config: MViTConfig, clip: Triple) -> Axes:
    """Returns the centres of a clip's cubes, in frames and pixels counted from 0.

    Args:
      config: the architecture.
      clip: (frames, height, width).
    """
    grid = patch_grid(config, *clip)
    return tuple(
        np.clip(np.arange(m) * s - p + (k - 1) / 2, 0, n - 1)
        for n, m, k, s, p in zip(
            clip, grid, config.patch_kernel, config.patch_stride, config.patch_padding, strict=True
        )
    )


def pooled_centres(pool: Pool | None, centres: Axes) -> Axes:
    """Returns the centres of pooled tokens, from the centres of the tokens before pooling.

    The centre of a kernel that overlaps the border is that of the whole kernel, padding included.
    """
    if pool is None:
        return centres
    grid = (len(centres[0]), len(centres[1]), len(centres[2]))
    return tuple(
        np.interp(np.arange(m) * s - p + (k - 1) / 2, np.arange(n), axis)
        for axis, n, m, k, s, p in zip(
            centres, grid, pool.output(grid), pool.kernel, pool.stride, pool.padding, strict=True
        )
    )


def block_centres(config: MViTConfig, clip: Triple) -> list[Axes]:
    """Returns the token centres at each block's input, followed by those at the last output."""
    centres = [cube_centres(config, clip)]
    for block in plan(config):
        centres.append(pooled_centres(block.q_pool, centres[-1]))
    return centres


def to_pixels(
    maps: Float[np.ndarray, "batch time height width"],
    clip: Triple,
    config: MViTConfig,
    block: int = 0,
) -> Float32[np.ndarray, "batch _frames _height _width"]:
    """Interpolates maps from a block's grid to the clip's pixels, linearly between token centres.

    Args:
      maps: a value for each input token of `block`.
      clip: (frames, height, width) of the model's input.
      config: the architecture.
      block: from 0; the number of blocks selects the grid of the last block's output.

    Raises:
      ValueError: the maps do not have the shape of that block's grid.
    """
    centres = block_centres(config, clip)[block]
    expected = tuple(len(axis) for axis in centres)
    if maps.shape[1:] != expected:
        raise ValueError(f"maps have the grid {maps.shape[1:]}, but block {block} has {expected}")
    t, h, w = (_linear(axis, n) for axis, n in zip(centres, clip, strict=True))
    spread = np.einsum("bijk,ti,hj,wk->bthw", maps, t, h, w, optimize=True)
    return spread.astype(np.float32)


def _linear(centres: np.ndarray, positions: int) -> np.ndarray:
    """Returns linear interpolation as a matrix, `[positions, tokens]`; constant at the borders."""
    if len(centres) == 1:
        return np.ones((positions, 1))
    at = np.arange(positions)
    return np.stack([np.interp(at, centres, row) for row in np.eye(len(centres))], axis=1)


def receptive_field(
    config: MViTConfig, clip: Triple, block: int, token: Triple
) -> tuple[slice, slice, slice]:
    """Returns the pixels that reach a token through patch embedding and query pooling alone.

    Through attention, every pixel reaches every token. The returned pixels are those at the
    token's own position.

    Args:
      config: the architecture.
      clip: (frames, height, width).
      block: as for `to_pixels`.
      token: (t, h, w) on the block's grid.

    Raises:
      ValueError: the token is not on the grid.
    """
    rows = grids(config, *clip)
    grid = rows[block].input if block < len(rows) else rows[-1].output
    if not all(0 <= index < n for index, n in zip(token, grid, strict=True)):
        raise ValueError(f"the token {token} is outside the grid {grid} of block {block}")
    low, high = list(token), [index + 1 for index in token]
    pools = [b.q_pool for b in plan(config)[:block]]
    steps = [
        (p.kernel, p.stride, p.padding, r.input) for p, r in zip(pools, rows, strict=False) if p
    ]
    steps.insert(0, (config.patch_kernel, config.patch_stride, config.patch_padding, clip))
    for kernel, stride, padding, size in reversed(steps):
        for axis in range(3):
            k, s, p = kernel[axis], stride[axis], padding[axis]
            high[axis] = min((high[axis] - 1) * s - p + k, size[axis])
            low[axis] = max(low[axis] * s - p, 0)
    t, h, w = (slice(a, b) for a, b in zip(low, high, strict=True))
    return t, h, w


def distances(
    queries: Axes, keys: Axes
) -> tuple[Float[np.ndarray, "tq tk"], Float[np.ndarray, "hwq hwk"]]:
    """Returns temporal (frames) and spatial (pixels) distances between all queries and keys."""
    time = np.abs(queries[0][:, None] - keys[0][None])
    rows, columns = (queries[i][:, None] - keys[i][None] for i in (1, 2))
    square = rows[:, None, :, None] ** 2 + columns[None, :, None, :] ** 2
    side = math.prod(square.shape[:2]), math.prod(square.shape[2:])
    return time, np.sqrt(square).reshape(side)
