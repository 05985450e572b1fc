"""Attention rollout across pooling, Grad-CAM at any block, and attention distances.

Maps have a value per token. `token_geometry.to_pixels` interpolates them to pixels, and `render`
draws them over the frames. All functions can be jitted once every argument except `params`, `clip`
and `box` is bound: `jax.jit(functools.partial(rollout, model))`. Maps of a detection model explain
one box of each clip.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from mvit_jax.analysis import token_geometry
from mvit_jax.common.errors import UserError
from mvit_jax.models.detection import position_weights, total_stride
from mvit_jax.models.functional import Functional
from mvit_jax.models.plan import BlockGrids, BlockPlan, MViTConfig, Triple, grids, plan

Map = Float[Array, "batch time height width"]
Flow = Float[Array, "batch _tokens"]  # each token's share of the head's input
Box = Float[Array, "batch 4"]  # x1, y1, x2, y2 of one box of each clip, in pixels of the clip


def rollout(
    model: Functional,
    params: Any,
    clip: Shaped[Array, "..."],
    *,
    block: int | None = None,
    token: Triple | None = None,
    box: Box | None = None,
) -> Map:
    """Computes attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928) across pooling.

    Traces the head's input back to the cubes, as shares of tokens. A block adds its attention and
    its skip connection, so each of the two gets half of a token's share:

    - The attention's half is distributed over the pooled keys by the attention probabilities,
      averaged over heads, then evenly over each key's pooling window. With residual pooling
      (MViTv2), half of this half goes to the query's pooling window instead.
    - The skip connection's half is distributed evenly over the skip's pooling window.

    The class token's share is dropped at the end.

    The map shows where attention and pooling let information through; it describes the model
    rather than the clip, and no class. On moving digits (`python -m benchmarks.pointing`,
    2026-12-01) the maps of two clips have a correlation of 0.87. The maximum is on the clip's digit
    in 56 % of clips, and on another clip's digit in 47 %. For a prediction use `grad_cam`.

    Args:
      model: the handle; a custom attention must capture its probabilities and pool by the plan.
      params: the model's parameters, as for `apply`.
      clip: normalised, `[batch, T, H, W, 3]`, or images `[batch, H, W, 3]`.
      block: start at this block's output, 0 for the first; the last by default.
      token: start at this token, (t, h, w) on the grid of the block's output; by default at the
        head's input (the class token, or the mean of all tokens).
      box: for a detection model without `token`: start at the tokens in this box, weighted as by
        RoIAlign, with equal weights over time.

    Returns:
      The share of each cube. Each map sums to 1, or is 0 for a box outside the clip.

    Raises:
      UserError: the block or the token does not exist, or the box is missing or unexpected.
    """
    config = model.config
    if token is None:
        _check_box(config, box)
    elif box is not None:
        raise UserError("a map starts at a token or at a box: leave one of the two out")
    blocks, rows = plan(config), grids(config, *_clip_size(clip))
    last = _block_index(-1 if block is None else block, len(blocks))
    if box is not None:
        flow = _start_in_box(config, rows[last].output, box, total_stride(config, last + 1))
    else:
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
        inside = (0 <= index < n for index, n in zip(token, grid, strict=False))
        if len(token) != 3 or not all(inside):
            raise UserError(f"the token {token} is outside the grid {grid} (time, height, width)")
        start[first + np.ravel_multi_index(token, grid)] = 1
    elif first and not config.mean_pooling:
        start[0] = 1
    else:
        start[first:] = 1 / count
    return jnp.broadcast_to(jnp.asarray(start, jnp.float32), (batch, len(start)))


def _start_in_box(config: MViTConfig, grid: Triple, box: Box, stride: tuple[int, int]) -> Flow:
    frame = position_weights(box[:, None], stride, grid[1:]).reshape(len(box), -1)
    return jnp.pad(jnp.tile(frame / grid[0], (1, grid[0])), ((0, 0), (int(config.class_token), 0)))


def _through_block(flow: Flow, block: BlockPlan, row: BlockGrids, attention: Array) -> Flow:
    """Traces shares from a block's output tokens back to its input tokens."""
    from_keys = np.ones(flow.shape[1], np.float32)  # the remainder comes from residual pooling
    if block.residual_pool != "none":
        # In mode "grid" residual pooling excludes the class token.
        first = flow.shape[1] - math.prod(row.output) if block.residual_pool == "grid" else 0
        from_keys[first:] = 0.5
    by_key = jnp.einsum("bq,bhqk->bk", flow * from_keys[None], attention) / attention.shape[1]
    attended = _unpool(by_key, token_geometry.windows(block.kv_pool, row.input))
    from_query = flow * (1 - from_keys)[None]
    attended = attended + _unpool(from_query, token_geometry.windows(block.q_pool, row.input))
    if block.skip == "none" and block.attention_width != block.width:
        return attended
    return (attended + _unpool(flow, token_geometry.windows(block.skip_pool, row.input))) / 2


