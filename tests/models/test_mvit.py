"""The model against a ViT in numpy, its two forms, and its parts one by one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mvit_jax.common.errors import UserError
from mvit_jax.models import layers
from mvit_jax.models.functional import create_model, functional, params_of
from mvit_jax.models.layers import draw_clips, drop_clips
from mvit_jax.models.mvit import Block, MViT, PooledAttention
from mvit_jax.models.plan import MViTConfig, plan
from mvit_jax.models.variants import variant

# A Vision Transformer in numpy.

VIT = MViTConfig(
    frames=2,
    size=12,
    num_classes=3,
    patch_kernel=(1, 4, 4),
    patch_stride=(1, 4, 4),
    patch_padding=(0, 0, 0),
    width=8,
    heads=2,
    depths=(2,),
    pool_kernel="stride + 1",
    kv_stride=(1, 1, 1),
    positions="joint",
)


def naive_vit(p, clip, config):
    """One clip [T, H, W, 3] through a ViT, float64: the normalised tokens, and the logits."""

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]
        )

    kernel, bias = p["patch_embed"]["proj"]["kernel"], p["patch_embed"]["proj"]["bias"]
    tables, tokens = p.get("positions", {}), []
    if config.class_token:
        tokens.append((tables["class_token"] + tables.get("class_position", 0))[0])
    for t in range(config.frames):
        for i in range(config.size // 4):
            for j in range(config.size // 4):
                patch = clip[t, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                token = np.einsum("ijc,ijcd->d", patch, kernel[0]) + bias
                token = token + (tables["joint"][t, i, j] if "joint" in tables else 0)
                token = token + (tables["space"][i, j] if "space" in tables else 0)
                tokens.append(token + (tables["time"][t] if "time" in tables else 0))
    x, dim = np.stack(tokens), config.width // config.heads
    for block in (p["blocks"][str(i)] for i in range(config.depths[0])):
        q, k, v = np.split(linear(norm(x, block["norm1"]), block["attn"]["qkv"]), 3, axis=-1)
        heads = []
        for h in range(config.heads):
            one = slice(h * dim, (h + 1) * dim)
            weights = np.exp(q[:, one] @ k[:, one].T / np.sqrt(dim))
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, one])
        x = x + linear(np.concatenate(heads, 1), block["attn"]["proj"])
        hidden = linear(norm(x, block["norm2"]), block["mlp"]["fc1"])
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2))) / 2
        x = x + linear(hidden, block["mlp"]["fc2"])
    x = norm(x, p["norm"])
    pooled = x[0] if config.class_token else x.mean(0)
    return x, linear(pooled, p["head"]["classifier"])


def randomised(params, scale=0.3):
    """Parameters of which none is zero or one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.array(x + scale * rng.standard_normal(x.shape)), params)


@pytest.mark.parametrize("class_token", [True, False], ids=["class token", "mean"])
@pytest.mark.parametrize("positions", ["joint", "separate", "space", "none"])
def test_one_stage_without_pooling_is_a_vit(positions, class_token):
    config = dataclasses.replace(VIT, positions=positions, class_token=class_token)
    abstract = jax.eval_shape(functional(config).init, jax.random.key(0))
    params = randomised(jax.tree.map(lambda x: np.zeros(x.shape), abstract))
    clip = np.random.default_rng(1).standard_normal((2, 2, 12, 12, 3))
    with jax.enable_x64(True):
        run = jax.jit(functional(config, dtype=jnp.float64).apply)
        logits, features = run(params, clip)
        assert logits.dtype == jnp.float64
    assert [stage.shape for stage in features["stages"]] == [(2, 2, 3, 3, 8)]
    for i in range(2):
        tokens, expected = naive_vit(params, clip[i], config)
        np.testing.assert_allclose(logits[i], expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(features["tokens"][i], tokens, rtol=0, atol=1e-12)


# The two forms, and what goes in and out.

SMALL = MViTConfig(
    frames=2,
    size=8,
    num_classes=3,
    width=4,
    depths=(1, 1),
    pool_kernel=(1, 3, 3),
    kv_stride=(1, 2, 2),
    drop_path=0.5,
    dropout=0.0,
)
CLIPS = 16

run = jax.jit(functional(SMALL).apply)


def small_clip():
    return jax.random.normal(jax.random.key(7), (CLIPS, 2, 8, 8, 3))


def small_params(**plugs):
    return randomised(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), small_shapes(**plugs)))


def small_shapes(**plugs):
    return jax.eval_shape(functional(SMALL, **plugs).init, jax.random.key(0))


def with_weights(build, scale=0.3):
    """A module that is not 0.02 here and zero there, and whose own weights need not be compiled."""
    module = nnx.eval_shape(build)
    state = nnx.state(module, nnx.Param)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    nnx.update(module, jax.tree.map(jnp.array, randomised(zeros, scale)))
    return module


