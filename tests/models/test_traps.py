"""What ports of MViT get wrong, one test each."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline, preprocess, sampling
from mvit_jax.models.cost import cost
from mvit_jax.models.functional import Functional, functional
from mvit_jax.models.ops.attention import attend, relative_features
from mvit_jax.models.plan import grids, plan
from mvit_jax.models.positions import RelativePositions, distances
from mvit_jax.models.variants import variant
from mvit_jax.weights.adapt import INFLATIONS
from mvit_jax.weights.load import load
from tests.models import naive
from tests.models.naive import IMAGE, settings, stages, v2
from tests.reference.make_outputs import draw, draw_weight

BASE = {"frames": 4, "size": 24, "num_classes": 5, "width": 8, "depths": (1, 1),
        "kv_stride": (1, 2, 2)}  # fmt: skip
T3 = (3, 3, 3)


def state_of(plain):
    return {name: draw_weight(name, shape) for name, shape in naive.shapes(plain).items()}


def test_trap_01_relative_positions_are_not_scaled():
    q = jnp.array(draw("q", (1, 4, 8)))
    tables = {"width": jnp.array(draw("table", (4, 4, 8)))}
    relative = relative_features(q, tables, (1, 1, 4), (1, 1, 4), heads=1)
    # All keys zero: what is left of the scores is q.R.
    weights = attend(q, jnp.zeros((1, 4, 8)), jnp.eye(4, 8)[None], 1, relative)[0, :, :4]
    scores = np.einsum("qd,qkd->qk", q[0], tables["width"])
    expected = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-5)


def test_trap_02_biases_start_at_zero_and_convolutions_as_in_pytorch():
    """Convolutions are uniform within 1 / sqrt(fan in), all else N(0, 0.02), cut at two standard
    deviations."""
    model = functional(variant("mvitv2_s_16x4", **BASE | {"positions": "joint"}))
    params = flatten_dict(model.init(jax.random.key(0)), sep="/")
    for path, values in params.items():
        assert values.dtype == jnp.float32
        largest = np.abs(values).max()
        if path.startswith("patch_embed/") or re.search(r"/pool_./kernel$", path):
            bound = math.prod(params[path.replace("bias", "kernel")].shape[:-1]) ** -0.5
            spread = bound / math.sqrt(3)
            assert largest > 0.8 * bound, path
        elif path.endswith(("/bias", "/scale")):
            assert (values == path.endswith("scale")).all(), path
            continue
        else:
            bound, spread = 0.04, 0.0176
        assert largest <= bound, path
        if values.size > 100:
            assert values.std() == pytest.approx(spread, rel=0.15), path
    other = flatten_dict(model.init(jax.random.key(1)), sep="/")
    assert all((other[path] != values).any() for path, values in params.items() if "kernel" in path)


@pytest.mark.parametrize(
    ("pool_kernel", "parameters"),
    # With pools of 3x3x3 everywhere; of stride + 1, and none where the stride is 1.
    [(None, 36_610_672), ("stride + 1", 36_565_936)],
)
def test_trap_03_pools_of_keys_may_be_missing_where_the_stride_is_1(pool_kernel, parameters):
    kernel = T3 if pool_kernel is None else None
    config = variant("mvit_b_16x4", pool_kernel=pool_kernel)
    assert cost(config).parameters == parameters
    published = stages((1, 2, 11, 2), kv=(1, 8, 8), kernel=kernel)
    wide = tuple(
        b._replace(width=12 * b.width, attention=12 * b.attention, out=12 * b.out)
        for b in published
    )
    counted = naive.shapes(naive.Settings(blocks=wide, grid=(8, 56, 56), classes=400))
    assert sum(map(math.prod, counted.values())) == parameters
    # Both are read off the file, whatever the variant says.
    tiny = naive.Settings(blocks=published, grid=(2, 6, 6))
    loaded = load(state_of(tiny), "mvit_b_16x4", frames=4, size=24, width=8)
    assert [b.kv_pool is None for b in plan(loaded.config)] == [False] * 14 + [kernel is None] * 2
    assert functional(loaded.config).shapes() == {
        k: v.shape for k, v in flatten_dict(loaded.params, sep="/").items()
    }


def test_trap_04_the_32x3_file_is_the_model_of_24_blocks_with_kernels_of_stride_plus_1():
    config = variant("mvit_b24_32x3", pool_kernel="stride + 1")
    total = cost(config)
    assert total.parameters == 53_115_280
    assert round(total.multiply_adds / 1e9, 1) == 235.8
    kernels = [b.kv_pool.kernel if b.kv_pool else None for b in plan(config)]
    assert kernels == [(1, 9, 9)] * 2 + [(1, 5, 5)] * 3 + [(1, 3, 3)] * 16 + [None] * 3
    assert {b.q_pool.kernel for b in plan(config) if b.q_pool} == {(1, 3, 3)}
    # The file of such a model, in small, is known without being told.
    tiny = naive.Settings(blocks=stages((2, 3, 1, 1), kernel=None, kv=(1, 8, 8)), grid=(2, 6, 6))
    fields = {"frames": 4, "size": 24, "width": 8, "depths": (2, 3, 1, 1)}
    loaded = load(state_of(tiny), "mvit_b24_32x3", **fields)
    kernels = [b.kv_pool.kernel if b.kv_pool else None for b in plan(loaded.config)]
    assert kernels == [(1, 9, 9)] * 2 + [(1, 5, 5)] * 3 + [(1, 3, 3), None]


def test_trap_05_fused_and_separate_projections_are_the_same():
    fused = state_of(settings())
    separate = {}
    for name, values in fused.items():
        if ".qkv." in name:
            for x, part in zip("qkv", np.split(values, 3), strict=True):
                separate[name.replace("qkv", x)] = part
        else:
            separate[name] = values
    for choice in (False, True):
        one, other = (
            load(state, "mvit_b_16x4", **BASE, separate_qkv=choice) for state in (fused, separate)
        )
        assert one.config == other.config and one.config.separate_qkv == choice
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    assert load(separate, "mvit_b_16x4", **BASE).config.separate_qkv


def test_trap_06_tables_at_312_pixels_are_interpolated_inside_the_model():
    for name, frames in (("mvitv2_l_32x3_312", 31), ("mvitv2_l_40x3_312", 39)):
        blocks = plan(variant(name))
        assert [b.relative_space for b in blocks] == [155] * 2 + [77] * 6 + [37] * 37 + [17] * 3
        assert {b.relative_time for b in blocks} == {frames}
    config = variant("mvitv2_l_32x3_312")
    blocks, sizes = plan(config), grids(config, 32, 312, 312)
    sides = [(s.input[1], s.output[1], s.keys[1]) for s in sizes]
    assert [sides[i] for i in (0, 2, 8, 44, 45)] == [
        (78, 78, 10), (78, 39, 20), (39, 20, 20), (20, 10, 20), (10, 10, 10),
    ]  # fmt: skip
    for i, length in ((44, 39), (45, 19)):
        module = RelativePositions(blocks[i], dtype=jnp.float32, rngs=nnx.Rngs(0))
        rows = module((1, *sizes[i].output[1:]), (1, *sizes[i].keys[1:]))["height"]
        table = naive.resize(np.array(module.height[...], np.float64), length)
        expected = table[naive.distances(sizes[i].output[1], sizes[i].keys[1])]
        np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-6)


def test_trap_07_distances_at_312_pixels_depend_on_the_order_of_operations():
    # As torch 2.14 computes the two expressions: 78 queries meet 10 keys, a ratio of 7.8.
    slowfast, torchvision = (distances(78, 10, order) for order in ("slowfast", "torchvision"))
    np.testing.assert_array_equal(
        slowfast[:3],
        [[70, 62, 54, 46, 38, 31, 23, 15, 7, 0], [71, 63, 55, 47, 39, 32, 24, 16, 8, 0],
         [72, 64, 56, 48, 40, 33, 25, 17, 9, 1]],
    )  # fmt: skip
    np.testing.assert_array_equal(
        torchvision[:3],
        [[70, 62, 54, 46, 39, 31, 23, 15, 7, 0], [71, 63, 55, 47, 40, 32, 24, 16, 8, 1],
         [72, 64, 56, 48, 41, 33, 25, 17, 9, 2]],
    )  # fmt: skip
    assert (slowfast != torchvision).sum() == 103
    # Exact arithmetic agrees with torchvision's here: 10 i - 78 j + 702 tenths, cut.
    i, j = np.indices((78, 10))
    np.testing.assert_array_equal(torchvision, (10 * i - 78 * j + 702) // 10)


def test_trap_08_frames_are_a_little_further_apart_than_the_stride():
    indices = sampling.view_indices(64, 30.0, frames=16, stride=4, clips=1)[0]
    assert indices.tolist() == [int(63 / 15 * i) for i in range(16)]  # 4.2 apart


def test_trap_09_three_crops_are_cut_from_frames_scaled_to_the_crops_size():
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
    clip = pipeline.ClipSettings(frames=2, stride=1, size=8, short_side=10)
    views = pipeline.views(preprocess.Frames(frames, 30.0), clip, clips=1, crops=3)
    for view, left in zip(views, (0, 2, 4), strict=True):  # not one pixel was scaled
        np.testing.assert_array_equal(view, frames[:, :, left : left + 8])
    view = pipeline.views(preprocess.Frames(frames, 30.0), clip, clips=1, crops=1)
    assert all((view[0] != frames[:, :, left : left + 8]).any() for left in range(5))


IMAGE_V2 = v2(
    blocks={"kernel": (1, 3, 3)},
    relative="space",
    class_token=False,
    **IMAGE | {"positions": "none"},
)


def test_trap_13_images_become_videos_in_three_ways():
    state = state_of(IMAGE_V2)
    patch = state["patch_embed.proj.weight"].transpose(2, 3, 4, 1, 0)[0]
    with pytest.raises(UserError, match="inflate=centre, mean or repeat"):
        load(state, "mvitv2_s_16x4", **BASE, class_token=False)
    for how in INFLATIONS:
        loaded = load(state, "mvitv2_s_16x4", inflate=how, **BASE, class_token=False)
        params = flatten_dict(loaded.params, sep="/")
        shares = {"centre": (0, 1, 0), "mean": (1 / 3,) * 3, "repeat": (1, 1, 1)}[how]
        for share, kernel in zip(shares, params["patch_embed/proj/kernel"], strict=True):
            np.testing.assert_allclose(kernel, share * patch, rtol=1e-6)
        for i in range(2):
            assert not params[f"blocks/{i}/attn/relative/time"].any()
            assert params[f"blocks/{i}/attn/pool_q/kernel"].shape[0] == 3


def test_trap_13_a_still_video_is_the_image_after_inflation_at_the_centre():
    """Without a class token: every frame's tokens are the image's, and attention to copies of the
    same keys is attention to one. The other two ways see the padding at the first frame."""
    state, image = state_of(IMAGE_V2), draw("image", (1, 1, 24, 24, 3))
    expected = naive.forward(state, IMAGE_V2, np.moveaxis(image[0], -1, 0))
    run, differences = jax.jit(Functional.apply, static_argnums=0), {}
    for how in INFLATIONS:
        loaded = load(state, "mvitv2_s_16x4", inflate=how, **BASE, class_token=False)
        logits, _ = run(functional(loaded.config), loaded.params, jnp.repeat(image, 4, axis=1))
        differences[how] = np.abs(logits[0] - expected).max()
    assert differences["centre"] < 1e-5
    assert differences["mean"] > 1e-2 and differences["repeat"] > 1e-2


def test_trap_14_two_networks_are_called_large():
    assert cost(variant("mvitv2_l")).parameters == 217_992_952
    other = variant("mvitv2_l_in21k", num_classes=1000, class_token=False)
    assert cost(other).parameters == cost(variant("mvitv2_l", expand="attention")).parameters
    assert cost(variant("mvitv2_l_40x3_312")).parameters == 213_390_112
    # The file of the one is not loaded as the other.
    fields = {"size": 24, "width": 8, "heads": 1, "depths": (1, 1), "kv_stride": (1, 2, 2)}
    for grown, name in ((True, "mvitv2_l"), (False, "mvitv2_l_in21k")):
        blocks = {"kernel": (1, 3, 3), "attention": grown}
        same = {"relative": "space", "class_token": name.endswith("21k")}
        state = state_of(v2(blocks=blocks, **same, **IMAGE | {"positions": "none"}))
        with pytest.raises(UserError, match="expand"):
            load(state, name, **fields)


def test_trap_15_maskfeat_fine_tunes_a_hybrid():
    config = variant("maskfeat_s_16x4")
    total = cost(config)
    assert total.parameters == 36_475_120 and round(total.multiply_adds / 1e9) == 71
    assert {b.attention_width == b.width for b in plan(config)} == {True}  # channels grow in MLPs
    relative = variant("mvitv2_s_16x4")
    same = {f.name for f in dataclasses.fields(config)} - {
        "expand", "mean_pooling", "dropout", "drop_path",
    }  # fmt: skip
    assert all(getattr(config, name) == getattr(relative, name) for name in same)
