"""Known mistakes of MViT ports that no comparison with another model shows."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mvit_jax.common.errors import UserError
from mvit_jax.models.cost import cost
from mvit_jax.models.functional import Functional, functional
from mvit_jax.models.plan import grids, plan
from mvit_jax.models.variants import variant
from mvit_jax.weights.adapt import INFLATIONS
from mvit_jax.weights.load import load
from tests.models import naive
from tests.models.naive import IMAGE, v2
from tests.reference.make_outputs import draw, draw_weight

BASE = {"frames": 4, "size": 24, "num_classes": 5, "width": 8, "depths": (1, 1),
        "kv_stride": (1, 2, 2)}  # fmt: skip


def state_of(settings):
    return {name: draw_weight(name, shape) for name, shape in naive.shapes(settings).items()}


def test_trap_02_biases_start_at_zero_and_convolutions_as_in_pytorch():
    """Convolutions are uniform within 1 / sqrt(fan in).

    All others are N(0, 0.02), truncated at two standard deviations.
    """
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


def test_trap_06_relative_positions_at_312_pixels_are_interpolated():
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


IMAGE_V2 = v2(
    blocks={"kernel": (1, 3, 3)},
    relative="space",
    class_token=False,
    **IMAGE | {"positions": "none"},
)


def test_trap_13_centre_inflation_of_equal_frames_equals_the_image():
    """Without a class token all frames have the image's tokens.

    Attention to copies of the same keys equals attention to one. The other two inflations depend on
    the padding at the first frame.
    """
    state, image = state_of(IMAGE_V2), draw("image", (1, 1, 24, 24, 3))
    expected = naive.forward(state, IMAGE_V2, np.moveaxis(image[0], -1, 0))
    run, differences = jax.jit(Functional.apply, static_argnums=0), {}
    for inflation in INFLATIONS:
        loaded = load(state, "mvitv2_s_16x4", inflate=inflation, **BASE, class_token=False)
        logits, _ = run(functional(loaded.config), loaded.params, jnp.repeat(image, 4, axis=1))
        differences[inflation] = np.abs(logits[0] - expected).max()
    assert differences["centre"] < 1e-5
    assert differences["mean"] > 1e-2 and differences["repeat"] > 1e-2


def test_trap_14_two_architectures_are_called_large():
    other = variant("mvitv2_l_in21k", num_classes=1000, class_token=False)
    assert cost(other).parameters == cost(variant("mvitv2_l", expand="attention")).parameters
    # The file of one is refused as the other.
    fields = {"size": 24, "width": 8, "heads": 1, "depths": (1, 1), "kv_stride": (1, 2, 2)}
    for grown, name in ((True, "mvitv2_l"), (False, "mvitv2_l_in21k")):
        blocks = {"kernel": (1, 3, 3), "attention": grown}
        same = {"relative": "space", "class_token": name.endswith("21k")}
        state = state_of(v2(blocks=blocks, **same, **IMAGE | {"positions": "none"}))
        with pytest.raises(UserError, match="expand"):
            load(state, name, **fields)


def test_trap_15_maskfeat_is_a_hybrid_of_mvit_and_mvitv2():
    config = variant("maskfeat_s_16x4")
    assert round(cost(config).multiply_adds / 1e9) == 71
    assert {b.attention_width == b.width for b in plan(config)} == {True}  # channels grow in MLPs
    relative = variant("mvitv2_s_16x4")
    same = {f.name for f in dataclasses.fields(config)} - {
        "expand", "mean_pooling", "dropout", "drop_path",
    }  # fmt: skip
    assert all(getattr(config, name) == getattr(relative, name) for name in same)