def test_module_and_pure_form_are_the_same():
    model = with_weights(lambda: MViT(SMALL, rngs=nnx.Rngs(0)))
    params, clip = params_of(model), small_clip()
    logits, features = jax.jit(model.forward)(clip)
    pure, pure_features = run(params, clip)
    np.testing.assert_array_equal(logits, pure)
    jax.tree.map(np.testing.assert_array_equal, features, pure_features)
    assert logits.shape == (CLIPS, 3) and logits.dtype == jnp.float32
    assert [x.shape[1:] for x in features["stages"]] == [(1, 2, 2, 8), (1, 1, 1, 8)]
    assert jax.eval_shape(model, clip).shape == (CLIPS, 3)


def test_parameters_are_a_nested_dict_with_string_keys():
    params = functional(SMALL).init(jax.random.key(4))
    assert set(params["blocks"]) == {"0", "1"}
    kernel = params["blocks"]["1"]["attn"]["qkv"]["kernel"]
    assert kernel.shape == (8, 24)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert all(type(key.key) is str for key in path)
        assert leaf.dtype == jnp.float32
    # Of linear layers N(0, 0.02), cut at two standard deviations; biases zero, norms one.
    assert 0.014 < kernel.std() < 0.022 and np.abs(kernel).max() <= 0.04
    block = params["blocks"]["1"]
    assert not block["attn"]["qkv"]["bias"].any() and (block["norm1"]["scale"] == 1).all()
    # Of convolutions uniform within 1 / sqrt(fan in).
    for x, fan_in in (
        (params["patch_embed"]["proj"]["kernel"], 3 * 3 * 7 * 7),
        (block["attn"]["pool_k"]["kernel"], 9),
    ):
        bound = fan_in**-0.5
        assert 0.9 * bound < np.abs(x).max() <= bound
        assert x.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    other = functional(SMALL).init(jax.random.key(1))
    assert (other["blocks"]["1"]["attn"]["qkv"]["kernel"] != kernel).all()


def test_images_are_clips_of_one_frame():
    config = variant("mvit_b16", size=16, width=4, depths=(1, 1), num_classes=3)
    model = with_weights(lambda: MViT(config, rngs=nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    logits = jax.jit(model)(images)
    assert logits.shape == (2, 3)
    np.testing.assert_array_equal(logits, jax.jit(model)(images[:, None]))


def test_inference_draws_nothing_and_clips_go_their_own_ways():
    params, clip = small_params(), small_clip()
    logits, _ = run(params, clip)
    np.testing.assert_array_equal(logits, run(params, clip)[0])
    other_way_round, _ = run(params, clip[::-1])
    np.testing.assert_allclose(logits[::-1], other_way_round, rtol=0, atol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((2, 8, 8, 3), "float32", r"takes \[batch, T, H, W, 3\] clips; .* shape \[2, 8, 8, 3\]"),
        ((2, 3, 2, 8, 8), "float32", r"takes \[batch, T, H, W, 3\] clips"),
        ((2, 2, 0, 8, 3), "float32", r"2x0x8 .* leaves no token; the smallest .* 1x1x1"),
        ((2, 2, 8, 8, 3), "uint8", r"normalised .* this input has uint8: divide by 255"),
    ],
)
def test_other_inputs_say_what_is_wrong(shape, dtype, words):
    clip = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(functional(SMALL).apply, small_shapes(), clip)


def test_an_image_model_says_that_it_takes_images():
    config = variant("mvit_b16", size=16, width=4, depths=(1, 1))
    params = jax.eval_shape(functional(config).init, jax.random.key(0))
    with pytest.raises(UserError, match=r"takes \[batch, H, W, 3\] images"):
        clip = jax.ShapeDtypeStruct((16, 16, 3), jnp.float32)
        jax.eval_shape(functional(config).apply, params, clip)


def test_models_that_do_not_exist_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'mvit_b_32x3'"):
        create_model("mvit_b_32x", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="did you mean 'drop_path'"):
        create_model("mvit_b_32x3", droppath=0.1, rngs=nnx.Rngs(0))


# One block.


def new_block(block_plan, drop_path=0.0):
    return with_weights(
        lambda: Block(
            block_plan,
            drop_path,
            attention=PooledAttention,
            dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )


def test_where_the_width_changes_the_skip_is_of_the_normalised_tensor():
    block = new_block(plan(SMALL)[0])
    grid = (1, 3, 4)
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 13, 4))  # far from normalised

    @jax.jit
    def both(x):
        return block(x, grid), block.attn(block.norm1(x), grid)

    out, attended = both(x)
    p = jax.tree.map(lambda v: np.array(v, np.float64), params_of(block))
    y = np.array(x + attended, np.float64)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = y * p["norm2"]["scale"] + p["norm2"]["bias"]
    hidden = y @ p["mlp"]["fc1"]["kernel"] + p["mlp"]["fc1"]["bias"]
    hidden = hidden * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2))) / 2
    mlp = hidden @ p["mlp"]["fc2"]["kernel"] + p["mlp"]["fc2"]["bias"]
    expected = y @ p["proj"]["kernel"] + p["proj"]["bias"] + mlp
    assert out.shape == (2, 13, 8)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)


