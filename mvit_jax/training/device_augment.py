"""What happens to a batch on the device before the model sees it: flip, erase, mix.

In this order, the recipes'. Draws are of the whole batch, so that the number of devices that hold
it changes nothing.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mvit_jax.common.errors import UserError

Clips = Float[Array, "batch time height width 3"]
Targets = Float[Array, "batch num_classes"]


def flip(clip: Clips, key: Array, rate: float) -> Clips:
    """Mirrors whole clips left to right with probability `rate`."""
    chosen = jax.random.bernoulli(key, rate, (clip.shape[0], 1, 1, 1, 1))
    return jnp.where(chosen, clip[..., ::-1, :], clip)


def erase(clip: Clips, key: Array, rate: float, mode: str) -> Clips:
    """Random erasing (Zhong et al. 2020): with probability `rate`, overwrites a box of a clip.

    The box is the same in all frames. As in timm: its share of the frame is uniform in 0.02..1/3,
    its height divided by its width log-uniform in 0.3..10/3; a box that does not fit is drawn
    again, ten times at most. A rate of 0 turns it off.

    Args:
      clip: normalised clips.
      key: gives the draws.
      rate: probability for each clip.
      mode: "pixel" for standard normal noise, for every pixel and frame its own; "const" for 0,
        which is the mean colour of normalised clips.

    Raises:
      UserError: another mode.
    """
    if mode not in ("pixel", "const"):
        raise UserError(f"random erasing is by 'pixel' or 'const', not by {mode!r}")
    if rate <= 0:
        return clip
    draw_chosen, draw_box, draw_noise = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(draw_chosen, rate, (clip.shape[0], 1, 1))
    box = chosen & _erased(draw_box, clip.shape[0], clip.shape[2], clip.shape[3])
    filling = jnp.zeros((), clip.dtype)
    if mode == "pixel":
        # In float32, as bfloat16 would leave few values to draw.
        filling = jax.random.normal(draw_noise, clip.shape, jnp.float32).astype(clip.dtype)
    return jnp.where(box[:, None, :, :, None], filling, clip)


def _erased(key: Array, clips: int, height: int, width: int) -> Array:
    """Boxes [clips, height, width] of True; nowhere True where ten draws do not fit."""
    draw_area, draw_aspect, draw_place = jax.random.split(key, 3)
    shape = (clips, 10)
    area = jax.random.uniform(draw_area, shape, minval=0.02, maxval=1 / 3) * (height * width)
    bound = math.log(0.3)
    aspect = jnp.exp(jax.random.uniform(draw_aspect, shape, minval=bound, maxval=-bound))
    sides = jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], -1).round()
    frame = jnp.array([[height, width]], sides.dtype)
    fits = (sides < frame[None]).all(-1)
    first = fits.argmax(-1)[:, None, None]
    size = jnp.take_along_axis(sides, first, 1)[:, 0]
    # Whole numbers from 0 to what is left over; a draw next to 1 may be rounded up to 1.
    left_over = frame - size
    corner = jnp.floor(jax.random.uniform(draw_place, (clips, 2)) * (left_over + 1))
    corner = jnp.minimum(corner, left_over)

    def inside(axis: int, length: int) -> Array:
        place = jnp.arange(length, dtype=corner.dtype)[None]
        start = corner[:, axis, None]
        return (place >= start) & (place < start + size[:, axis, None])

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
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of clips with their targets.

    Each group of `group` neighbouring clips draws one weight and one of the two ways ("switch" is
    the chance of cutmix where both are on), and pairs its clips first with last, second with last
    but one, ...: groups never cross a device, so the number of devices changes nothing. An alpha of
    0 turns a way off.
    """
    if mixup <= 0 and cutmix <= 0:
        return clip, targets
    groups = clip.shape[0] // group
    if mixup > 0 and cutmix > 0:
        chance = switch
    else:
        chance = 1.0 if cutmix > 0 else 0.0

    def mix_group(index, clip, targets):
        use_cutmix, draw_up, draw_cut, draw_box = jax.random.split(
            jax.random.fold_in(key, index), 4
        )
        weight_up = jax.random.beta(draw_up, mixup, mixup) if mixup > 0 else 1.0
        weight_cut = jax.random.beta(draw_cut, cutmix, cutmix) if cutmix > 0 else 1.0
        box, kept = _box(draw_box, weight_cut, clip.shape[2], clip.shape[3])
        cut = jax.random.bernoulli(use_cutmix, chance)
        # Share of the first clip, place by place; the box is the same in all frames.
        share = jnp.where(cut, 1.0 - box, weight_up).astype(clip.dtype)[None, None, :, :, None]
        weight = jnp.where(cut, kept, weight_up).astype(targets.dtype)
        return (
            clip * share + clip[::-1] * (1 - share),
            targets * weight + targets[::-1] * (1 - weight),
        )

    grouped = [x.reshape(groups, group, *x.shape[1:]) for x in (clip, targets)]
    mixed = jax.vmap(mix_group)(jnp.arange(groups), *grouped)
    return mixed[0].reshape(clip.shape), mixed[1].reshape(targets.shape)


def _box(key: Array, weight, height: int, width: int):
    """A box [height, width] of ones that covers about 1 - weight of a frame, and the share that it
    leaves: it is cut off at the frame's edges, and the weight of the targets follows."""
    side = jnp.sqrt(1.0 - weight)
    cy, cx = jax.random.uniform(key, (2,)) * jnp.array([height, width])

    def inside(n: int, centre) -> Array:
        half = jnp.floor(n * side) / 2
        low, high = jnp.floor(centre - half), jnp.floor(centre + half)
        place = jnp.arange(n)
        return (place >= low) & (place < high)

    box = (inside(height, cy)[:, None] & inside(width, cx)[None, :]).astype(jnp.float32)
    return box, 1.0 - box.mean()
