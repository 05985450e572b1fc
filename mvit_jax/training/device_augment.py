"""Augmentation of batches on the device: flip, random erasing, then mixup or cutmix.

The order is that of the papers' recipes. Random numbers are drawn for the whole batch, so the
result does not depend on the number of devices.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mvit_jax.common.errors import UserError

Clips = Float[Array, "batch time height width 3"]
Targets = Float[Array, "batch *boxes num_classes"]  # boxes of detection, which is never mixed


def flip(clip: Clips, key: Array, rate: float) -> Clips:
    """Flips each clip left to right with probability `rate`; all frames or none."""
    chosen = jax.random.bernoulli(key, rate, (clip.shape[0],))
    return jnp.where(chosen[:, None, None, None, None], clip[..., ::-1, :], clip)


def flip_boxes(
    boxes: Float[Array, "batch boxes 4"], key: Array, rate: float, width: int
) -> Float[Array, "batch boxes 4"]:
    """Flips boxes (x1, y1, x2, y2 in pixels) as `flip` flips clips of `width` with this `key`."""
    chosen = jax.random.bernoulli(key, rate, (boxes.shape[0],))
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    flipped = jnp.stack([width - 1 - x2, y1, width - 1 - x1, y2], -1)
    return jnp.where(chosen[:, None, None], flipped, boxes)


def erase(clip: Clips, key: Array, rate: float, mode: str) -> Clips:
    """Applies random erasing (Zhong et al. 2020): overwrites one box per clip.

    The box is the same in all frames. Its distribution is timm's: area uniform in 0.02 to 1/3 of
    the frame, height / width log-uniform in 0.3 to 10/3. A box that does not fit is drawn again,
    up to ten draws; if none fits, nothing is erased.

    Args:
      clip: normalised clips.
      key: PRNG key.
      rate: probability for each clip; 0 turns erasing off.
      mode: "pixel" fills with standard normal noise, drawn for every pixel and frame; "const" fills
        with 0, the mean colour of normalised clips.

    Raises:
      UserError: unknown mode.
    """
    if mode not in ("pixel", "const"):
        raise UserError(f"the mode of random erasing must be 'pixel' or 'const', not {mode!r}")
    if rate <= 0:
        return clip
    draw_chosen, draw_box, draw_noise = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(draw_chosen, rate, (clip.shape[0], 1, 1))
    box = chosen & _erase_boxes(draw_box, clip.shape[0], clip.shape[2], clip.shape[3])
    filling = jnp.zeros((), clip.dtype)
    if mode == "pixel":
        # Drawn in float32, because bfloat16 noise has few distinct values.
        filling = jax.random.normal(draw_noise, clip.shape, jnp.float32).astype(clip.dtype)
    return jnp.where(box[:, None, :, :, None], filling, clip)


def _erase_boxes(key: Array, clips: int, height: int, width: int) -> Array:
    """Draws a box per clip as a mask [clips, height, width]; empty if none of ten draws fits."""
    draw_area, draw_aspect, draw_corner = jax.random.split(key, 3)
    shape = (clips, 10)
    area = jax.random.uniform(draw_area, shape, minval=0.02, maxval=1 / 3) * (height * width)
    bound = math.log(0.3)
    aspect = jnp.exp(jax.random.uniform(draw_aspect, shape, minval=bound, maxval=-bound))
    sides = jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], -1).round()
    frame = jnp.array([[height, width]], sides.dtype)
    fits = (sides < frame[None]).all(-1)
    first = fits.argmax(-1)[:, None, None]
    size = jnp.take_along_axis(sides, first, 1)[:, 0]
    # Uniform integers from 0 to `margin`; the minimum handles draws that round up to 1.
    margin = frame - size
    corner = jnp.floor(jax.random.uniform(draw_corner, (clips, 2)) * (margin + 1))
    corner = jnp.minimum(corner, margin)

    def inside(axis: int, length: int) -> Array:
        index = jnp.arange(length, dtype=corner.dtype)[None]
        start = corner[:, axis, None]
        return (index >= start) & (index < start + size[:, axis, None])

    box = inside(0, height)[:, :, None] & inside(1, width)[:, None, :]
    return box & fits.any(-1)[:, None, None]


def mix(
    clip: Clips,
    targets: Targets,
    key: Array,
    *,
    mixup: float,
    cutmix: float,
    switch: float,
    group: int,
) -> tuple[Clips, Targets]:
    """Applies mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) to clips and targets.

    Each mixup group draws one method and one weight. In a group, the first clip is mixed with the
    last, the second with the last but one, and so on.

    Args:
      clip: clips of the batch.
      targets: soft targets of the batch.
      key: PRNG key.
      mixup: alpha of mixup's Beta distribution; 0 turns mixup off.
      cutmix: alpha of cutmix's Beta distribution; 0 turns cutmix off.
      switch: probability of cutmix if both are on.
      group: mixup group size: the number of neighbouring clips in a group. It must divide the
        batch, and should divide the clips of a device, so that no clip moves between devices.
    """
    if mixup <= 0 and cutmix <= 0:
        return clip, targets
    groups = clip.shape[0] // group
    if mixup > 0 and cutmix > 0:
        cutmix_prob = switch
    else:
        cutmix_prob = 1.0 if cutmix > 0 else 0.0

    def mix_group(index, clip, targets):
        draw_method, draw_mixup, draw_cutmix, draw_box = jax.random.split(
            jax.random.fold_in(key, index), 4
        )
        mixup_weight = jax.random.beta(draw_mixup, mixup, mixup) if mixup > 0 else 1.0
        box_weight = jax.random.beta(draw_cutmix, cutmix, cutmix) if cutmix > 0 else 1.0
        box, cutmix_weight = _cutmix_box(draw_box, box_weight, clip.shape[2], clip.shape[3])
        cut = jax.random.bernoulli(draw_method, cutmix_prob)
        # The first clip's share of each pixel; the box is the same in all frames.
        share = jnp.where(cut, 1.0 - box, mixup_weight).astype(clip.dtype)[None, None, :, :, None]
        weight = jnp.where(cut, cutmix_weight, mixup_weight).astype(targets.dtype)
        return (
            clip * share + clip[::-1] * (1 - share),
            targets * weight + targets[::-1] * (1 - weight),
        )

    grouped = [x.reshape(groups, group, *x.shape[1:]) for x in (clip, targets)]
    mixed = jax.vmap(mix_group)(jnp.arange(groups), *grouped)
    return mixed[0].reshape(clip.shape), mixed[1].reshape(targets.shape)


def _cutmix_box(key: Array, weight, height: int, width: int):
    """Draws cutmix's box, which covers 1 - `weight` of a frame before it is clipped to the frame.

    Returns:
      A float32 mask [height, width], 1 inside the box, and the weight of the targets: the share of
      the frame outside of the clipped box.
    """
    side = jnp.sqrt(1.0 - weight)
    cy, cx = jax.random.uniform(key, (2,)) * jnp.array([height, width])

    def inside(n: int, centre) -> Array:
        half = jnp.floor(n * side) / 2
        low, high = jnp.floor(centre - half), jnp.floor(centre + half)
        index = jnp.arange(n)
        return (index >= low) & (index < high)

    box = (inside(height, cy)[:, None] & inside(width, cx)[None, :]).astype(jnp.float32)
    return box, 1.0 - box.mean()
