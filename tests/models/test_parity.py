"""The model against the originals: classes of torchvision, timm and PyTorchVideo.

At tiny sizes, with weights drawn by name; `tests/reference/make_outputs.py` made the outputs. The
weights are imported, so that the importer's names and shapes are tested too.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mvit_jax.models.functional import functional
from mvit_jax.models.plan import MViTConfig, grids, plan
from mvit_jax.weights.load import load
from tests.reference import make_outputs as reference

TOLERANCE = 1e-4  # largest difference over standard deviation

TINY = {"width": 8, "depths": (1, 2, 1)}
VIDEO = TINY | {"frames": 4, "size": 32, "kv_stride": (1, 4, 4)}
IMAGE = TINY | {"size": 32}

CASES = {  # the variant, and the fields to override
    "torchvision_v1": ("mvit_b_16x4", VIDEO | {"size": 28}),
    "torchvision_v2": ("mvitv2_s_16x4", VIDEO),
    "torchvision_v2_44": ("mvitv2_s_16x4", VIDEO | {"frames": 6, "size": 44}),
    "torchvision_v2_60": ("mvitv2_s_16x4", VIDEO | {"size": 60}),
    "torchvision_v2_156": ("mvitv2_s_16x4", VIDEO | {"frames": 2, "size": 156}),
    "timm": ("mvitv2_t", IMAGE),
    "timm_class_token": ("mvitv2_b_in21k", IMAGE),
    "timm_mlp": ("mvitv2_l", IMAGE | {"heads": 1}),
    "timm_absolute": ("mvitv2_b_in21k", IMAGE | {"positions": "joint"}),
    "pytorchvideo": ("mvit_b_16x4", VIDEO),
    "pytorchvideo_stride": ("mvit_b_16x4", VIDEO),
    "pytorchvideo_pool_first": (
        "mvit_b_16x4",
        VIDEO | {"pool_first": True, "stem_norm": True, "positions": "joint"},
    ),
    "pytorchvideo_max": ("mvit_b_16x4", VIDEO | {"pool_mode": "max", "class_token": False}),
    "pytorchvideo_avg": ("mvit_b_16x4", VIDEO | {"pool_mode": "avg", "qkv_bias": False}),
    "pytorchvideo_image": ("mvit_b16", IMAGE),
}
SOME = ("torchvision_v1", "torchvision_v2", "timm")  # one of each kind of architecture


def cases(names, quick=(), slow=()):
    """Marks all other cases nightly: a video model takes 3 s to compile, its gradients 8 s."""
    marks = dict.fromkeys(slow, pytest.mark.slow)
    return pytest.mark.parametrize(
        "case",
        [
            n if n in quick else pytest.param(n, marks=marks.get(n, pytest.mark.nightly))
            for n in names
        ],
    )


QUICK = {
    "torchvision_v1", "torchvision_v2_44", "timm_mlp", "pytorchvideo_pool_first",
    "pytorchvideo_max",
}  # fmt: skip


@functools.cache
def stored(case):
    return reference.stored(case)


def imported(case, draw):
    """Returns the case's tensors, drawn in the original's shapes and imported."""
    shapes, _ = stored(case)
    variant, overrides = CASES[case]
    return load({n: draw(n, s) for n, s in shapes.items()}, variant, **overrides)


@functools.cache
def weights(case):
    return imported(case, reference.draw_weight)


def clip(case):
    """Returns the case's clip, channels last."""
    return jnp.array(np.moveaxis(reference.clip(case), 1, -1))


@functools.cache
def model(case, dtype=jnp.float32):
    """Returns the compiled model of a case, as a function of parameters."""
    run = jax.jit(functional(weights(case).config, dtype=dtype).apply)
    return lambda params: run(params, clip(case))


def difference(ours, theirs) -> float:
    return np.abs(np.array(ours) - theirs).max() / theirs.std()


@pytest.mark.parametrize("case", CASES)
def test_the_architecture_is_inferred_from_the_originals_tensors(case):
    loaded, (shapes, _) = weights(case), stored(case)
    assert loaded.origin.format == case.split("_")[0] and loaded.report.ok
    # Every tensor of the original is used, and only joint positional embeddings twice.
    sources = [line.source for line in loaded.report.lines]
    assert set(sources) == set(shapes)
    repeated = {s for s in sources if sources.count(s) > 1}
    assert repeated <= {"pos_embed", "cls_positional_encoding.pos_embed"}
    config: MViTConfig = loaded.config
    sizes = grids(config, config.frames, config.size, config.size)
    ends = [sizes[i].output for i in reference.STAGE_ENDS]
    _, outputs = stored(case)
    for end, grid in zip(reference.STAGE_ENDS, ends, strict=True):
        assert outputs[f"block{end}"].shape[1] == math.prod(grid) + config.class_token


