"""Action detection: RoIAlign against a loop over samples, the head, frames that are no square."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mvit_jax
from mvit_jax.common.errors import UserError
from mvit_jax.models.cost import cost
from mvit_jax.models.detection import roi_align, total_stride
from mvit_jax.models.functional import functional
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.positions import distances
from mvit_jax.models.variants import variant
from mvit_jax.weights.load import load
from tests.support import drawn
from tests.weights import foreign

BOXES = [
    (0.0, 0.0, 64.0, 96.0),  # the whole map
    (10.3, 20.9, 11.0, 75.5),  # narrower than a position
    (-40.0, -3.0, 90.0, 30.0),  # beyond the left and the right border
    (300.0, 5.0, 340.0, 40.0),  # outside
    (16.0, 16.0, 16.0, 40.0),  # no area
    (40.0, 40.0, 20.0, 20.0),  # swapped corners
    (-500.0, -700.0, 900.0, 800.0),  # many times as large as the map
    (31.5, 0.0, 63.5, 95.0),
]


def sample(plane, y, x):
    """Returns a bilinear sample of `plane` [height, width, channels]."""
    height, width, _ = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = min(int(y), max(height - 2, 0)), min(int(x), max(width - 2, 0))
    total = 0.0
    for row in {top, min(top + 1, height - 1)}:
        for column in {left, min(left + 1, width - 1)}:
            total = total + plane[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def looped(plane, box, stride, bins):
    """Computes RoIAlign of one box by a loop over cells and samples."""
    x1, y1, x2, y2 = (
        side / stride[axis] - 0.5 for side, axis in zip(box, (1, 0, 1, 0), strict=True)
    )
    cells = (y2 - y1) / bins, (x2 - x1) / bins
    rows, columns = (math.ceil(cell) for cell in cells)
    out = np.zeros((bins, bins, plane.shape[-1]))
    for i in range(bins):
        for j in range(bins):
            for m in range(rows):
                for n in range(columns):
                    y = y1 + (i + (m + 0.5) / rows) * cells[0]
                    x = x1 + (j + (n + 0.5) / columns) * cells[1]
                    out[i, j] += sample(plane, y, x) / (rows * columns)
    return out


SIZES = [((12, 8), (8, 8)), ((7, 10), (32, 32)), ((1, 9), (8, 4))]


@pytest.mark.parametrize(("size", "stride"), SIZES)
def test_roi_align_equals_a_loop_over_samples(size, stride):
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((2, *size, 3))
    sides = np.array([size[1] * stride[1], size[0] * stride[0]] * 2)
    odd = (rng.random((2, 6, 4)) * 1.4 - 0.2) * sides
    boxes = np.concatenate([np.broadcast_to(BOXES, (2, len(BOXES), 4)), odd], axis=1)
    expected = [[looped(maps[i], box, stride, 7) for box in boxes[i]] for i in range(2)]
    with jax.enable_x64(True):
        exact = jax.jit(roi_align, static_argnums=2)(maps, boxes, stride)
        np.testing.assert_allclose(exact, expected, atol=1e-12)
    # In the box that is many times as large as the map, rounding moves samples across its border.
    moderate = [i for i in range(boxes.shape[1]) if i != 6]
    single = jax.jit(roi_align, static_argnums=2)(
        *(x.astype(np.float32) for x in (maps, boxes[:, moderate])), stride
    )
    np.testing.assert_allclose(single, np.array(expected)[:, moderate], atol=2e-5)
    assert not np.any(exact[:, 4:6])  # without area


def test_the_gradient_of_roi_align_is_its_transpose():
    """RoIAlign is linear in the maps: <out, d out> = <map, gradient>."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        maps, boxes = jnp.asarray(rng.standard_normal((1, 12, 8, 2))), jnp.array([BOXES])
        out, pull = jax.vjp(lambda m: roi_align(m, boxes, (8, 8)), maps)
        back = rng.standard_normal(out.shape)
        assert np.vdot(out, back) == pytest.approx(np.vdot(maps, pull(back)[0]), rel=1e-12)
        by_box = jax.grad(lambda b: roi_align(maps, b, (8, 8)).sum())(boxes)
    assert not np.any(by_box)


