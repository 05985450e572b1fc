"""The model: inputs that are refused, and stochastic depth in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mvit_jax.common.errors import UserError
from mvit_jax.models import layers
from mvit_jax.models.functional import functional
from mvit_jax.models.layers import drop_path_masks
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.variants import variant
from tests.support import drawn

SMALL = MViTConfig(
    frames=2, size=8, num_classes=3, width=4, depths=(1, 2), kv_stride=(1, 2, 2), drop_path=0.25
)
IMAGES = variant("mvit_b16", size=16, width=4, depths=(1, 1))


@pytest.mark.parametrize(
    ("config", "shape", "dtype", "words"),
    [
        (SMALL, (2, 8, 8, 3), "float32", r"requires \[batch, T, H, W, 3\] .* shape \[2, 8, 8, 3\]"),
        (SMALL, (2, 3, 2, 8, 8), "float32", r"requires \[batch, T, H, W, 3\] clips"),
        (SMALL, (2, 2, 0, 8, 3), "float32", r"2x0x8 .* too small: .* at least 1x1x1"),
        (SMALL, (2, 2, 8, 8, 3), "uint8", r"normalised .* the input is uint8: divide by 255"),
        (IMAGES, (16, 16, 3), "float32", r"requires \[batch, H, W, 3\] images"),
    ],
)
def test_inputs_of_other_shapes_or_dtypes_are_refused(config, shape, dtype, words):
    model = functional(config)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(model.apply, drawn.shapes(model), jax.ShapeDtypeStruct(shape, dtype))


EMPTY = {
    "mvit": SMALL,
    "image": IMAGES,
    "no class token": dataclasses.replace(SMALL, class_token=False),
    "mean": dataclasses.replace(SMALL, mean_pooling=True, pool_mode="max"),
    "pool first": dataclasses.replace(SMALL, pool_first=True, positions="sincos", width=16),
    "mvitv2": variant("mvitv2_t", size=32, width=8, depths=(1, 2)),
    "vit": variant("vit_b_8x8", size=32, width=8, heads=2, depths=(2,)),
}
QUICK = [("mvit", "auto"), ("mvitv2", "auto"), ("mean", "reference"), ("vit", "auto")]


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        pytest.param(name, ops, marks=[] if (name, ops) in QUICK else pytest.mark.slow)
        for name in EMPTY
        for ops in ("auto", "reference")
    ],
)
def test_no_clips_have_empty_outputs_of_the_same_shapes(name, ops):
    config = EMPTY[name]
    model = functional(config, ops=ops)
    weights = drawn.shapes(model)
    frames = () if config.frames == 1 else (config.frames,)

    def outputs(clips, function=model.apply, **options):
        clip = jax.ShapeDtypeStruct((clips, *frames, config.size, config.size, 3), jnp.float32)
        return jax.eval_shape(lambda *a: function(*a, **options), weights, clip)

    for options in ({"capture": True}, {"scan": True, "key": jax.random.key(0), "remat": "blocks"}):
        none, two = outputs(0, **options), outputs(2, **options)
        assert jax.tree.structure(none) == jax.tree.structure(two)
        for empty, full in zip(jax.tree.leaves(none), jax.tree.leaves(two), strict=True):
            assert (empty.shape, empty.dtype) == ((0, *full.shape[1:]), full.dtype)


def test_no_clips_have_no_gradient_and_are_checked():
    model = functional(SMALL)
    weights = jax.tree.map(lambda x: jnp.ones(x.shape), drawn.shapes(model))
    gradients = jax.grad(lambda w: model.apply(w, jnp.zeros((0, 2, 8, 8, 3)))[0].sum())(weights)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradients))
    with pytest.raises(UserError, match=r"the input has shape \[0, 8, 8, 3\]"):
        model.apply(weights, jnp.zeros((0, 8, 8, 3)))


def test_drop_path_drops_each_branch_for_some_clips():
    rate, grid = SMALL.drop_path, (1, 2, 2)
    model = functional(SMALL)
    block = model.module(drawn.weights(model)).blocks[2]
    x = jax.random.normal(jax.random.key(0), (48, 5, 8))

    @jax.jit
    def run(x, key):
        """Returns the block's outputs, and those of branches scaled by 0, 1 and 1 / (1 - rate)."""
        attended = block.attn(block.norm1(x), grid)
        rows = []
        for first in (0, 1, 1 / (1 - rate)):
            y = x + first * attended
            mlp = block.mlp(block.norm2(y))
            rows.append(jnp.stack([y + second * mlp for second in (0, 1, 1 / (1 - rate))]))
        return block(x, grid, key), block(x, grid), jnp.stack(rows)

    out, inference, cases = run(x, jax.random.key(1))
    np.testing.assert_allclose(inference, cases[1, 1], rtol=0, atol=1e-4)  # without a key
    matches = np.abs(cases - out[None, None]).max((3, 4)) < 1e-3
    assert (matches.sum((0, 1)) == 1).all()
    # All four cases occur, and no others: branches and clips are drawn independently.
    assert matches.any(2).tolist() == [[True, False, True], [False] * 3, [True, False, True]]
    np.testing.assert_array_equal(out, run(x, jax.random.key(1))[0])
    assert (out != run(x, jax.random.key(2))[0]).any()


