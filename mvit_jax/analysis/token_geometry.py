"""Where tokens lie in the clip: the geometry of cubes and pools, without weights."""

import math

import numpy as np
from jaxtyping import Float, Float32

from mvit_jax.models.plan import MViTConfig, Pool, Triple, grids, patch_grid, plan

Axes = tuple[np.ndarray, ...]  # one array for time, height and width each


def windows(pool: Pool | None, grid: Triple) -> Axes:
    """For each axis, `[pooled, places]`: the share that each place has in each pooled one.

    A pool's windows are boxes, so the share of a place in the grid is the product over axes. Shares
    of a window sum to 1, padding left out: a convolution's taps are not asked for.
    """
    if pool is None:
        return tuple(np.eye(n) for n in grid)
    each = zip(grid, pool.output(grid), pool.kernel, pool.stride, pool.padding, strict=True)
    return tuple(_windows(*axis) for axis in each)


def _windows(places: int, pooled: int, kernel: int, stride: int, padding: int) -> np.ndarray:
    start = np.arange(pooled)[:, None] * stride - padding
    place = np.arange(places)[None]
    inside = ((place >= start) & (place < start + kernel)).astype(float)
    return inside / np.maximum(inside.sum(1, keepdims=True), 1)


def cube_centres(config: MViTConfig, clip: Triple) -> Axes:
    """Centres of the cubes of a clip (frames, height, width): in frames and pixels, from 0."""
    grid = patch_grid(config, *clip)
    return tuple(
        np.clip(np.arange(m) * s - p + (k - 1) / 2, 0, n - 1)
        for n, m, k, s, p in zip(
            clip, grid, config.patch_kernel, config.patch_stride, config.patch_padding, strict=True
        )
    )


def pooled_centres(pool: Pool | None, centres: Axes) -> Axes:
    """Centres of the windows of a pool over tokens with these centres; windows that the border cuts
    keep the centre of the whole one."""
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
    """Centres of the tokens that each block takes, and, last, of those that the last one gives."""
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
    """Spreads maps over the clip, linearly between the centres of tokens.

    Args:
      maps: a number for each token that `block` takes, on the grid; 0 for the grid of the cubes.
      clip: (frames, height, width) of what went through the model.
      block: from 0; or as many as there are blocks, for the tokens that the last one gives.

    Raises:
      ValueError: the maps are not on that block's grid.
    """
    centres = block_centres(config, clip)[block]
    expected = tuple(len(axis) for axis in centres)
    if maps.shape[1:] != expected:
        raise ValueError(f"maps on the grid {maps.shape[1:]}, and block {block} takes {expected}")
    t, h, w = (_linear(axis, n) for axis, n in zip(centres, clip, strict=True))
    spread = np.einsum("bijk,ti,hj,wk->bthw", maps, t, h, w, optimize=True)
    return spread.astype(np.float32)


def _linear(centres: np.ndarray, places: int) -> np.ndarray:
    """`[places, tokens]`: each place between two centres takes from both; beyond, from the last."""
    if len(centres) == 1:
        return np.ones((places, 1))
    at = np.arange(places)
    return np.stack([np.interp(at, centres, row) for row in np.eye(len(centres))], axis=1)


def receptive_field(
    config: MViTConfig, clip: Triple, block: int, token: Triple
) -> tuple[slice, slice, slice]:
    """The part of the clip whose pixels reach a token by cubes and pools of queries alone.

    What attention adds is the whole clip; this is where a token "is". `block` as for `to_pixels`.

    Raises:
      ValueError: no such token.
    """
    rows = grids(config, *clip)
    grid = rows[block].input if block < len(rows) else rows[-1].output
    if not all(0 <= place < n for place, n in zip(token, grid, strict=True)):
        raise ValueError(f"token {token} is not on the grid {grid} of block {block}")
    low, high = list(token), [place + 1 for place in token]
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
    """Between each pair of tokens: in frames along time, and in pixels over the picture."""
    time = np.abs(queries[0][:, None] - keys[0][None])
    rows, columns = (queries[i][:, None] - keys[i][None] for i in (1, 2))
    square = rows[:, None, :, None] ** 2 + columns[None, :, None, :] ** 2
    side = math.prod(square.shape[:2]), math.prod(square.shape[2:])
    return time, np.sqrt(square).reshape(side)
