"""Sizes of clips: any frames, height and width, and errors that name the smallest clip.

All but one tiny model are only traced.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.models.functional import functional
from mvit_jax.models.plan import grids, patch_grid, smallest_clip
from mvit_jax.models.variants import VARIANTS, variant
from tests.support import drawn
from tests.support.marks import nightly, slow


def traced(config, frames, height, width):
    """Returns the shapes of logits and of each stage's grid."""
    model = functional(config)
    clip = jax.ShapeDtypeStruct((1, frames, height, width, 3), jnp.float32)
    logits, features = jax.eval_shape(model.apply, drawn.shapes(model), clip)
    return logits.shape, [stage.shape[1:4] for stage in features["stages"]]


# The others take over two seconds each, or are of the same kind.
QUICK = ("vit_b_8x8",)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.nightly) for n in VARIANTS]
)
def test_every_variant_accepts_other_sizes_and_the_smallest_clip(name):
    config = VARIANTS[name]
    smallest = smallest_clip(config)
    frames = 1 if config.patch_kernel[0] == 1 and config.frames == 1 else config.frames + 3
    ends = [sum(config.depths[: s + 1]) - 1 for s in range(len(config.depths))]
    sizes = [(config.frames, config.size, config.size), (frames, config.size + 17, 155), smallest]
    for size in sizes:
        logits, stages = traced(config, *size)
        assert logits == (1, config.num_classes)
        expected = grids(config, *size)
        assert stages == [expected[end].output for end in ends]
        assert stages[0][1:] != stages[0][:0:-1] or size != sizes[1]  # rectangles are kept
    t, h, w = smallest
    too_small = [(t, h - 1, w), (t, h, w - 1)]
    for size in too_small:
        if min(size) < 1:
            continue
        with pytest.raises(UserError) as error:
            traced(config, *size)
        assert f"is too small: this model requires at least {'x'.join(map(str, smallest))}" in str(
            error.value
        )
        assert "x".join(map(str, size)) in str(error.value) and "\n" not in str(error.value)


TINY = {"width": 8, "depths": (1, 2, 1), "frames": 4, "size": 32, "num_classes": 5}
CONFIGS = {
    "3x3x3": {},
    "no overlap": {"pool_kernel": "stride", "kv_stride": (1, 4, 4)},
    "no overlap along time": {"pool_kernel": "stride", "kv_stride": (2, 4, 4),
                                "q_stride": (2, 2, 2)},
    "no overlap, keys far apart": {"pool_kernel": "stride", "kv_stride": (1, 2, 2),
                                     "kv_adaptive": False},
    "max": {"pool_mode": "max"},
    "2 stride + 1": {"pool_kernel": "2 stride + 1"},
    "unpadded patches": {"patch_stride": (2, 8, 8), "patch_kernel": (3, 8, 8),
                         "patch_padding": (0, 0, 0), "kv_stride": (1, 2, 2)},
    "a wide patch": {"patch_kernel": (5, 9, 11), "patch_padding": (1, 1, 0)},
    "five steps along time": {"q_stride": (2, 2, 2), "kv_stride": (4, 4, 4),
                              "pool_kernel": "stride"},
}  # fmt: skip


CASES = [
    "no overlap", "unpadded patches", slow("3x3x3"), slow("five steps along time"),
    nightly("no overlap along time"), nightly("no overlap, keys far apart"), nightly("max"),
    nightly("2 stride + 1"), nightly("a wide patch"),
]  # fmt: skip


def windows_fit(config, size) -> bool:
    """Returns True if windows fit into the grid on each axis and in each block."""
    for axis in range(3):
        n = size[axis] + 2 * config.patch_padding[axis]
        if n < config.patch_kernel[axis]:
            return False
        n = (n - config.patch_kernel[axis]) // config.patch_stride[axis] + 1
        kv = config.kv_stride[axis]
        for block, stage in enumerate(s for s, d in enumerate(config.depths) for _ in range(d)):
            first = stage > 0 and block == sum(config.depths[:stage])
            q = config.q_stride[axis] if first else 1
            kv = max(kv // q, 1) if config.kv_adaptive else kv
            strides = {"q": (q, config.q_stride if first else (1, 1, 1)),
                       "kv": (kv, None)}  # fmt: skip
            fits = {which: windows(config, n, s) for which, (s, _) in strides.items()}
            if min(fits.values()) < 1:
                return False
            n = fits["q"]
    return True


def large_but_for(axis, side):
    """Returns a size that is large except along one axis."""
    size = [64, 64, 64]
    size[axis] = side
    return tuple(size)


def windows(config, n, stride) -> int:
    """Returns the number of windows of a pool with this stride on n positions."""
    if config.pool_kernel == "stride":
        return n // stride  # no padding
    return math.ceil(n / stride)  # odd windows, padded by half: one starts at every stride


@pytest.mark.parametrize("case", CASES)
def test_accepted_sizes_equal_a_brute_force_search(case):
    config = variant("mvit_b_16x4", **TINY, **CONFIGS[case])
    shortest = []
    for axis, longest in enumerate((12, 40, 40)):  # no axis depends on another
        sides = range(1, longest + 1)
        fitting = [side for side in sides if windows_fit(config, large_but_for(axis, side))]
        for side in sides:
            if side in fitting:
                grids(config, *large_but_for(axis, side))
            else:
                with pytest.raises(UserError, match="is too small"):
                    grids(config, *large_but_for(axis, side))
        shortest.append(min(fitting))
    smallest = smallest_clip(config)
    assert smallest == tuple(shortest) and windows_fit(config, smallest)
    assert traced(config, *smallest)[0] == (1, 5)
    for size in ((4, 32, 32), (5, 47, 33), (12, 37, 64)):
        if windows_fit(config, size):
            assert traced(config, *size)[0] == (1, 5)


def test_a_size_without_a_token_is_refused_with_the_smallest_size():
    config = variant("mvit_b_16x4", **TINY, **CONFIGS["no overlap"])
    smallest = smallest_clip(config)
    assert smallest[1] == smallest[2] > 8
    for size in ((4, smallest[1] - 1, 64), (4, 64, smallest[2] - 1), (4, 1, 1)):
        for function in (grids, traced):
            with pytest.raises(UserError, match=re.escape("x".join(map(str, smallest)))):
                function(config, *size)
    unpadded = variant("mvit_b_16x4", **TINY, **CONFIGS["unpadded patches"])
    with pytest.raises(UserError, match=r"a clip of 2x32x32 .* at least 3x8x8"):
        patch_grid(unpadded, 2, 32, 32)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"positions": "joint"}, marks=pytest.mark.slow),
        pytest.param({"positions": "sincos", "width": 16}, marks=pytest.mark.slow),
        {"relative_positions": "both", "positions": "none"},
    ],
)
def test_a_model_runs_on_a_rectangle_with_other_frames(fields):
    config = variant("mvit_b_16x4", **(TINY | {"depths": (1, 1), "drop_path": 0.0} | fields))
    model = functional(config)
    clip = jax.random.normal(jax.random.key(0), (2, 7, 36, 52, 3))
    logits, _ = jax.jit(model.apply)(drawn.weights(model), clip)
    assert logits.shape == (2, 5) and bool(jnp.isfinite(logits).all())
    assert float(jnp.abs(logits[0] - logits[1]).max()) > 1e-4