def test_masks_drawn_together_equal_those_of_separate_keys():
    """Runs that began with separate draws resume with the same masks."""
    key = jax.random.key(3)
    branches = drop_path_masks(key, 0.25, 50)
    for i, branch in enumerate(branches):
        expected = jax.random.bernoulli(
            jax.random.fold_in(key, i), 1 - jnp.float32(0.25), (50, 1, 1)
        )
        np.testing.assert_array_equal(branch, expected)
    for i, folded in enumerate(layers.fold_keys(key, 5)):
        assert folded == jax.random.fold_in(key, i)
    assert drop_path_masks(key, 0.0, 4) == drop_path_masks(None, 0.25, 4) == (None, None)


def test_randomness_in_training_depends_on_the_key_alone():
    model, key = functional(SMALL), jax.random.key(5)
    params, run = drawn.weights(model), jax.jit(model.apply)
    clip = jax.random.normal(jax.random.key(7), (16, 2, 8, 8, 3))
    inference, _ = run(params, clip)
    training, features = run(params, clip, key=key)
    np.testing.assert_array_equal(training, run(params, clip, key=key)[0])
    other, other_features = run(params, clip, key=jax.random.key(6))
    assert (training != inference).any() and (training != other).any()
    # The first block drops nothing.
    np.testing.assert_array_equal(features["stages"][0], other_features["stages"][0])
    assert (features["stages"][1] != other_features["stages"][1]).any()


def test_every_block_has_a_separate_key():
    keys = []

    class Passing(nnx.Module):
        def __init__(self, plan, drop_path, **rest):
            pass

        def __call__(self, x, grid, key):
            keys.append(key)
            return x

    model = functional(dataclasses.replace(SMALL, depths=(3,)), block=Passing)
    model.apply(drawn.weights(model), jnp.zeros((1, 2, 8, 8, 3)), key=jax.random.key(9))
    expected = [jax.random.fold_in(jax.random.key(9), i) for i in range(3)]
    assert [jax.random.key_data(k).tolist() for k in keys] == [
        jax.random.key_data(k).tolist() for k in expected
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_classes": 7},
            r"head/classifier/bias has shape \[3\], but \[7\] is required",
        ),
        ({"depths": (1, 1, 2)}, r"blocks/1/.* has shape .*, but .* is required"),
    ],
)
def test_an_architecture_mismatch_error_names_the_parameter(change, message):
    params = drawn.shapes(functional(SMALL))
    other = functional(dataclasses.replace(SMALL, **change))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(other.apply, params, jax.ShapeDtypeStruct((1, 2, 8, 8, 3), jnp.float32))