def test_drop_path_leaves_each_branch_out_for_some_clips():
    rate, clips, grid = 0.5, 48, (1, 2, 2)
    block = new_block(dataclasses.replace(plan(SMALL)[1], q_pool=None, skip_pool=None), rate)
    x = jax.random.normal(jax.random.key(0), (clips, 5, 8))

    @jax.jit
    def both(x, key):
        """The block, and what it may be: each branch left out, kept, scaled [3, 3, clip, ...]."""
        attended = block.attn(block.norm1(x), grid)
        rows = []
        for first in (0, 1, 1 / (1 - rate)):
            y = x + first * attended
            mlp = block.mlp(block.norm2(y))
            rows.append(jnp.stack([y + second * mlp for second in (0, 1, 1 / (1 - rate))]))
        return block(x, grid, key), block(x, grid), jnp.stack(rows)

    out, kept, cases = both(x, jax.random.key(1))
    np.testing.assert_allclose(kept, cases[1, 1], rtol=0, atol=1e-4)  # without a key
    taken = np.abs(cases - out[None, None]).max((3, 4)) < 1e-3
    assert (taken.sum((0, 1)) == 1).all()
    # All four cases occur, and no others: branches and clips are drawn apart.
    assert taken.any(2).tolist() == [[True, False, True], [False] * 3, [True, False, True]]
    np.testing.assert_array_equal(out, both(x, jax.random.key(1))[0])
    assert (out != both(x, jax.random.key(2))[0]).any()


def test_drop_path_preserves_the_mean():
    x = jnp.ones((20000, 2, 3))
    first, second = draw_clips(jax.random.key(0), 0.25, len(x))
    out = np.array(drop_clips(x, 0.25, first))
    assert np.unique(out).tolist() == pytest.approx([0, 4 / 3])
    assert (out == out[:, :1, :1]).all()  # clips are left out whole
    assert out.mean() == pytest.approx(1, abs=0.02)  # 5 standard deviations
    assert (out != np.array(drop_clips(x, 0.25, second))).any()
    assert draw_clips(jax.random.key(0), 0.0, 4) == draw_clips(None, 0.25, 4) == (None, None)
    assert drop_clips(x, 0.25, None) is x


def test_what_is_drawn_at_once_is_what_each_key_gives():
    """Runs that were begun with one draw after the other go on with the same ones."""
    key = jax.random.key(3)
    branches = draw_clips(key, 0.25, 50)
    for i, drawn in enumerate(branches):
        alone = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - jnp.float32(0.25), (50, 1, 1))
        np.testing.assert_array_equal(drawn, alone)
    for i, folded in enumerate(layers.fold(key, 5)):
        assert folded == jax.random.fold_in(key, i)


# Training.


def test_training_draws_from_the_key_alone():
    params, clip, key = small_params(), small_clip(), jax.random.key(5)
    inference, _ = run(params, clip)
    training, features = run(params, clip, key=key)
    np.testing.assert_array_equal(training, run(params, clip, key=key)[0])
    other, other_features = run(params, clip, key=jax.random.key(6))
    assert (training != inference).any() and (training != other).any()
    # Nothing is left out in the first block.
    np.testing.assert_array_equal(features["stages"][0], other_features["stages"][0])
    assert (features["stages"][1] != other_features["stages"][1]).any()


def test_every_block_draws_from_a_key_of_its_own():
    keys = []

    class Passing(nnx.Module):
        def __init__(self, plan, drop_path, *, attention, pooling, dtype, rngs):
            pass

        def __call__(self, x, grid, key):
            keys.append(key)
            return x

    config = dataclasses.replace(VIT, depths=(3,))
    shapes = jax.eval_shape(functional(config, block=Passing).init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    clip = jnp.zeros((1, 2, 12, 12, 3))
    functional(config, block=Passing).apply(params, clip, key=jax.random.key(9))
    expected = [jax.random.fold_in(jax.random.key(9), i) for i in range(3)]
    assert [jax.random.key_data(k).tolist() for k in keys] == [
        jax.random.key_data(k).tolist() for k in expected
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_classes": 7}, r"head/classifier/bias is \[3\] there and \[7\] in this model"),
        ({"depths": (1, 1, 1)}, r"blocks/1/.* there and .* in this model"),
    ],
)
def test_parameters_of_another_architecture_are_refused_by_name(change, sentence):
    base = {"frames": 2, "size": 16, "width": 8, "depths": (1, 1), "num_classes": 3}
    params = functional(variant("mvit_b_16x4", **base)).init(jax.random.key(0))
    other = variant("mvit_b_16x4", **(base | change))
    size = (1, other.frames, other.size, other.size, 3)
    with pytest.raises(UserError, match=sentence):
        functional(other).apply(params, jnp.zeros(size))
