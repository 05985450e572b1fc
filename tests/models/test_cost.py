"""Costs by formula, against published figures and against the model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mvit_jax.describe.ablations import ABLATIONS
from mvit_jax.models.cost import block_cost, cost, embedding_cost, head_cost, products
from mvit_jax.models.functional import functional
from mvit_jax.models.plan import MViTConfig, grids, plan
from mvit_jax.models.variants import CLASSES, PUBLISHED, VARIANTS, variant
from tests.support import drawn

TINY = MViTConfig(
    frames=4, size=28, num_classes=5, width=8, depths=(1, 2, 2), kv_stride=(1, 4, 4), drop_path=0.4
)


def count(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "parameters", "billions"),
    [("mvit_b_16x4", 36_610_672, 70.599), ("mvitv2_s_16x4", 34_537_744, 64.224)],
)
def test_costs_equal_those_declared_by_torchvision(name, parameters, billions):
    total = cost(variant(name))
    assert total.parameters == parameters
    assert round(total.multiply_adds / 1e9, 3) == billions


@pytest.mark.parametrize(
    ("name", "overrides", "parameters"),
    [
        # Counted from timm 1.0.31: mvitv2_tiny, _small, _base, _large, _base_cls, _large_cls,
        # _huge_cls.
        ("mvitv2_t", {}, 24_173_320),
        ("mvitv2_s", {}, 34_870_216),
        ("mvitv2_b", {}, 51_472_744),
        ("mvitv2_l", {}, 217_992_952),
        ("mvitv2_b_in21k", {}, 65_444_032),
        ("mvitv2_l_in21k", {}, 234_583_216),
        ("mvitv2_h_in21k", {}, 694_804_128),
        # Models that only PySlowFast has.
        ("mvit_b_16x4", {"pool_kernel": "stride + 1"}, 36_565_936),
        ("mvit_b24_32x3", {"pool_kernel": "stride + 1"}, 53_115_280),
        ("mvitv2_l_40x3_312", {}, 213_390_112),
        ("maskfeat_s_16x4", {}, 36_475_120),
    ],
)
def test_parameters_equal_those_of_the_originals(name, overrides, parameters):
    assert cost(variant(name, **overrides)).parameters == parameters


ROWS = [(name, name, {}, row) for name, row in PUBLISHED.items()]
ROWS += [(f"{a.published.source}, {a.setting}", a.variant, a.overrides, a.published)
         for a in ABLATIONS]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "overrides", "p"), ROWS, ids=[row[0] for row in ROWS])
def test_costs_are_within_a_percent_of_the_papers_unless_explained(row, name, overrides, p):
    total = cost(variant(name, num_classes=CLASSES[p.data], **overrides))
    ours = {"parameters": total.parameters / 1e6, "multiply_adds": total.multiply_adds / 1e9}
    near = [
        value == pytest.approx(getattr(p, key), rel=0.0101)
        for key, value in ours.items()
        if getattr(p, key) is not None
    ]
    assert all(near) != bool(p.note), ours


def test_rows_of_one_model_in_two_tables_have_one_architecture():
    """MViT-B-16 with max pooling has 82.5 % and 7.8 G in Tables A.3 and 17 alike."""
    models = {
        variant(a.variant, **a.overrides)
        for a in ABLATIONS
        if a.published.data == "ImageNet-1k" and a.published.top1 == 82.5
    }
    assert len(models) == 1


QUICK = ("mvit_b_16x4", "vit_b16")  # tracing a variant takes seconds


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.nightly) for n in VARIANTS]
)
def test_parameters_equal_those_of_the_model(name):
    assert cost(VARIANTS[name]).parameters == sum(
        map(math.prod, functional(VARIANTS[name]).shapes().values())
    )


V2 = {
    "positions": "none",
    "relative_positions": "both",
    "residual_pool": "grid",
    "full_q_pool": True,
    "expand": "attention",
}
CONFIGS = {
    "conv": TINY,
    "max": dataclasses.replace(TINY, pool_mode="max"),
    "avg, no class token": dataclasses.replace(TINY, pool_mode="avg", class_token=False),
    "kernel": dataclasses.replace(TINY, pool_kernel=(1, 3, 3), positions="none"),
    "stride + 1": dataclasses.replace(TINY, pool_kernel="stride + 1", positions="joint"),
    "heads, space": dataclasses.replace(TINY, heads=2, mlp_ratio=3, positions="space"),
    "stride along time": dataclasses.replace(TINY, q_stride=(2, 2, 2), kv_stride=(2, 4, 4)),
    "no class token, positions": dataclasses.replace(TINY, class_token=False, positions="joint"),
    "one stage": dataclasses.replace(TINY, depths=(2,), pool_kernel="stride + 1"),
    "MViTv2": dataclasses.replace(TINY, **V2, size=32),
    "MViTv2, growth in the MLP": dataclasses.replace(TINY, **V2 | {"expand": "mlp"}, size=32),
    "relative in time": dataclasses.replace(TINY, **V2 | {"relative_positions": "time"}),
    "pool first": dataclasses.replace(TINY, pool_first=True, stem_norm=True, expand="attention"),
    "pool first, unshared": dataclasses.replace(TINY, pool_first=True, pool_mode="conv_unshared"),
    "separate": dataclasses.replace(TINY, separate_qkv=True, qkv_bias=False, positions="sincos",
                                    width=16),
    "no skip": dataclasses.replace(TINY, skip="none"),
    "kernels": dataclasses.replace(TINY, q_kernels=((1, 1, 1), *((1, 3, 3),) * 4),
                                   kv_kernels=((3, 3, 3), *((1, 1, 1),) * 4)),
    "equal widths": dataclasses.replace(TINY, growth=1, kv_adaptive=False, mean_pooling=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_each_module_equal_those_of_the_model(name):
    config = CONFIGS[name]
    params = drawn.shapes(functional(config))
    assert embedding_cost(config).parameters == count(
        [params["patch_embed"], params.get("positions", {}), params.get("stem_norm", {})]
    )
    sizes = grids(config, config.frames, config.size, config.size)
    for i, (block, sizes_of_block) in enumerate(zip(plan(config), sizes, strict=True)):
        formula = block_cost(block, sizes_of_block, config.class_token).parameters
        assert formula == count(params["blocks"][str(i)]), f"block {i}"
    assert head_cost(config).parameters == count([params["norm"], params["head"]])


@pytest.mark.parametrize("name", CONFIGS)
def test_multiply_adds_equal_those_of_the_model(name):
    config = CONFIGS[name]
    clip = jax.ShapeDtypeStruct((1, config.frames, config.size, config.size, 3), jnp.float32)
    model = functional(config, ops="reference")
    program = jax.make_jaxpr(model.apply)(drawn.shapes(model), clip)
    assert cost(config).multiply_adds == products(program) - relative_products(config)


def test_products_in_loops_are_counted_once_per_iteration():
    x = jnp.ones((2, 3, 3))

    def looped(x):
        x, _ = lax.scan(lambda x, y: (jax.checkpoint(jnp.matmul)(x, y), None), x[0], x)
        return lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)

    assert products(jax.make_jaxpr(looped)(x)) == 3 * 27


def relative_products(config: MViTConfig) -> int:
    """Counts products of relative features, which are additions in the papers' counts."""
    total = 0
    sizes = grids(config, config.frames, config.size, config.size)
    for block, g in zip(plan(config), sizes, strict=True):
        queries, keys = (math.prod(grid) + config.class_token for grid in (g.output, g.keys))
        features = g.keys[0] * bool(block.relative_time)
        features += (g.keys[1] + g.keys[2]) * bool(block.relative_space)
        total += block.heads * queries * keys * features
    return total
