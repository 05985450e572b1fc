"""Scanned blocks and rematerialisation policies: equal results, less saved or compiled."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models import run_blocks
from mvit_jax.models.functional import functional
from mvit_jax.models.plan import MViTConfig
from tests.support import drawn

SMALL = {"size": 16, "width": 4, "num_classes": 3, "kv_stride": (1, 2, 2), "drop_path": 0.4}
V1 = MViTConfig(frames=4, depths=(1, 3), **SMALL)
V2 = MViTConfig(
    frames=4, depths=(1, 3), expand="attention", full_q_pool=True, relative_positions="both",
    residual_pool="grid", **SMALL,
)  # fmt: skip
CLIP = jax.ShapeDtypeStruct((1, 4, 16, 16, 3), jnp.float32)
WAYS = [
    {"scan": True},
    {"remat": "cheap"},
    {"remat": "first_stage"},
    {"remat": "blocks"},
    {"scan": True, "remat": "blocks"},
    {"scan": True, "remat": "cheap"},
]


def loss(params, clip, config, **way):
    model = functional(config, dtype=clip.dtype)
    logits, _ = model.apply(params, clip, key=jax.random.key(3), **way)
    return (logits * jnp.arange(1.0, 4)[None]).sum()


@functools.lru_cache
def params_and_reference(config):
    params = functional(config).init(jax.random.key(0))
    clip = jax.random.normal(jax.random.key(1), (3, 4, 16, 16, 3), jnp.float64)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    plain = jax.jit(jax.value_and_grad(loss), static_argnums=2)(params, clip, config)
    return params, clip, plain


QUICK = [("v2", WAYS[5])]
SLOW = [("v1", WAYS[2]), ("v1", WAYS[3]), ("v1", WAYS[5]), ("v2", WAYS[0])]


def case(name, config, way):
    mark = pytest.mark.slow if (name, way) in SLOW else pytest.mark.nightly
    return pytest.param(
        config, way, id=f"{name}, {way}", marks=[] if (name, way) in QUICK else mark
    )


CASES = [case(*named, way) for named in (("v1", V1), ("v2", V2)) for way in WAYS]


@pytest.mark.parametrize(("config", "way"), CASES)
def test_scan_and_remat_change_neither_loss_nor_gradients(config, way):
    with jax.enable_x64(True):
        params, clip, plain = params_and_reference(config)
        run = functools.partial(loss, config=config, **way)
        value, gradients = jax.jit(jax.value_and_grad(run))(params, clip)
        np.testing.assert_allclose(value, plain[0], rtol=1e-12)
        for actual, expected in zip(*map(jax.tree.leaves, (gradients, plain[1])), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)


def saved_activations(**way) -> Counter[tuple[int, ...]]:
    """Counts the shapes of saved activations [clips, tokens, channels]."""
    run = functools.partial(loss, clip=jnp.zeros((3, 4, 16, 16, 3)), config=V1, **way)
    _, vjp = jax.eval_shape(lambda params: jax.vjp(run, params), drawn.shapes(functional(V1)))
    leaves = jax.tree.leaves(vjp)
    return Counter(leaf.shape for leaf in leaves if leaf.ndim == 3 and leaf.shape[0] == 3)


def test_rematerialised_activations_are_not_saved():
    hidden_first, hidden = (3, 33, 16), (3, 9, 32)  # of the MLPs in stage 0 and in stage 1
    none, cheap, first, blocks = (saved_activations(remat=remat) for remat in run_blocks.REMAT)
    assert none[hidden] >= 3 and none[hidden_first] >= 1
    assert hidden_first not in first and first[hidden] >= 2  # block 1 begins on that grid too
    assert not {hidden_first, hidden} & set(blocks)
    assert sum(blocks.values()) < sum(cheap.values()) < sum(none.values())


def test_equal_blocks_are_one_loop_with_a_name_in_profiles():
    def lowered(scan):
        run = jax.jit(functools.partial(loss, config=V1, scan=scan))
        return run.lower(drawn.shapes(functional(V1)), CLIP).as_text(debug_info=True)

    plain, looped = map(lowered, (False, True))
    assert "stablehlo.while" in looped
    assert looped.count("stablehlo.dot_general") < plain.count("stablehlo.dot_general")
    assert "stage1/blocks2-3" in looped and "stage1/block3" in plain


@pytest.mark.slow
def test_the_cheap_policy_recomputes_no_matrix_product():
    """Each product's gradient has two; a third would be a recomputed product."""

    def products(**way):
        run = jax.jit(jax.grad(functools.partial(loss, config=V1, **way)))
        traced = run.trace(drawn.shapes(functional(V1)), CLIP)
        text = traced.lower(lowering_platforms=("cpu",)).as_text()
        return text.count("stablehlo.dot_general")

    assert products(remat="cheap") == products() < products(remat="blocks")
