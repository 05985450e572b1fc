"""Action detection: scores of boxes in a clip (MViT, section 4.3; AVA).

A box is the place of one person at the clip's middle frame. Its features are cut from the mean of
the last grid over time, as for every frame of the clip.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mvit_jax.models.plan import MViTConfig, plan

Boxes = Float[Array, "batch boxes 4"]  # x1, y1, x2, y2 in pixels of the model's input

BINS = 7  # cells of a box along height and along width


def box_features(
    grid: Float[Array, "batch time height width channels"], boxes: Boxes, stride: tuple[int, int]
) -> Float[Array, "batch boxes channels"]:
    """Returns the vector of each box that the head classifies: the maximum over its cells.

    Args:
      grid: the last block's tokens after the final norm, without the class token.
      boxes: the boxes, in pixels of the model's input.
      stride: `total_stride`.
    """
    return roi_align(grid.mean(1), boxes, stride).max((2, 3))


def total_stride(config: MViTConfig, blocks: int | None = None) -> tuple[int, int]:
    """Returns the pixels along height and along width of a position of the grid after `blocks`.

    By default that is the last grid.
    """
    strides = [config.patch_stride, *(b.q_pool.stride for b in plan(config)[:blocks] if b.q_pool)]
    return math.prod(s[1] for s in strides), math.prod(s[2] for s in strides)


def roi_align(
    maps: Float[Array, "batch height width channels"],
    boxes: Boxes,
    stride: tuple[int, int],
    bins: int = BINS,
) -> Float[Array, "batch boxes {bins} {bins} channels"]:
    """Computes RoIAlign (He et al. 2017, section 3), aligned and with adaptive sampling.

    The mean of bilinear samples in a cell is separable, so that each box has a matrix along height
    and one along width. Features of a box without area are 0. There is no gradient by the boxes.

    Args:
      maps: the features.
      boxes: the boxes in pixels; they may exceed the maps.
      stride: pixels per position of the maps, along height and along width.
      bins: cells of a box along each axis.
    """
    samples = _box_samples(boxes, stride, maps.shape[1:3], bins)
    rows, columns = (axis.astype(maps.dtype) for axis in samples)
    # A TPU's default precision would round float32 features to bfloat16.
    cut = jnp.einsum("bnyh,bhwc->bnywc", rows, maps, precision=lax.Precision.HIGHEST)
    return jnp.einsum("bnxw,bnywc->bnyxc", columns, cut, precision=lax.Precision.HIGHEST)


def position_weights(
    boxes: Boxes, stride: tuple[int, int], size: tuple[int, int]
) -> Float[Array, "batch boxes height width"]:
    """Returns the weight of each position of a map in the mean of a box's cells.

    The weights of a box sum to 1, or less if the box exceeds the map.

    Args:
      boxes: the boxes in pixels.
      stride: pixels per position of the map, along height and along width.
      size: height and width of the map.
    """
    rows, columns = (axis.mean(2) for axis in _box_samples(boxes, stride, size, BINS))
    return jnp.einsum("bnh,bnw->bnhw", rows, columns, precision=lax.Precision.HIGHEST)


def _box_samples(
    boxes: Boxes, stride: tuple[int, int], size: tuple[int, ...], bins: int
) -> tuple[Float[Array, "batch boxes {bins} height"], Float[Array, "batch boxes {bins} width"]]:
    """Returns `_samples` of the boxes along height and along width."""
    x1, y1, x2, y2 = jnp.moveaxis(lax.stop_gradient(boxes), -1, 0)
    rows = _samples(y1, y2, stride[0], size[0], bins)
    return rows, _samples(x1, x2, stride[1], size[1], bins)


def _samples(
    low: Float[Array, "batch boxes"],
    high: Float[Array, "batch boxes"],
    stride: int,
    size: int,
    bins: int,
) -> Float[Array, "batch boxes {bins} {size}"]:
    """Returns the weight of each position of an axis in the mean of each cell's samples.

    A cell has as many samples, evenly spaced, as positions that it covers, rounded up. A sample
    more than one position outside the map is 0, and counts.
    """
    start, end = low / stride - 0.5, high / stride - 0.5  # positions are at the centres of pixels
    cell = (end - start)[..., None] / bins
    count = jnp.ceil(cell)
    positions = jnp.arange(size, dtype=cell.dtype).reshape(1, 1, 1, -1)
    first = start[..., None] + jnp.arange(bins, dtype=cell.dtype).reshape(1, 1, -1) * cell

    def add(k: Array, weights: Array) -> Array:
        at = first + (k + 0.5) * cell / jnp.maximum(count, 1)
        inside = (k < count) & (at >= -1) & (at <= size)
        distances = jnp.abs(jnp.clip(at, 0, size - 1)[..., None] - positions)
        return weights + inside[..., None] * jnp.maximum(1 - distances, 0)

    none = jnp.zeros((*cell.shape[:-1], bins, size), cell.dtype)
    # The number of samples follows from the boxes, so the loop has no fixed length.
    total = lax.fori_loop(0, jnp.max(count, initial=0).astype(int), add, none)
    return total / jnp.maximum(count, 1)[..., None]