def _unpool(flow: Flow, windows: token_geometry.Axes) -> Flow:
    """Distributes each pooled token's share over its pooling window; the class token's stays."""
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
    box: Box | None = None,
) -> Map:
    """Computes Grad-CAM of a class at the input of a block.

    Activations are weighted and summed over channels; negative sums become 0. The weights come
    from the gradient of the class's logit:

    - By default, a weight is the positive part of the gradient at each token (LayerCAM, Jiang et
      al. 2021).
    - With `by_channel`, a weight is the gradient's mean over tokens (Selvaraju et al. 2017, arXiv
      1610.02391). This assumes that a channel has the same meaning everywhere.

    Measured on moving digits (trained as in the README, block 1; `python -m benchmarks.pointing`,
    2026-12-01): the maps of two clips have a correlation of 0.20. The maximum is on the clip's own
    digit in 98 % of clips, and on another clip's digit in 43 %. With `by_channel`, these are 0.12,
    83 % and 42 %.

    The map is of the block's input, not of its output. At the last block's output, a head on the
    class token has no gradient at the other tokens.

    Args:
      model: the handle; a custom block must have the plan's grids.
      params: the model's parameters, as for `apply`.
      clip: normalised, `[batch, T, H, W, 3]`, or images `[batch, H, W, 3]`.
      block: 0 for the first, -1 for the last. The default is `fine_block`: early blocks have a
        finer grid, late blocks more abstract features.
      label: the class to explain; by default the most probable class of each clip, or of its box.
      by_channel: use the original Grad-CAM.
      box: for a detection model: the box whose class is explained.

    Returns:
      Maps on the grid of the block's input. Each sums to 1, or is 0 if no token has positive
      evidence for the class.

    Raises:
      UserError: the block or the class does not exist, or the box is missing or unexpected.
    """
    config, module = model.config, model.module(params)
    _check_box(config, box)
    blocks = plan(config)
    fine = fine_block(config, _clip_size(clip))
    index = fine if block is None else _block_index(block, len(blocks))
    if label is not None and not 0 <= label < config.num_classes:
        raise UserError(f"label must be from 0 to {config.num_classes - 1}, not {label}")
    rows = grids(config, *_clip_size(clip))

    def run_blocks(x: Array, start: int, stop: int) -> Array:
        for layer, row in list(zip(module.blocks, rows, strict=True))[start:stop]:
            x = layer(x, row.input)
        return x

    def score(x: Array) -> Array:
        x = run_blocks(x, index, len(blocks))
        if box is None:
            logits, *_ = module.classify(x)
        else:
            logits = module.classify(x, None, rows[-1].output, box[:, None])[0][:, 0]
        labels = jnp.argmax(logits, -1) if label is None else jnp.full(logits.shape[0], label)
        return jnp.take_along_axis(logits, labels[:, None], axis=-1).sum()

    with module.operations():
        x, _ = module.embed(clip)
        x = run_blocks(x, 0, index)
        gradient = jax.grad(score)(x)
    grid = rows[index].input
    first = x.shape[1] - math.prod(grid)
    gradient, x = (tokens[:, first:].astype(jnp.float32) for tokens in (gradient, x))
    weights = gradient.mean(1, keepdims=True) if by_channel else jax.nn.relu(gradient)
    heat = jax.nn.relu((weights * x).sum(-1))
    return _normalised(heat.reshape(-1, *grid))


def fine_block(config: MViTConfig, clip: Triple) -> int:
    """Returns the last block with an input grid of at least 8 x 8, or 0 if there is none.

    For MViT-B at 224 pixels this is block 14; the last block is 15.

    Args:
      config: the architecture.
      clip: (frames, height, width).
    """
    rows = grids(config, *clip)
    return max((i for i, row in enumerate(rows) if min(row.input[1:]) >= 8), default=0)


def attention_distance(
    model: Functional, params: Any, clip: Shaped[Array, "..."]
) -> tuple[list[Float[Array, " heads"]], list[Float[Array, " heads"]]]:
    """Computes the mean attention distance of each head of each block (MViT, figure A.6).

    Distances between the centres of queries and keys in the clip are weighted by attention, and
    averaged over queries and clips. The class token is excluded.

    Returns:
      Two lists with an array per block: temporal distance in frames, spatial distance in pixels.
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


def _check_box(config: MViTConfig, box: Box | None) -> None:
    if config.task == "detection" and box is None:
        raise UserError("maps of a detection model explain a box: pass box [batch, 4] in pixels")
    if config.task != "detection" and box is not None:
        raise UserError('a box requires a model with task="detection"')


def _attentions(model: Functional, params: Any, clip: Array) -> list[Array]:
    """Returns each block's attention probabilities, `[batch, heads, queries, keys]`."""
    # Attention does not depend on the boxes, of which there may be none.
    boxes = jnp.zeros((len(clip), 0, 4)) if model.config.task == "detection" else None
    try:
        _, features = model.apply(params, clip, boxes, capture=True)
        return features["attention"]
    except (KeyError, TypeError) as error:
        if "attention" not in str(error) and "record" not in str(error):
            raise
        raise UserError(
            "an attention module of this model does not record its probabilities: accept "
            "`record=None` in its call, and store them as an array `[batch, heads, queries, keys]` "
            'in `record["attention"]`'
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
