"""What a model looks at: attention rollout across pooling, Grad-CAM at any block, distances.

Maps are of grids of tokens, for clips as the model takes them; `places.to_pixels` spreads them over
the frames, `render` paints them. All functions can be jitted with everything but `params` and
`clip` bound: `jax.jit(functools.partial(rollout, model))`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from mvit_jax.analysis import token_geometry
from mvit_jax.common.errors import UserError
from mvit_jax.models.functional import Functional
from mvit_jax.models.plan import BlockGrids, BlockPlan, MViTConfig, Triple, grids, plan

Map = Float[Array, "batch time height width"]
Flow = Float[Array, "batch _tokens"]  # how much of what is looked at comes from each token


def rollout(
    model: Functional,
    params: Any,
    clip: Shaped[Array, "..."],
    *,
    block: int | None = None,
    token: Triple | None = None,
) -> Map:
    """Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928) where the grid changes.

    Follows what the head reads back to the cubes: at every addition half comes from either side.
    Attention's half goes to the pooled keys as the mean of its heads says, and from each key to the
    places in its window; the skip's half goes to the places in the skip's window. Where MViTv2 adds
    the pooled queries, half of attention's half goes to the query's window. The class token's own
    part is left out.

    Args:
      model: the handle; a custom attention must record, and pool by the plan.
      params: of the model, as for `apply`.
      clip: normalised, `[batch, T, H, W, 3]`, or images `[batch, H, W, 3]`.
      block: start from what this block gives, 0 for the first; the last where not given.
      token: (t, h, w) on the grid of what `block` gives; what the head reads where not given (the
        class token, or the mean of all tokens).

    Returns:
      How much comes from each cube; each map sums to 1.

    Raises:
      UserError: no such block or token.
    """
    config = model.config
    blocks, rows = plan(config), grids(config, *_clip_size(clip))
    last = _block_index(-1 if block is None else block, len(blocks))
    flow = _start(config, rows[last].output, token, clip.shape[0])
    attentions = _attentions(model, params, clip)
    for b, row, attention in reversed(list(zip(blocks, rows, attentions, strict=True))[: last + 1]):
        flow = _through_block(flow, b, row, attention)
    grid = rows[0].input
    return _normalised(flow[:, flow.shape[1] - math.prod(grid) :].reshape(-1, *grid))


def _start(config: MViTConfig, grid: Triple, token: Triple | None, batch: int) -> Flow:
    first, count = int(config.class_token), math.prod(grid)
    start = np.zeros(first + count)
    if token is not None:
        inside = (0 <= place < n for place, n in zip(token, grid, strict=False))
        if len(token) != 3 or not all(inside):
            raise UserError(f"there is no token {token} on a grid of {grid}")
        start[first + np.ravel_multi_index(token, grid)] = 1
    elif first and not config.mean_pooling:
        start[0] = 1
    else:
        start[first:] = 1 / count
    return jnp.broadcast_to(jnp.asarray(start, jnp.float32), (batch, len(start)))


def _through_block(flow: Flow, block: BlockPlan, row: BlockGrids, attention: Array) -> Flow:
    """From the tokens that a block gives to those that it takes."""
    from_keys = np.ones(flow.shape[1], np.float32)  # the rest is from the queries added
    if block.residual_pool != "none":
        # In mode "grid" the class token's query is not added.
        first = flow.shape[1] - math.prod(row.output) if block.residual_pool == "grid" else 0
        from_keys[first:] = 0.5
    by_key = jnp.einsum("bq,bhqk->bk", flow * from_keys[None], attention) / attention.shape[1]
    attended = _unpooled(by_key, token_geometry.windows(block.kv_pool, row.input))
    own = flow * (1 - from_keys)[None]
    attended = attended + _unpooled(own, token_geometry.windows(block.q_pool, row.input))
    if block.skip == "none" and block.attention_width != block.width:
        return attended
    return (attended + _unpooled(flow, token_geometry.windows(block.skip_pool, row.input))) / 2


def _unpooled(flow: Flow, windows: token_geometry.Axes) -> Flow:
    """Spreads each pooled token's part over its window; a class token keeps its own."""
    t, h, w = (jnp.asarray(axis, flow.dtype) for axis in windows)
    pooled = (t.shape[0], h.shape[0], w.shape[0])
    first = flow.shape[1] - math.prod(pooled)
    grid = jnp.einsum("bijk,it,jh,kw->bthw", flow[:, first:].reshape(-1, *pooled), t, h, w)
    return jnp.concatenate([flow[:, :first], grid.reshape(flow.shape[0], -1)], axis=1)


