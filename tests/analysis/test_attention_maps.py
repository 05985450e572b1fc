"""Rollout, Grad-CAM and attention distances against loops in NumPy and finite differences."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mvit_jax.analysis import attention_maps, token_geometry
from mvit_jax.common.errors import UserError
from mvit_jax.models.functional import functional
from mvit_jax.models.plan import grids, plan
from mvit_jax.models.variants import variant
from tests.models.test_detection import looped
from tests.support.marks import nightly, slow

SMALL = {"frames": 4, "size": 24, "num_classes": 5, "width": 8, "depths": (1, 2)}
V2 = {"positions": "none", "relative_positions": "both", "full_q_pool": True, "drop_path": 0.0}
CONFIGS = {
    "v1": variant("mvit_b_16x4", **SMALL, kv_stride=(1, 2, 2)),
    "v2": variant("mvit_b_16x4", **SMALL, **V2, kv_stride=(1, 2, 2), residual_pool="grid",
                  expand="attention"),
    "v2 of timm": variant("mvitv2_t", **SMALL | {"frames": 1, "width": 16}, residual_pool="all"),
    "mean pooling": variant("mvit_b_16x4", **SMALL, kv_stride=(1, 2, 2), mean_pooling=True),
    "no skip": variant("mvit_b_16x4", **SMALL, **V2, kv_stride=(1, 2, 2), skip="none",
                       expand="attention", residual_pool="all"),
    "vit": variant("vit_b_8x8", **SMALL | {"depths": (3,), "width": 24}, heads=3,
                   patch_kernel=(2, 8, 8),
                   patch_stride=(2, 8, 8)),
}  # fmt: skip


def size_of(config):
    return (4, 24, 24) if config.frames > 1 else (1, 24, 24)


@functools.cache
def drawn(name):
    """Returns parameters with sharp attention, two clips, their logits and features."""
    config = CONFIGS[name]
    params = functional(config).init(jax.random.key(0))
    noise = optax.tree.random_like(jax.random.key(1), params)
    params = optax.tree.add_scale(params, 0.3, noise)
    shape = (2, 4, 24, 24, 3) if config.frames > 1 else (2, 24, 24, 3)
    clip = jax.random.normal(jax.random.key(2), shape)
    apply = functools.partial(functional(config).apply, capture=True)
    logits, features = jax.jit(apply)(params, clip)
    return params, clip, logits, jax.tree.map(np.asarray, features)


@pytest.mark.parametrize("name", [slow("v1"), slow("v2"), "vit"])
def test_captured_attention_is_the_softmax_of_queries_and_keys(name):
    params, clip, logits, features = drawn(name)
    inputs = jax.jit(functools.partial(attention_outputs, config=CONFIGS[name]))(params, clip)
    for i, attended in enumerate(inputs):
        q, k, v, attention = (features[f][i] for f in ("queries", "keys", "values", "attention"))
        assert attention.shape == (2, q.shape[2], q.shape[1], k.shape[1])
        np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)
        if name != "v2":  # there relative positions are added
            scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
            e = np.exp(scores - scores.max(-1, keepdims=True))
            np.testing.assert_allclose(attention, e / e.sum(-1, keepdims=True), atol=1e-5)
        mixed = np.einsum("bhqk,bkhd->bqhd", attention, v).reshape(2, q.shape[1], -1)
        if name == "v2":  # the class token's query is not added
            residual = q.reshape(mixed.shape).copy()
            residual[:, 0] = 0
            mixed = mixed + residual
        proj = jax.tree.map(np.asarray, params["blocks"][str(i)]["attn"]["proj"])
        expected = mixed @ proj["kernel"] + proj["bias"]
        np.testing.assert_allclose(attended, expected, atol=1e-4 * expected.std())
    plain, fewer = jax.jit(functional(CONFIGS[name]).apply)(params, clip)
    np.testing.assert_allclose(logits, plain, atol=1e-4)
    assert fewer.keys() == {"stages", "tokens", "pooled"}


def attention_outputs(params, clip, config):
    """Returns the output of each block's attention."""
    model = functional(config).module(params)
    x, grid = model.embed(clip)
    outputs = []
    for block in model.blocks:
        outputs.append(block.attn(block.norm1(x), grid))
        x, grid = block(x, grid), block.plan.output(grid)
    return outputs