SMALL = MViTConfig(
    frames=4, size=32, num_classes=5, task="detection", width=8, depths=(1, 2),
    kv_stride=(1, 2, 2), pool_kernel=(1, 3, 3), drop_path=0.4,
)  # fmt: skip
V2 = dataclasses.replace(
    SMALL, positions="none", relative_positions="both", residual_pool="grid", full_q_pool=True,
    expand="attention",
)  # fmt: skip


def inputs(height=32, width=32, boxes=3):
    rng = np.random.default_rng(0)
    clip = rng.standard_normal((2, 4, height, width, 3))
    corner = rng.random((2, boxes, 2)) * np.array([width / 2, height / 2])
    return clip, np.concatenate([corner, corner + np.array([width / 3, height / 4])], axis=-1)


@pytest.mark.parametrize(("config", "height", "width"), [(SMALL, 32, 32), (V2, 32, 44)])
def test_scores_are_the_heads_of_the_boxes_cells(config, height, width):
    """Features after the norm, without the class token: mean over time, cells, maximum, linear."""
    with jax.enable_x64(True):
        model = functional(config, dtype=jnp.float64)
        params = drawn.weights(model)
        clip, boxes = inputs(height, width)
        logits, features = jax.jit(model.apply)(params, clip, boxes)
        assert logits.shape == (2, 3, 5) and features["pooled"].shape == (2, 3, 16)
        _, t, h, w, channels = features["stages"][-1].shape
        maps = features["tokens"][:, 1:].reshape(2, t, h, w, channels).mean(1)
        assert total_stride(config) == (8, 8) and (h, w) == (height // 8, -(-width // 8))
        head = params["head"]["classifier"]
        for i in range(2):
            for j in range(3):
                pooled = looped(np.asarray(maps[i]), boxes[i, j], (8, 8), 7).max((0, 1))
                np.testing.assert_allclose(
                    logits[i, j], pooled @ head["kernel"] + head["bias"], rtol=1e-9
                )


def test_boxes_do_not_depend_on_other_boxes_or_on_how_blocks_are_run():
    with jax.enable_x64(True):
        model = functional(SMALL, dtype=jnp.float64)
        params = drawn.weights(model)
        clip, boxes = inputs()
        apply = jax.jit(model.apply, static_argnames=("scan", "remat"))
        logits = apply(params, clip, boxes)[0]
        padded = np.concatenate([boxes[:, ::-1], np.zeros((2, 2, 4))], axis=1)
        more = apply(params, clip, padded, scan=True, remat="blocks")[0]
        np.testing.assert_allclose(more[:, :3], logits[:, ::-1], rtol=1e-9)
        # A missing box has no features: its scores are those of the bias alone.
        bias = jnp.broadcast_to(params["head"]["classifier"]["bias"], (2, 2, 5))
        np.testing.assert_allclose(more[:, 3:], bias)


def test_the_module_and_no_clips_or_boxes():
    model = mvit_jax.create_model("mvit_b_16x4", task="detection", num_classes=7,
                                  width=8, depths=(1, 1), size=32, rngs=nnx.Rngs(0))  # fmt: skip
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    for clips, boxes in ((2, 3), (0, 3), (2, 0)):
        out = nnx.eval_shape(
            lambda m, *i: m(*i), model, shape(clips, 16, 32, 48, 3), shape(clips, boxes, 4)
        )
        assert (out.shape, out.dtype) == ((clips, boxes, 7), jnp.float32)


def test_parameters_and_cost_are_those_of_a_classifier():
    """As in AVA's table: MViT-B has 36.4 million parameters, MViTv2-S 34.3 million."""
    for name, millions in (("mvit_b_16x4", 36.364592), ("mvitv2_s_16x4", 34.291664)):
        config = variant(name, num_classes=80, task="detection")
        counted = functional(config).cost()
        assert counted == cost(config) and counted.parameters == round(millions * 1e6)
        classifier = dataclasses.replace(config, task="classification")
        assert functional(config).shapes() == functional(classifier).shapes()


def test_custom_modules_of_a_detector_are_counted():
    from tests.models.test_custom_parts import LocalBlock

    counts = [
        functional(dataclasses.replace(SMALL, task=task), block=LocalBlock).cost()
        for task in ("detection", "classification")
    ]
    assert counts[0].parameters == counts[1].parameters
    # RoIAlign adds its two products with matrices of 7 rows.
    assert 0 < counts[0].multiply_adds - counts[1].multiply_adds < 7 * (4 + 7) * 4 * 16 + 1


def test_a_checkpoint_of_slowfast_is_loaded():
    """Its head is `head.projection`, as that of a classifier."""
    tensors = foreign.slowfast("v1 video")
    loaded = load(tensors, "mvit_b_16x4", **foreign.fields("v1 video", task="detection"))
    assert loaded.config.task == "detection"
    np.testing.assert_array_equal(
        loaded.params["head"]["classifier"]["kernel"], tensors["head.projection.weight"].T
    )


def test_boxes_of_other_shapes_or_tasks_are_refused():
    model, classifier = (
        functional(SMALL),
        functional(dataclasses.replace(SMALL, task="classification")),
    )
    clip, boxes = (jnp.asarray(x, jnp.float32) for x in inputs())
    params = drawn.shapes(model)
    for handle, passed, words in [
        (model, None, r'task="detection" requires boxes \[batch, boxes, 4\]'),
        (classifier, boxes, 'boxes require a model with task="detection"'),
        (model, boxes[:1], r"with the 2 clips, not \[1, 3, 4\]"),
        (model, boxes[..., :3], r"not \[2, 3, 3\]"),
    ]:
        with pytest.raises(UserError, match=words):
            jax.eval_shape(lambda p, h=handle, b=passed: h.apply(p, clip, b)[0], params)
    with pytest.raises(UserError, match="mean_pooling requires"):
        dataclasses.replace(SMALL, mean_pooling=True)


@pytest.mark.parametrize(("queries", "keys"), [(10, 10), (10, 5), (5, 10), (4, 4)])
def test_clamped_distances_are_those_of_the_shorter_axis(queries, keys):
    """A frame of 4 x 7 or 4 x 10 positions: the same distances, with equal values at the ends."""
    scale = (4, 4 * keys // queries) if keys <= queries else (4 * queries // keys, 4)
    indices = distances(queries, keys, "slowfast", scale)
    finer = max(scale)
    step_q, step_k = finer // scale[0], finer // scale[1]
    for q in range(queries):
        for k in range(keys):
            distance = q * step_q - k * step_k
            expected = min(max(distance + (scale[1] - 1) * step_k, 0), 2 * finer - 2)
            assert indices[q, k] == expected


def test_clamped_positions_equal_stretched_ones_on_squares_alone():
    stretched = dataclasses.replace(V2, depths=(1, 1))
    clamped = dataclasses.replace(stretched, relative_resize="clamp")
    params = drawn.weights(functional(stretched))
    results = {}
    for width in (32, 64):
        clip, boxes = (x.astype(np.float32) for x in inputs(32, width))
        for config in (stretched, clamped):
            results[width, config] = jax.jit(functional(config).apply)(params, clip, boxes)[0]
    np.testing.assert_array_equal(results[32, stretched], results[32, clamped])
    assert np.abs(results[64, stretched] - results[64, clamped]).max() > 1e-3
    # Higher than wide frames are the same, turned.
    turned = jax.tree.map(lambda x: x, params)
    for block in turned["blocks"].values():
        tables = block["attn"]["relative"]
        tables["height"], tables["width"] = tables["width"], tables["height"]
        for pool in ("pool_q", "pool_k", "pool_v"):
            if pool in block["attn"]:
                block["attn"][pool]["kernel"] = block["attn"][pool]["kernel"].swapaxes(1, 2)
    turned["patch_embed"]["proj"]["kernel"] = turned["patch_embed"]["proj"]["kernel"].swapaxes(1, 2)
    other = jax.jit(functional(clamped).apply)(
        turned, clip.swapaxes(2, 3), boxes[..., [1, 0, 3, 2]]
    )[0]
    np.testing.assert_allclose(other, results[64, clamped], atol=1e-4)