@cases(CASES, quick=QUICK, slow=CASES)
def test_outputs_equal_the_originals(case):
    logits, features = model(case)(weights(case).params)
    _, theirs = stored(case)
    assert difference(logits, theirs["logits"]) <= TOLERANCE
    for stage, block in zip(features["stages"], reference.STAGE_ENDS, strict=True):
        ours = reference.probe(stage.reshape(len(stage), -1, stage.shape[-1]))
        assert difference(ours, theirs[f"block{block}"][:, -ours.shape[1] :]) <= TOLERANCE
    assert difference(reference.probe(features["tokens"]), theirs["tokens"]) <= TOLERANCE


@cases(CASES, slow=["torchvision_v1", "timm"])
def test_gradients_equal_the_originals(case):
    shapes, theirs = stored(case)
    factors = jnp.array(reference.draw("loss", (reference.BATCH, reference.CLASSES)))

    def loss(params):
        return (functional(weights(case).config).apply(params, clip(case))[0] * factors).sum()

    gradients = jax.jit(jax.grad(loss))(jax.tree.map(jnp.array, weights(case).params))
    ours = by_name(case, flatten_dict(gradients, sep="/"))
    # Entries have the same order, since the importer does not change values.
    directions = imported(case, lambda name, shape: reference.draw("direction/" + name, shape))
    directions = by_name(case, flatten_dict(directions.params, sep="/"))
    largest = theirs["gradient_lengths"].max()
    for name, norm, projection in zip(
        shapes, theirs["gradient_lengths"], theirs["gradient_projections"], strict=True
    ):
        # Some gradients are zero but for rounding: those of a bias that the softmax cancels.
        tolerance = 1e-4 * norm + 1e-6 * largest
        assert abs(np.linalg.norm(ours[name]) - norm) <= tolerance, name
        assert abs(ours[name] @ directions[name] - projection) <= tolerance, name


def by_name(case, params) -> dict[str, np.ndarray]:
    """Returns our tensors, flat, concatenated by the original's tensor name."""
    parts = defaultdict(list)
    for line in weights(case).report.lines:
        parts[line.source].append(np.array(params[line.path], np.float64).ravel())
    return {name: np.concatenate(values) for name, values in parts.items()}


@cases(SOME, slow=["timm"])
def test_outputs_in_bfloat16_agree_with_the_originals(case):
    logits, _ = model(case, jnp.bfloat16)(weights(case).params)
    assert logits.dtype == jnp.float32
    _, theirs = stored(case)
    error = np.array(logits) - theirs["logits"]
    assert 0 < np.sqrt((error**2).mean() / (theirs["logits"] ** 2).mean()) <= 2e-2


@pytest.mark.slow
def test_the_comparison_detects_another_rounding_of_distances():
    case = "torchvision_v2_156"
    config = dataclasses.replace(weights(case).config, relative_distances="slowfast")
    logits, _ = jax.jit(functional(config).apply)(weights(case).params, clip(case))
    assert difference(logits, stored(case)[1]["logits"]) > 10 * TOLERANCE


def without_effect(path: str, config: MViTConfig) -> bool:
    """Returns True if the logits do not depend on a tensor.

    The bias of the norm after K's pooling adds a constant to all scores of a query, which the
    softmax cancels. A head that reads the class token uses only that token's query of the last
    block, which has neither pooling nor relative positions.
    """
    if path.endswith("/pool_k/norm/bias"):
        return True
    last = f"blocks/{len(plan(config)) - 1}/attn"
    return config.class_token and bool(re.match(rf"{last}/(pool_q/kernel|relative/)", path))


@cases(SOME, quick=SOME)
def test_the_comparison_detects_a_change_of_any_tensor(case):
    loaded, (_, theirs) = weights(case), stored(case)
    leaves = flatten_dict(loaded.params, sep="/")
    unaffected = 0
    for path, leaf in leaves.items():
        noise = reference.draw("noise/" + path, leaf.shape)
        # Noise of a fifth of the tensor's deviation changes the logits by 15 tolerances or more;
        # a tenth changes them by only 7.3 for one bias of timm's (blocks/0/norm2).
        perturbed = leaf + np.float32(0.2) * leaf.std() * noise
        logits, _ = model(case)(unflatten_dict(leaves | {path: perturbed}, sep="/"))
        if without_effect(path, loaded.config):
            unaffected += 1
            assert difference(logits, theirs["logits"]) <= TOLERANCE, path
        else:
            assert difference(logits, theirs["logits"]) > 10 * TOLERANCE, path
    assert unaffected == {"torchvision_v1": 4 + 1, "torchvision_v2": 4 + 4, "timm": 4}[case]
