"""The model against torchvision's own MViT class, at a tiny size and with weights drawn alike.

`tests/reference/make_torchvision.py` made the outputs.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.mvit import apply, init
from mvit_jax.models.plan import MViTConfig, plan
from tests.reference import make_torchvision as reference

REFERENCE = MViTConfig(
    frames=reference.FRAMES,
    size=reference.SIZE,
    num_classes=reference.CLASSES,
    width=8,
    depths=(1, 1, 2),
    kv_stride=(1, 4, 4),
)
TOLERANCE = 1e-4  # of logits, largest difference over standard deviation

NAMES = [  # ours to torchvision's, one substitution after the other
    (r"^patch_embed/proj", "conv_proj"),
    (r"^positions/class_position", "pos_encoding/class_pos"),
    (r"^positions/class_token", "pos_encoding/class_token"),
    (r"^positions/space", "pos_encoding/spatial_pos"),
    (r"^positions/time", "pos_encoding/temporal_pos"),
    (r"^head/classifier", "head/1"),
    (r"^blocks/(\d+)/proj", r"blocks/\1/project"),
    (r"/attn/proj", "/attn/project/0"),
    (r"/pool_(.)/kernel", r"/pool_\1/pool/kernel"),
    (r"/pool_(.)/norm", r"/pool_\1/norm_act/0"),
    (r"/mlp/fc1", "/mlp/0"),
    (r"/mlp/fc2", "/mlp/3"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/", "."),
]


def torchvision_name(path) -> str:
    name = "/".join(key.key for key in path)
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return name


def ours(draw_one):
    """Our tree of parameters, each tensor drawn in torchvision's shape and turned into ours."""

    def one(path, leaf):
        name, shape = torchvision_name(path), leaf.shape
        if name == "conv_proj.weight":
            return draw_one(name, (*shape[:2:-1], *shape[:3])).transpose(2, 3, 4, 1, 0)
        if name.endswith("pool.weight"):
            return draw_one(name, (shape[3], 1, *shape[:3]))[:, 0].transpose(1, 2, 3, 0)
        if path[-1].key == "kernel":
            return draw_one(name, shape[::-1]).T
        if name.startswith("pos_encoding"):
            rows = math.prod(shape[:-1])
            theirs = shape[-1:] if "class" in name else (rows, shape[-1])
            return draw_one(name, theirs).reshape(shape)
        return draw_one(name, shape)

    abstract = jax.eval_shape(lambda: init(REFERENCE, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(one, abstract)


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(reference.PATH))


@pytest.fixture(scope="module")
def weights():
    return ours(reference.draw_weight)


@functools.cache
def reference_model(dtype):
    return jax.jit(functools.partial(apply, config=REFERENCE, dtype=dtype))


def reference_clip():
    return jnp.array(reference.clip().transpose(0, 2, 3, 4, 1))


def difference(logits, stored) -> float:
    return np.abs(np.array(logits) - stored["logits"]).max() / stored["logits"].std()


def test_every_tensor_of_torchvision_has_its_place(stored, weights):
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(weights), strict=True)
    assert sorted(map(torchvision_name, paths)) == sorted(stored["names"])
    blocks = plan(REFERENCE)
    assert [b.heads for b in blocks] == reference.BLOCKS["num_heads"]
    assert [list(b.kv_pool.stride) for b in blocks if b.kv_pool] == reference.BLOCKS["stride_kv"]


def test_outputs_are_torchvisions(stored, weights):
    logits, features = reference_model(jnp.float32)(weights, reference_clip())
    assert difference(logits, stored) <= TOLERANCE
    channels = slice(reference.STORED_CHANNELS)
    for stage, block in zip(features["stages"], reference.STAGE_ENDS, strict=True):
        expected = stored[f"block{block}"][:, 1:]  # without the class token
        mine = stage.reshape(len(stage), -1, stage.shape[-1])[..., channels]
        np.testing.assert_allclose(mine, expected, rtol=0, atol=TOLERANCE * expected.std())
    np.testing.assert_allclose(
        features["tokens"][..., channels], stored["tokens"], rtol=0, atol=TOLERANCE
    )


def test_outputs_in_bfloat16_are_near_torchvisions(stored, weights):
    logits, _ = reference_model(jnp.bfloat16)(weights, reference_clip())
    assert logits.dtype == jnp.float32
    error = np.array(logits) - stored["logits"]
    assert 0 < np.sqrt((error**2).mean() / (stored["logits"] ** 2).mean()) <= 2e-2


def test_gradients_are_torchvisions(stored, weights):
    factors = jnp.array(reference.draw("loss", (reference.BATCH, reference.CLASSES)))

    def loss(params):
        return (apply(params, reference_clip(), config=REFERENCE)[0] * factors).sum()

    gradients = jax.jit(jax.grad(loss))(jax.tree.map(jnp.array, weights))
    directions = ours(lambda name, shape: reference.draw("direction/" + name, shape))
    lengths = dict(zip(stored["names"], stored["gradient_lengths"], strict=True))
    projections = dict(zip(stored["names"], stored["gradient_projections"], strict=True))
    largest = max(lengths.values())

    def compare(path, gradient, direction):
        name, gradient = torchvision_name(path), np.array(gradient, np.float64)
        # Some gradients are zero but for rounding: of a bias that the softmax cancels.
        tolerance = 1e-4 * lengths[name] + 1e-6 * largest
        assert abs(np.linalg.norm(gradient) - lengths[name]) <= tolerance, name
        assert abs((gradient * direction).sum() - projections[name]) <= tolerance, name

    jax.tree_util.tree_map_with_path(compare, gradients, directions)


def test_the_comparison_with_torchvision_notices_any_tensor(stored, weights):
    model, clip = reference_model(jnp.float32), reference_clip()
    leaves, structure = jax.tree_util.tree_flatten_with_path(weights)
    for i, (path, leaf) in enumerate(leaves):
        name = torchvision_name(path)
        noise = reference.draw("noise/" + name, leaf.shape)
        moved = [x for _, x in leaves]
        moved[i] = leaf + np.float32(0.1) * leaf.std() * noise
        logits, _ = model(structure.unflatten(moved), clip)
        if name.endswith("pool_k.norm_act.0.bias"):
            # Adds the same to all scores of a query, so the softmax cannot see it.
            assert difference(logits, stored) <= TOLERANCE
        else:
            assert difference(logits, stored) > 10 * TOLERANCE, name