def window_matrix(pool, grid, first):
    """Returns the share of each position in each window, [pooled tokens, tokens], by loops."""
    if pool is None:
        return np.eye(first + int(np.prod(grid)))
    sides = zip(grid, pool.kernel, pool.stride, pool.padding, strict=True)
    size = [(n + 2 * p - k) // s + 1 for n, k, s, p in sides]
    rows = np.zeros((first + int(np.prod(size)), first + int(np.prod(grid))))
    rows[:first, :first] = np.eye(first)
    for out, at in enumerate(itertools.product(*map(range, size))):
        lows = [a * s - p for a, s, p in zip(at, pool.stride, pool.padding, strict=True)]
        hit = []
        for i, position in enumerate(itertools.product(*map(range, grid))):
            if all(a <= x < a + k for x, a, k in zip(position, lows, pool.kernel, strict=True)):
                hit.append(first + i)
        rows[first + out, hit] = 1 / len(hit)
    return rows


def dense_rollout(config, features, blocks):
    """Returns [output tokens of the last block, tokens of the cubes], by dense matrices."""
    first = int(config.class_token)
    total = None
    rows = zip(plan(config), grids(config, *size_of(config)), features["attention"], strict=True)
    for b, row, attention in list(rows)[:blocks]:
        a = attention[0].astype(float).mean(0) @ window_matrix(b.kv_pool, row.input, first)
        queries = window_matrix(b.q_pool, row.input, first)
        if b.residual_pool == "all":
            a = (a + queries) / 2
        elif b.residual_pool == "grid":
            a[first:] = (a[first:] + queries[first:]) / 2
        skipped = not (b.skip == "none" and b.attention_width != b.width)
        flow = (a + window_matrix(b.skip_pool, row.input, first)) / 2 if skipped else a
        total = flow if total is None else flow @ total
    return total


@pytest.mark.parametrize(
    "name",
    [
        "v1",
        slow("v2"),
        nightly("v2 of timm"),
        nightly("mean pooling"),
        slow("no skip"),
        nightly("vit"),
    ],
)
def test_rollout_is_the_product_of_the_blocks_matrices(name):
    config = CONFIGS[name]
    params, clip, _, features = drawn(name)
    first = int(config.class_token)
    dense = dense_rollout(config, features, None)
    np.testing.assert_allclose(dense.sum(1), 1, atol=1e-5)
    reads_class_token = config.class_token and not config.mean_pooling
    expected = dense[0] if reads_class_token else dense[first:].mean(0)
    expected = expected[first:] / expected[first:].sum()
    rollout = jax.jit(functools.partial(attention_maps.rollout, functional(config)))(params, clip)
    assert rollout.shape[0] == 2
    np.testing.assert_allclose(np.asarray(rollout[0]).ravel(), expected, atol=1e-6)
    assert np.abs(expected - 1 / expected.size).max() > 1e-4  # else any map would do

    middle = grids(config, *size_of(config))[1].output
    token = (0, middle[1] - 1, middle[2] // 2)
    dense = dense_rollout(config, features, 2)[first + np.ravel_multi_index(token, middle), first:]
    part = functools.partial(attention_maps.rollout, functional(config), block=1, token=token)
    rollout = jax.jit(part)(params, clip)
    np.testing.assert_allclose(np.asarray(rollout[0]).ravel(), dense / dense.sum(), atol=1e-6)


def test_missing_blocks_tokens_and_labels_are_errors():
    params, clip, _, _ = drawn("v1")
    config = CONFIGS["v1"]
    with pytest.raises(UserError, match=r"block must be from 0 to 2, or -1 for the last, not 3"):
        attention_maps.rollout(functional(config), params, clip, block=3)
    with pytest.raises(UserError, match=r"token \(0, 9, 0\) is outside the grid \(2, 3, 3\)"):
        attention_maps.rollout(functional(config), params, clip, token=(0, 9, 0))
    with pytest.raises(UserError, match=r"label must be from 0 to 4, not 5"):
        attention_maps.grad_cam(functional(config), params, clip, label=5)


@pytest.mark.parametrize(
    ("name", "block", "label"), [("v1", 0, None), slow("v1", -1, 2), nightly("v2 of timm", 1, None)]
)
def test_grad_cam_agrees_with_finite_differences(name, block, label):
    """A channel's mean gradient is the slope of the score in a shift of all its positions."""
    with jax.enable_x64(True):
        params, clip, logits, _ = drawn(name)
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        model = functional(CONFIGS[name], dtype=jnp.float64).module(double)
        index = block % len(model.blocks)
        x, grid = block_input(double, jnp.asarray(clip[:1], jnp.float64), CONFIGS[name], index)
        first, channels = x.shape[1] - int(np.prod(grid)), x.shape[2]
        chosen = int(np.argmax(logits[0])) if label is None else label

        @jax.jit
        def score(x):
            return model.classify(through(model.blocks[index:], x, grid))[0][0, chosen]

        step = 1e-5 * (np.arange(x.shape[1]) >= first)[None, :, None]
        raised = [np.asarray(x) + step * row for row in np.eye(channels)]
        lowered = [np.asarray(x) - step * row for row in np.eye(channels)]
        slopes = [(score(u) - score(d)) / 2e-5 for u, d in zip(raised, lowered, strict=True)]
        heat = np.maximum(np.asarray(x[0, first:]) @ np.asarray(slopes), 0)
    cam = functools.partial(
        attention_maps.grad_cam, functional(CONFIGS[name]), block=block, label=label,
        by_channel=True,
    )  # fmt: skip
    result = jax.jit(cam)(params, clip)
    assert result.shape[1:] == grid
    expected = heat / heat.sum() if heat.sum() else heat
    np.testing.assert_allclose(np.asarray(result[0]).ravel(), expected, atol=2e-4)


def through(blocks, x, grid):
    for block in blocks:
        x, grid = block(x, grid), block.plan.output(grid)
    return x


def block_input(params, clip, config, index):
    @jax.jit
    def tokens(params, clip):
        model = functional(config, dtype=clip.dtype).module(params)
        return through(model.blocks[:index], *model.embed(clip))

    return tokens(params, clip), grids(config, *size_of(config))[index].input


@pytest.mark.slow
def test_grad_cam_weights_each_position_by_its_gradient():
    params, clip, _, _ = drawn("v1")
    config = CONFIGS["v1"]
    cam = functools.partial(attention_maps.grad_cam, functional(config), block=0)
    whole = jax.jit(cam)(params, clip)
    np.testing.assert_allclose(np.asarray(whole).sum((1, 2, 3)), 1, atol=1e-5)
    model = functional(config).module(params)
    x, grid = block_input(params, clip, config, 0)

    def score(x):
        return model.classify(through(model.blocks, x, grid))[0].max(-1).sum()

    gradient, x = (np.asarray(a)[:, 1:] for a in (jax.jit(jax.grad(score))(x), x))
    heat = np.zeros(gradient.shape[:2])
    for b, position, c in np.ndindex(*gradient.shape):
        if gradient[b, position, c] > 0:
            heat[b, position] += gradient[b, position, c] * x[b, position, c]
    heat = np.maximum(heat, 0).reshape(2, *grid)
    np.testing.assert_allclose(whole, heat / heat.sum((1, 2, 3), keepdims=True), atol=1e-5)


# Maps of a box.

BOX = (5.0, 3.0, 17.0, 25.0)  # it exceeds the clip below


def cell_weights(box, stride, size):
    """Returns the weight of each position in each cell of a box, by a loop over samples."""
    return looped(np.eye(size[0] * size[1]).reshape(*size, -1), box, stride, 7)


@pytest.mark.parametrize(("block", "stride"), [(None, (8, 8)), (0, (4, 4))])
def test_rollout_of_a_box_starts_at_the_positions_that_roi_align_reads(block, stride):
    params, clip, _, features = drawn("v1")
    model = functional(dataclasses.replace(CONFIGS["v1"], task="detection"))
    blocks = len(plan(model.config)) if block is None else block + 1
    t, h, w = grids(model.config, 4, 24, 24)[blocks - 1].output
    inside = cell_weights(BOX, stride, (h, w)).mean((0, 1))
    start = np.concatenate([[0], np.tile(inside / t, t)])
    expected = (start @ dense_rollout(model.config, features, blocks))[1:]
    boxes = jnp.array([BOX, (40.0, 40.0, 50.0, 50.0)])
    rollout = functools.partial(attention_maps.rollout, model, block=block)
    maps = jax.jit(lambda p, c, b: rollout(p, c, box=b))(params, clip, boxes)
    np.testing.assert_allclose(maps[0].ravel(), expected / expected.sum(), atol=1e-6)
    assert not np.any(maps[1])  # outside of the clip
    token = jax.jit(functools.partial(rollout, token=(0, 1, 2)))(params, clip)  # as without boxes
    row = 1 + np.ravel_multi_index((0, 1, 2), (t, h, w))
    expected = dense_rollout(model.config, features, blocks)[row][1:]
    np.testing.assert_allclose(token[0].ravel(), expected / expected.sum(), atol=1e-6)


def test_grad_cam_of_a_box_is_that_of_its_logit():
    """The logit is written out: the mean over time, the maximum over cells, the classifier."""
    params, clip, _, _ = drawn("v1")
    config = dataclasses.replace(CONFIGS["v1"], task="detection")
    model = functional(config).module(params)
    x, grid = block_input(params, clip, config, 2)
    t, h, w = grids(config, *size_of(config))[2].output
    weights = jnp.asarray(cell_weights(BOX, (8, 8), (h, w)), jnp.float32)
    head = params["head"]["classifier"]

    def score(x):
        tokens = model.norm(model.blocks[2](x, grid))[:, 1:].reshape(2, t, h * w, -1)
        pooled = jnp.einsum("yxp,bpc->byxc", weights, tokens.mean(1)).max((1, 2))
        return (pooled @ head["kernel"])[:, 3].sum()

    gradient = jax.jit(jax.grad(score))(x)
    heat = np.maximum((np.maximum(gradient, 0) * x).sum(-1)[:, 1:], 0).reshape(2, *grid)
    cam = functools.partial(attention_maps.grad_cam, functional(config), block=2, label=3)
    maps = jax.jit(lambda p, c, b: cam(p, c, box=b))(params, clip, jnp.array([BOX, BOX]))
    np.testing.assert_allclose(maps, heat / heat.sum((1, 2, 3), keepdims=True), atol=1e-5)


class Pointwise(nnx.Module):
    """Attention of each token to itself alone."""

    def __init__(self, plan, *, pooling, dtype, rngs):
        self.linear = nnx.Linear(plan.width, plan.attention_width, dtype=dtype, rngs=rngs)

    def __call__(self, x, grid, record=None):
        if record is not None:
            record["attention"] = jnp.broadcast_to(
                jnp.eye(x.shape[1]), (len(x), 1, *x.shape[1:2] * 2)
            )
        return self.linear(x)


@pytest.mark.parametrize("name", ["grad_cam", "rollout"])
def test_the_map_of_a_box_lies_in_the_box_where_features_are_local(name):
    config = dataclasses.replace(
        CONFIGS["vit"], task="detection", depths=(2,), patch_kernel=(2, 2, 2),
        patch_stride=(2, 2, 2), patch_padding=(0, 0, 0),
    )  # fmt: skip
    model = functional(config, attention=Pointwise)
    params = model.init(jax.random.key(0))
    head = params["head"]["classifier"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    clip = jax.random.normal(jax.random.key(2), (1, 4, 24, 32, 3))
    for x1, y1, x2, y2 in [(4, 6, 12, 20), (20, 0, 30, 8)]:
        compute = functools.partial(getattr(attention_maps, name), model)
        box = jnp.array([[x1, y1, x2, y2]], jnp.float32)
        heat = jax.jit(lambda p, c, b, f=compute: f(p, c, box=b))(params, clip, box)[0]
        near = np.zeros((12, 16), bool)  # bilinear samples read a position beyond the box's edge
        near[max(y1 // 2 - 1, 0) : y2 // 2 + 1, max(x1 // 2 - 1, 0) : x2 // 2 + 1] = True
        assert heat.shape == (2, 12, 16) and heat.sum() == pytest.approx(1)
        assert not np.any(np.asarray(heat)[:, ~near])


def test_a_box_is_required_by_detection_models_alone():
    params, clip, _, _ = drawn("v1")
    detection = functional(dataclasses.replace(CONFIGS["v1"], task="detection"))
    boxes = jnp.array([BOX, BOX])
    for compute in (attention_maps.rollout, attention_maps.grad_cam):
        with pytest.raises(UserError, match=r"explain a box: pass box \[batch, 4\]"):
            compute(detection, params, clip)
        with pytest.raises(UserError, match='a box requires a model with task="detection"'):
            compute(functional(CONFIGS["v1"]), params, clip, box=boxes)
    with pytest.raises(UserError, match="a token or at a box"):
        attention_maps.rollout(detection, params, clip, token=(0, 0, 0), box=boxes)


@pytest.mark.parametrize("name", ["v1", slow("v2 of timm"), slow("vit")])
def test_attention_distances_are_means_over_all_token_pairs(name):
    config = CONFIGS[name]
    params, clip, _, features = drawn(name)
    compute = jax.jit(functools.partial(attention_maps.attention_distance, functional(config)))
    in_time, in_space = compute(params, clip)
    stride = np.array(config.patch_stride, float)
    kernel, padding = np.array(config.patch_kernel), np.array(config.patch_padding)
    offset = (kernel - 1) / 2 - padding
    rows = zip(plan(config), grids(config, *size_of(config)), strict=True)
    for i, (block, row) in enumerate(rows):
        kv = np.array(block.kv_pool.stride if block.kv_pool else (1, 1, 1))
        q = np.array(block.q_pool.stride if block.q_pool else (1, 1, 1))
        attention = features["attention"][i][:, :, int(config.class_token) :]
        attention = attention[..., int(config.class_token) :].astype(float)
        attention = attention / attention.sum(-1, keepdims=True)
        time, space = 0.0, 0.0
        for n, a in enumerate(itertools.product(*map(range, row.output))):
            for m, b in enumerate(itertools.product(*map(range, row.keys))):
                apart = offset + stride * q * a - (offset + stride * kv * b)
                time = time + attention[:, :, n, m] * abs(apart[0])
                space = space + attention[:, :, n, m] * np.hypot(*apart[1:])
        queries = int(np.prod(row.output))
        np.testing.assert_allclose(in_time[i], time.mean(0) / queries, atol=1e-4)
        np.testing.assert_allclose(in_space[i], space.mean(0) / queries, atol=1e-4)
        stride = stride * q


# Token geometry.


def test_a_map_is_interpolated_linearly_between_token_centres():
    config = CONFIGS["v1"]  # cubes of 3 x 7 x 7 by 2 x 4 x 4: centres at 0, 2; 0, 4, ..., 20
    maps = np.zeros((1, 2, 6, 6))
    maps[0, 1, 2, 3] = 1
    spread = token_geometry.to_pixels(maps, (4, 24, 24), config)
    assert spread.shape == (1, 4, 24, 24) and spread.dtype == np.float32
    assert spread[0, 2, 8, 12] == spread[0, 3, 8, 12] == 1  # beyond the last centre it stays
    assert spread[0, 1, 8, 12] == spread[0, 2, 10, 12] == spread[0, 2, 8, 14] == 0.5
    assert spread[0, 0].max() == 0 and spread[0, :, 12].max() == 0
    even = token_geometry.to_pixels(np.ones((1, 2, 3, 3)), (4, 24, 24), config, block=2)
    np.testing.assert_allclose(even, 1)
    with pytest.raises(ValueError, match=r"block 2 has \(2, 3, 3\)"):
        token_geometry.to_pixels(maps, (4, 24, 24), config, block=2)


def test_receptive_fields_are_the_pixels_that_reach_a_token():
    """The expected field follows, for each token, the pixels of every window."""
    config = CONFIGS["v1"]
    cubes = SimpleNamespace(
        kernel=config.patch_kernel, stride=config.patch_stride, padding=config.patch_padding
    )
    reach = window_matrix(cubes, (4, 24, 24), 0) > 0
    for block, row in zip(plan(config), grids(config, 4, 24, 24), strict=True):
        if block.q_pool:
            reach = (window_matrix(block.q_pool, row.input, 0) > 0) @ reach
    grid = grids(config, 4, 24, 24)[-1].output
    for n, token in enumerate(itertools.product(*map(range, grid))):
        expected = reach[n].reshape(4, 24, 24)
        mask = np.zeros_like(expected)
        mask[token_geometry.receptive_field(config, (4, 24, 24), 3, token)] = True
        np.testing.assert_array_equal(mask, expected)
    with pytest.raises(ValueError, match=r"is outside the grid \(2, 3, 3\)"):
        token_geometry.receptive_field(config, (4, 24, 24), 3, (2, 0, 0))
