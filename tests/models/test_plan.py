"""The plan: blocks and grids of the papers' tables, and configs that are refused."""

import copy
import dataclasses

import numpy as np
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.models.plan import (
    MViTConfig,
    Pool,
    drop_path_rates,
    grids,
    patch_grid,
    plan,
)
from mvit_jax.models.variants import variant

TINY = MViTConfig(
    frames=4, size=28, num_classes=5, width=8, depths=(1, 2, 2), kv_stride=(1, 4, 4), drop_path=0.4
)


def test_blocks_of_mvit_b_16x4_are_those_of_the_paper():
    config = variant("mvit_b_16x4")
    blocks = plan(config)
    assert len(blocks) == 16
    assert [b.kv_pool and b.kv_pool.stride for b in blocks] == (
        [(1, 8, 8)] + [(1, 4, 4)] * 2 + [(1, 2, 2)] * 11 + [(1, 1, 1)] * 2
    )
    assert {b.kv_pool and b.kv_pool.kernel for b in blocks} == {(3, 3, 3)}
    pools = [i for i, b in enumerate(blocks) if b.q_pool is not None]
    assert pools == [i for i, b in enumerate(blocks) if b.skip_pool is not None] == [1, 3, 14]
    for i in pools:
        assert blocks[i].q_pool == Pool("conv", (3, 3, 3), (1, 2, 2), heads=blocks[i].heads)
        assert blocks[i].skip_pool == Pool("max", (1, 3, 3), (1, 2, 2))
    assert [b.stage for b in blocks] == [0] + [1] * 2 + [2] * 11 + [3] * 2
    assert [b.width for b in blocks] == [96] + [192] * 2 + [384] * 11 + [768] * 2
    assert [b.attention_width for b in blocks] == [b.width for b in blocks]
    assert [b.width_out for b in blocks] == [192] + [192, 384] + [384] * 10 + [768] + [768] * 2
    assert [b.heads for b in blocks] == [1] + [2] * 2 + [4] * 11 + [8] * 2
    assert {b.head_dim for b in blocks} == {96}
    assert [b.mlp_width for b in blocks] == [4 * b.width for b in blocks]


def test_grids_of_mvit_b_16x4_are_those_of_the_paper():
    config = variant("mvit_b_16x4")
    assert patch_grid(config, 16, 224, 224) == (8, 56, 56)
    rows = grids(config, 16, 224, 224)
    sides = [56] * 2 + [28] * 2 + [14] * 11 + [7]
    assert [g.input for g in rows] == [(8, side, side) for side in sides]
    assert [g.output for g in rows] == [(8, side, side) for side in [*sides[1:], 7]]
    # 7x7 keys a frame; four times as many for inputs that are not pooled yet.
    keys = [14 if i in (1, 3, 14) else 7 for i in range(16)]
    assert [g.keys for g in rows] == [(8, side, side) for side in keys]


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ({}, (16, 224, 320)),
        ({}, (5, 97, 131)),
        ({}, (2, 1, 1)),
        ({"pool_mode": "max", "q_stride": (1, 3, 3)}, (4, 144, 144)),  # kernels follow odd strides
    ],
)
def test_grids_count_the_windows_of_padded_axes(overrides, size):
    config = variant("mvit_b_16x4", **overrides)

    def fits(*axes):
        return tuple(
            len(range(-padding, size + padding - kernel + 1, stride))
            for size, kernel, stride, padding in zip(*axes, strict=True)
        )

    patches = config.patch_kernel, config.patch_stride, config.patch_padding
    assert patch_grid(config, *size) == fits(size, *patches)
    for block, row in zip(plan(config), grids(config, *size), strict=True):
        for pool, output in ((block.q_pool, row.output), (block.kv_pool, row.keys)):
            if pool is not None:
                halves = [k // 2 for k in pool.kernel]
                assert output == fits(row.input, pool.kernel, pool.stride, halves)
        if block.skip_pool is not None:
            assert block.skip_pool.output(row.input) == row.output


def test_pooling_kernels_follow_mode_and_stride():
    def kernels(**overrides):
        blocks = plan(variant("mvit_b_16x4", **overrides))
        return [b.kv_pool and b.kv_pool.kernel for b in blocks[:4]], blocks[-1].kv_pool

    by_stride = [(1, 9, 9), (1, 5, 5), (1, 5, 5), (1, 3, 3)]
    # Stride 1 implies kernel 1, which is no pooling.
    assert kernels(pool_mode="max") == kernels(pool_mode="avg") == (by_stride, None)
    assert kernels(pool_kernel="stride + 1") == (by_stride, None)
    assert kernels(pool_kernel="stride")[0] == [(1, 8, 8), (1, 4, 4), (1, 4, 4), (1, 2, 2)]
    assert kernels(pool_kernel=(1, 3, 3)) == (
        [(1, 3, 3)] * 4,
        Pool("conv", (1, 3, 3), (1, 1, 1), heads=8),
    )
    assert {b.kv_pool and b.kv_pool.kernel for b in plan(variant("mvit_b16"))} == {(1, 3, 3)}
    assert all(b.q_pool is b.kv_pool is b.skip_pool is None for b in plan(variant("vit_b_8x8")))


def test_drop_path_rises_from_zero_in_equal_steps():
    rates = drop_path_rates(variant("mvit_b_16x4"))
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 16))
    assert drop_path_rates(dataclasses.replace(TINY, depths=(1,))) == (0.0,)


