"""Absolute and relative positional embeddings for token grids of any size.

The stored embeddings fit the configured grid. For other grids they are interpolated linearly along
each axis, with pixel centres at half-integers, as in the reference code.
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


def _embedding(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(linear_init(rngs.params(), shape, jnp.float32))


class Positions(nnx.Module):
    """Adds absolute positional embeddings to tokens and prepends the class token.

    `config.positions` selects the kind (MViT, Table 11). "separate" adds an embedding of space and
    an embedding of time (section 4.1). "joint" has one embedding for each position in space-time.
    "space" embeds space alone, and "sincos" uses fixed sines and cosines.
    """

    def __init__(self, config: MViTConfig, *, dtype, rngs: nnx.Rngs) -> None:
        t, h, w = patch_grid(config, config.frames, config.size, config.size)
        c = config.width
        self.dtype, self.sincos = dtype, config.positions == "sincos"
        if config.class_token:
            self.class_token = _embedding(rngs, 1, c)
        if config.class_token and config.positions not in ("none", "sincos"):
            self.class_position = _embedding(rngs, 1, c)
        if config.positions in ("space", "separate"):
            self.space = _embedding(rngs, h, w, c)
        if config.positions == "separate":
            self.time = _embedding(rngs, t, c)
        if config.positions == "joint":
            self.joint = _embedding(rngs, t, h, w, c)

    def __call__(self, grid: Float[Array, "batch time height width channels"]) -> Tokens:
        size = grid.shape[1:4]
        if hasattr(self, "space"):
            grid = grid + self._resized("space", size[1:])[None, None]
        if hasattr(self, "time"):
            grid = grid + self._resized("time", size[:1])[None, :, None, None]
        if hasattr(self, "joint"):
            grid = grid + self._resized("joint", size)[None]
        if self.sincos:
            grid = grid + sincos(size, grid.shape[-1]).astype(self.dtype)[None]
        x = grid.reshape(grid.shape[0], -1, grid.shape[-1])
        if not hasattr(self, "class_token"):
            return x
        cls = self._resized("class_token", (1,))
        if hasattr(self, "class_position"):
            cls = cls + self._resized("class_position", (1,))
        return jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], *cls.shape)), x], axis=1)

    def _resized(self, name: str, size: tuple[int, ...]) -> Array:
        values = getattr(self, name)[...]
        for axis, length in enumerate(size):
            values = resize(values, length, axis)
        return values.astype(self.dtype)


class RelativePositions(nnx.Module):
    """Decomposed relative positional embeddings, shared by a block's heads (MViTv2, equation 4)."""

    def __init__(self, plan: BlockPlan, *, dtype, rngs: nnx.Rngs) -> None:
        self.order, self.dtype = plan.relative_distances, dtype
        self.clamps = plan.relative_resize == "clamp"
        if plan.relative_time:
            self.time = _embedding(rngs, plan.relative_time, plan.head_dim)
        if plan.relative_space:
            self.height = _embedding(rngs, plan.relative_space, plan.head_dim)
            self.width = _embedding(rngs, plan.relative_space, plan.head_dim)

    def __call__(
        self, queries: Triple, keys: Triple
    ) -> dict[str, Float[Array, "queries_of_axis keys_of_axis dim"]]:
        """Returns, by axis with embeddings, the embedding of each pair of query and key indices."""
        shorter = 1 if queries[1] <= queries[2] else 2
        return {
            name: self._rows(name, (q, k), axis, (queries[shorter], keys[shorter]))
            for axis, (name, q, k) in enumerate(
                zip(("time", "height", "width"), queries, keys, strict=True)
            )
            if hasattr(self, name)
        }

    def _rows(
        self, name: str, lengths: tuple[int, int], axis: int, shorter: tuple[int, int]
    ) -> Array:
        scale = shorter if self.clamps and axis > 0 else lengths
        rows = resize(getattr(self, name)[...], 2 * max(scale) - 1, 0)
        return rows[distances(*lengths, self.order, scale)].astype(self.dtype)


def distances(
    queries: int, keys: int, order: str, scale: tuple[int, int] | None = None
) -> Int[np.ndarray, "{queries} {keys}"]:
    """Returns the index of the relative positional embedding of each pair of query and key.

    There are 2 max(queries, keys) - 1 embeddings. Positions are scaled to the finer grid, and their
    distance is truncated to an integer. Where neither grid is a multiple of the other (78 queries
    and 10 keys, at 312 pixels), float32 rounding can decide the index. The operations therefore
    follow the order of the library that `order` names.

    Args:
      queries: number of query positions along the axis.
      keys: number of key positions along the axis.
      order: "slowfast" or "torchvision", as `MViTConfig.relative_distances`.
      scale: the queries and keys of another axis, which has the embeddings; distances beyond them
        are clamped. By default those of this axis.
    """
    f = np.float32
    of_queries, of_keys = scale or (queries, keys)
    q = np.arange(queries, dtype=f)[:, None] * f(max(of_keys / of_queries, 1))
    k, ratio = np.arange(keys, dtype=f)[None], max(of_queries / of_keys, 1)
    if order == "torchvision":
        indices = q - (k + f(1 - of_keys)) * f(ratio)
    else:
        indices = q - k * f(ratio) + f((of_keys - 1) * ratio)
    return np.clip(indices, 0, 2 * max(of_queries, of_keys) - 2).astype(np.int64)


def resize(values: Array, length: int, axis: int) -> Array:
    """Returns `values` interpolated linearly to `length` along `axis`, if the length differs."""
    if values.shape[axis] == length:
        return values
    weights = jnp.asarray(linear_weights(values.shape[axis], length), values.dtype)
    # A TPU's default precision would round positional embeddings to bfloat16.
    moved = jnp.tensordot(weights, values, (1, axis), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(moved, 0, axis)


def linear_weights(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
    """Returns the matrix of linear interpolation: row i has the weights of output i.

    Outputs beyond the first and the last pixel centre repeat the end values.
    """
    positions = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(old)[None]))


@functools.lru_cache(maxsize=16)
def sincos(grid: Triple, width: int) -> Float[np.ndarray, "time height width channels"]:
    """Returns fixed sine-cosine positional embeddings (reference code of video MAE).

    A quarter of the channels encodes time, then 3/8 the column and 3/8 the row. The first half of
    each part holds sines, the second cosines.
    """
    quarter, eighths = width // 4, 3 * width // 8
    t, h, w = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    parts = [_waves(t, quarter), _waves(w, eighths), _waves(h, eighths)]
    return np.concatenate(parts, axis=-1)


def _waves(positions: np.ndarray, channels: int) -> np.ndarray:
    frequencies = 10000.0 ** -(np.arange(channels // 2) / (channels / 2))
    angles = positions[..., None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
