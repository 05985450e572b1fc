"""Positions, absolute and relative, for token grids of any size.

Tables are made for the nominal grid of a variant; on another grid they are interpolated linearly
along each axis, pixel centres at half-integers, as the reference code does.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from mvit_jax.models.layers import linear_init
from mvit_jax.models.ops.attention import Tokens
from mvit_jax.models.plan import BlockPlan, MViTConfig, Triple, patch_grid


def table(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(linear_init(rngs.params(), shape, jnp.float32))


class Positions(nnx.Module):
    """Adds what tells tokens apart, absolute positions, and puts the class token before them.

    "separate": one table for space and one for time, added (MViT, section 4.1); "joint": one for
    every place in space-time; "space": none for time; "sincos": fixed; "none" (MViT, Table 11).
    """

    def __init__(self, config: MViTConfig, *, dtype, rngs: nnx.Rngs) -> None:
        t, h, w = patch_grid(config, config.frames, config.size, config.size)
        c = config.width
        self.dtype, self.sincos = dtype, config.positions == "sincos"
        if config.class_token:
            self.class_token = table(rngs, 1, c)
        if config.class_token and config.positions not in ("none", "sincos"):
            self.class_position = table(rngs, 1, c)
        if config.positions in ("space", "separate"):
            self.space = table(rngs, h, w, c)
        if config.positions == "separate":
            self.time = table(rngs, t, c)
        if config.positions == "joint":
            self.joint = table(rngs, t, h, w, c)

    def __call__(self, grid: Float[Array, "batch time height width channels"]) -> Tokens:
        size = grid.shape[1:4]
        if hasattr(self, "space"):
            grid = grid + self._table("space", size[1:])[None, None]
        if hasattr(self, "time"):
            grid = grid + self._table("time", size[:1])[None, :, None, None]
        if hasattr(self, "joint"):
            grid = grid + self._table("joint", size)[None]
        if self.sincos:
            grid = grid + sincos(size, grid.shape[-1]).astype(self.dtype)[None]
        x = grid.reshape(grid.shape[0], -1, grid.shape[-1])
        if not hasattr(self, "class_token"):
            return x
        cls = self._table("class_token", (1,))
        if hasattr(self, "class_position"):
            cls = cls + self._table("class_position", (1,))
        return jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], *cls.shape)), x], axis=1)

    def _table(self, name: str, size: tuple[int, ...]) -> Array:
        values = getattr(self, name)[...]
        for axis, length in enumerate(size):
            values = resize(values, length, axis)
        return values.astype(self.dtype)


class RelativePositions(nnx.Module):
    """Decomposed relative positions of one block, shared by its heads (MViTv2, equation 4)."""

    def __init__(self, plan: BlockPlan, *, dtype, rngs: nnx.Rngs) -> None:
        self.order, self.dtype = plan.relative_distances, dtype
        if plan.relative_time:
            self.time = table(rngs, plan.relative_time, plan.head_dim)
        if plan.relative_space:
            self.height = table(rngs, plan.relative_space, plan.head_dim)
            self.width = table(rngs, plan.relative_space, plan.head_dim)

    def __call__(
        self, queries: Triple, keys: Triple
    ) -> dict[str, Float[Array, "queries_of_axis keys_of_axis dim"]]:
        """For each axis that has a table: its row for every pair of query and key places."""
        return {
            axis: self._rows(axis, q, k)
            for axis, q, k in zip(("time", "height", "width"), queries, keys, strict=True)
            if hasattr(self, axis)
        }

    def _rows(self, axis: str, queries: int, keys: int) -> Array:
        rows = resize(getattr(self, axis)[...], 2 * max(queries, keys) - 1, 0)
        return rows[distances(queries, keys, self.order)].astype(self.dtype)


def distances(queries: int, keys: int, order: str) -> Int[np.ndarray, "queries keys"]:
    """Which row of a table of 2 max(queries, keys) - 1 rows a pair of places reads.

    Places are scaled to the finer of the two grids, and their distance is cut to a whole number.
    Where one grid is no multiple of the other, rounding decides (at 312 pixels, 78 queries meet 10
    keys), so the float32 operations are done in the original's order.
    """
    f = np.float32
    q = np.arange(queries, dtype=f)[:, None] * f(max(keys / queries, 1))
    k, ratio = np.arange(keys, dtype=f)[None], max(queries / keys, 1)
    if order == "torchvision":
        return (q - (k + f(1 - keys)) * f(ratio)).astype(np.int64)
    return (q - k * f(ratio) + f((keys - 1) * ratio)).astype(np.int64)


def resize(values: Array, length: int, axis: int) -> Array:
    """Linear interpolation along one axis; the same array where it has that length already."""
    if values.shape[axis] == length:
        return values
    weights = jnp.asarray(linear_weights(values.shape[axis], length), values.dtype)
    # On a TPU the default precision would round positions to bfloat16.
    moved = jnp.tensordot(weights, values, (1, axis), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(moved, 0, axis)


def linear_weights(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
    """Row i holds the shares of the old places in new place i; ends are repeated."""
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)[None]))


@functools.lru_cache(maxsize=16)
def sincos(grid: Triple, width: int) -> Float[np.ndarray, "time height width channels"]:
    """Fixed positions: a quarter of the channels for time, then half of the rest for the column
    and half for the row; each half sines, half cosines (reference code of video MAE)."""
    quarter, eighths = width // 4, 3 * width // 8
    t, h, w = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    parts = [_waves(t, quarter), _waves(w, eighths), _waves(h, eighths)]
    return np.concatenate(parts, axis=-1)


def _waves(places: np.ndarray, channels: int) -> np.ndarray:
    rates = 10000.0 ** -(np.arange(channels // 2) / (channels / 2))
    angles = places[..., None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