BAD = [
    ({"frames": 0}, "frames must be at least 1, not 0"),
    ({"num_classes": -1}, "num_classes must be at least 1"),
    ({"depths": ()}, "depths must be the number of blocks of each stage"),
    ({"depths": (1, 0)}, "depths must be the number of blocks of each stage"),
    ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
    ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
    ({"width": 10, "heads": 4}, "width 10 is not divisible by 4 heads"),
    ({"kv_stride": (1, 0, 0)}, "kv_stride must be at least 1 on every axis"),
    ({"patch_stride": (0, 4, 4)}, "patch_stride must be at least 1 on every axis"),
    ({"patch_kernel": (3, 0, 7)}, "patch_kernel must be at least 1 on every axis"),
    ({"pool_kernel": (3, 0, 3)}, "pool_kernel must be at least 1 on every axis"),
    ({"patch_padding": (-1, 0, 0)}, "patch_padding must be at least 0 on"),
    (
        {"pool_kernel": (3, 2, 2)},
        r"queries by the kernel \(3, 2, 2\) and its skip connection by .*, to different grids",
    ),
    (
        {"q_stride": (1, 3, 3)},
        r"pools its queries by the kernel .* and its skip connection by .* to different grids",
    ),
    ({"pool_mode": "conv_unshared"}, "conv_unshared.* requires pool_first=True"),
    (
        {"kv_kernels": ((3, 3, 3),)},
        "kv_kernels must be empty or have a kernel for each of the 16 blocks",
    ),
    ({"positions": "sincos", "width": 24}, "width divisible by 16, not 24"),
    ({"pool_norm_eps": 0.0}, "pool_norm_eps must be above 0"),
    ({"growth": 0}, "growth must be at least 1"),
]


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=lambda x: str(x)[:40])
def test_bad_values_are_refused_with_the_reason(overrides, words):
    with pytest.raises(UserError, match=words):
        variant("mvit_b_16x4", **overrides)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (
            "pool_mode",
            "median",
            "pool_mode must be one of conv, conv_unshared, max, avg, not 'median'",
        ),
        ("positions", "sine", "positions must be one of none, space, separate, joint"),
        ("q_stride", (2, 2), r"q_stride must be three numbers \(t, h, w\), not \(2, 2\)"),
        ("patch_kernel", 7, r"patch_kernel must be whole numbers like \(1, 2, 2\), not 7"),
        ("pool_kernel", "stride-1", r"pool_kernel must be whole numbers like \(1, 2, 2\)"),
        ("q_kernels", ((3, 3),), r"q_kernels must be three numbers"),
        ("expand", "head", "expand must be one of mlp, attention, not 'head'"),
        ("depths", [1, 2], r"depths must be whole numbers like \(1, 2, 11, 2\)"),
        ("qkv_bias", "yes", "qkv_bias must be True or False"),
    ],
)
def test_bad_types_are_refused_with_the_reason(field, value, words):
    # In the constructor the tests' check of signatures would raise first.
    config = copy.copy(TINY)
    object.__setattr__(config, field, value)
    with pytest.raises(UserError, match=words):
        config.__post_init__()


def test_blocks_of_mvitv2_s_16x4_are_those_of_the_paper():
    """Li et al. 2022, Table 1, and lengths of the released relative positional embeddings."""
    blocks = plan(variant("mvitv2_s_16x4"))
    assert [b.width for b in blocks] == [96] * 2 + [192] * 2 + [384] * 11 + [768]
    assert [b.attention_width for b in blocks] == [96] + [192] * 2 + [384] * 11 + [768] * 2
    assert [b.width_out for b in blocks] == [b.attention_width for b in blocks]
    assert [b.heads for b in blocks] == [1] + [2] * 2 + [4] * 11 + [8] * 2
    strides = [(1, 2, 2) if i in (1, 3, 14) else (1, 1, 1) for i in range(16)]
    assert [b.q_pool for b in blocks] == [
        Pool("conv", (3, 3, 3), stride, heads=b.heads)
        for stride, b in zip(strides, blocks, strict=True)
    ]
    assert [i for i, b in enumerate(blocks) if b.skip_pool] == [1, 3, 14]
    assert [b.relative_space for b in blocks] == [111] + [55, 55] + [27] * 12 + [13]
    assert {b.relative_time for b in blocks} == {15}
    assert {b.residual_pool for b in blocks} == {"grid"}


def test_unknown_names_are_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="no variant 'mvit_b_16x5'; did you mean 'mvit_b_16x4'"):
        variant("mvit_b_16x5")
    with pytest.raises(
        UserError, match=r"no architecture field 'num_clases'; .* mean 'num_classes'"
    ):
        variant("mvit_b_16x4", num_clases=10)
    with pytest.raises(UserError, match="no variant 'zzz'; choose one of mvit_s_16x4, "):
        variant("zzz")
    assert variant("mvit_b_16x4", frames=8).frames == 8