def grad_cam(
    model: Functional,
    params: Any,
    clip: Shaped[Array, "..."],
    *,
    block: int | None = None,
    label: int | None = None,
    by_channel: bool = False,
) -> Map:
    """Grad-CAM at the tokens that a block takes: what speaks for a class, and where.

    Activations are weighted by the gradient of the class's score, summed over channels, and cut at
    0. Each place has its own weights, where they are positive (LayerCAM, Jiang et al. 2021), or
    with `by_channel` each channel the mean over places (Selvaraju et al. 2017, arXiv 1610.02391),
    which assumes that a channel means the same everywhere. On moving digits (trained as the README
    says, block 1; `python -m benchmarks.pointing`, 2026-11-22) the first puts 3.2 times as much
    near the digit as a uniform map, and on every clip more than twice; the second 2.0 times, on a
    third of the clips more than twice.

    What a block takes is looked at, since of what the last one *gives* a head that reads the class
    token alone has no gradient at the other tokens.

    Args:
      model: the handle; a custom attention must record, and pool by the plan.
      params: of the model, as for `apply`.
      clip: normalised, `[batch, T, H, W, 3]`, or images `[batch, H, W, 3]`.
      block: 0 for the first, -1 for the last; where not given, `fine_block`: early blocks have
        the finer grid, late ones have seen more.
      label: the class to explain; each clip's own most probable one where not given.
      by_channel: the original form.

    Returns:
      On the grid of the block's input; each map sums to 1, or is 0 where nothing speaks for the
      class.

    Raises:
      UserError: no such block or class.
    """
    config, module = model.config, model.module(params)
    blocks = plan(config)
    fine = fine_block(config, _clip_size(clip))
    index = fine if block is None else _block_index(block, len(blocks))
    if label is not None and not 0 <= label < config.num_classes:
        raise UserError(f"label must be from 0 to {config.num_classes - 1}, not {label}")
    rows = grids(config, *_clip_size(clip))

    def through(x: Array, start: int, stop: int) -> Array:
        for one, row in list(zip(module.blocks, rows, strict=True))[start:stop]:
            x = one(x, row.input)
        return x

    def score(x: Array) -> Array:
        logits, _ = module.classify(through(x, index, len(blocks)))
        labels = jnp.argmax(logits, -1) if label is None else jnp.full(logits.shape[0], label)
        return jnp.take_along_axis(logits, labels[:, None], axis=-1).sum()

    with module.operations():
        x, _ = module.embed(clip)
        x = through(x, 0, index)
        gradient = jax.grad(score)(x)
    grid = rows[index].input
    first = x.shape[1] - math.prod(grid)
    gradient, x = (tokens[:, first:].astype(jnp.float32) for tokens in (gradient, x))
    weights = gradient.mean(1, keepdims=True) if by_channel else jax.nn.relu(gradient)
    heat = jax.nn.relu((weights * x).sum(-1))
    return _normalised(heat.reshape(-1, *grid))


def fine_block(config: MViTConfig, clip: Triple) -> int:
    """The last block that takes a grid of at least 8 x 8 of such clips (frames, height, width): of
    MViT-B's 0 to 15 at 224 pixels 14. The first, where none does."""
    rows = grids(config, *clip)
    return max((i for i, row in enumerate(rows) if min(row.input[1:]) >= 8), default=0)


def attention_distance(
    model: Functional, params: Any, clip: Shaped[Array, "..."]
) -> tuple[list[Float[Array, " heads"]], list[Float[Array, " heads"]]]:
    """How far each head of each block looks, on average (MViT, figure A.6).

    The distance from a query to a key, weighted by attention, then averaged over queries and clips;
    between the centres of their windows in the clip, class token left out.

    Returns:
      For each block, in frames along time; and in pixels over the picture.
    """
    config, attentions = model.config, _attentions(model, params, clip)
    centres = token_geometry.block_centres(config, _clip_size(clip))
    in_time, in_space = [], []
    for i, (block, attention) in enumerate(zip(plan(config), attentions, strict=True)):
        keys = token_geometry.pooled_centres(block.kv_pool, centres[i])
        time, space = (jnp.asarray(d) for d in token_geometry.distances(centres[i + 1], keys))
        first = attention.shape[2] - time.shape[0] * space.shape[0]
        grid = attention[:, :, first:, first:]
        grid = grid / jnp.maximum(grid.sum(-1, keepdims=True), 1e-12)
        shape = (time.shape[0], space.shape[0], time.shape[1], space.shape[1])
        grid = grid.reshape(*grid.shape[:2], *shape)
        queries = shape[0] * shape[1]
        in_time.append(jnp.einsum("bhqpkl,qk->bh", grid, time).mean(0) / queries)
        in_space.append(jnp.einsum("bhqpkl,pl->bh", grid, space).mean(0) / queries)
    return in_time, in_space


def _attentions(model: Functional, params: Any, clip: Array) -> list[Array]:
    """Returns each block's probabilities, `[batch, heads, queries, keys]`."""
    try:
        _, features = model.apply(params, clip, capture=True)
        return features["attention"]
    except (KeyError, TypeError) as error:
        if "attention" not in str(error) and "record" not in str(error):
            raise
        raise UserError(
            "an attention of this model records no probabilities: take `record=None` in its call, "
            'and leave them, `[batch, heads, queries, keys]`, in `record["attention"]`'
        ) from error


def _clip_size(clip: Array) -> Triple:
    _, t, h, w, _ = clip.shape if clip.ndim == 5 else (0, 1, *clip.shape[1:])
    return t, h, w


def _block_index(block: int, count: int) -> int:
    if not -count <= block < count:
        raise UserError(f"block must be from 0 to {count - 1}, or -1 for the last, not {block}")
    return block % count


def _normalised(heat: Map) -> Map:
    total = heat.sum((1, 2, 3), keepdims=True)
    return heat / jnp.where(total > 0, total, 1)
