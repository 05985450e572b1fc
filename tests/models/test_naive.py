"""The model against the naive one, for options that only PySlowFast has.

`naive.py` is compared with the stored outputs of torchvision, timm and PyTorchVideo first.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.functional import functional
from mvit_jax.weights.load import load
from tests.models import naive
from tests.models.naive import IMAGE, Settings, settings, stages, v2
from tests.reference import make_outputs as reference

# The naive model against the stored outputs.

TIMM = {"blocks": stages((1, 2, 1), attention=True, kernel=(1, 3, 3), pool_queries=True),
        "grid": (1, 8, 8), "patch": IMAGE["patch"], "relative": "space", "residual": "all",
        "positions": "none"}  # fmt: skip
V2 = {"blocks": stages((1, 2, 1), attention=True, pool_queries=True), "positions": "none",
      "relative": "both", "residual": "grid"}  # fmt: skip
PTV = {"blocks": stages((1, 2, 1)), "grid": (2, 8, 8), "separate": True, "pool_norm_eps": 1e-5}
STRIDE = stages((1, 2, 1), kernel=None)
ANCHORS = {
    "torchvision_v1": Settings(blocks=stages((1, 2, 1)), grid=(2, 7, 7)),
    "torchvision_v2": Settings(**V2, grid=(2, 8, 8)),
    "torchvision_v2_44": Settings(**V2, grid=(3, 11, 11)),
    "torchvision_v2_60": Settings(**V2, grid=(2, 15, 15)),
    "timm": Settings(**TIMM, class_token=False),
    "timm_class_token": Settings(**TIMM),
    "timm_mlp": Settings(
        **TIMM | {"blocks": stages((1, 2, 1), kernel=(1, 3, 3), pool_queries=True)},
        class_token=False,
    ),
    "timm_absolute": Settings(**TIMM | {"positions": "joint"}),
    "pytorchvideo": Settings(**PTV),
    "pytorchvideo_stride": Settings(**PTV | {"blocks": STRIDE}),
    "pytorchvideo_pool_first": Settings(**PTV, pool_first=True, stem_norm=True, positions="joint"),
    "pytorchvideo_max": Settings(**PTV | {"blocks": STRIDE}, mode="max", class_token=False),
    "pytorchvideo_avg": Settings(**PTV | {"blocks": STRIDE}, mode="avg", qkv_bias=False),
    "pytorchvideo_image": Settings(
        **PTV | {"grid": (1, 8, 8), "blocks": stages((1, 2, 1), kernel=(1, 3, 3))},
        patch=TIMM["patch"],
        positions="joint",
    ),
}

# Substitutions from each format's names to PySlowFast's, applied in order.
NAMES = {
    "torchvision": [
        (r"^conv_proj", "patch_embed.proj"),
        (r"^pos_encoding\.class_token", "cls_token"),
        (r"^pos_encoding\.(spatial|temporal|class)_pos", r"pos_embed_\1"),
        (r"attn\.project\.0", "attn.proj"),
        (r"\.project\.", ".proj."),
        (r"pool_(.)\.norm_act\.0", r"norm_\1"),
        (r"pool_(.)\.pool", r"pool_\1"),
        (r"mlp\.0", "mlp.fc1"),
        (r"mlp\.3", "mlp.fc2"),
        (r"^head\.1", "head.projection"),
    ],
    "timm": [
        (r"^stages\.0\.blocks\.0", "blocks.0"),
        (r"^stages\.1\.blocks\.0", "blocks.1"),
        (r"^stages\.1\.blocks\.1", "blocks.2"),
        (r"^stages\.2\.blocks\.0", "blocks.3"),
        (r"shortcut_proj_(attn|mlp)", "proj"),
        (r"^head\.fc", "head.projection"),
    ],
    "pytorchvideo": [
        (r"^patch_embed\.patch_model", "patch_embed.proj"),
        (r"^cls_positional_encoding\.", ""),
        (r"^norm_patch_embed", "norm_stem"),
        (r"^norm_embed", "norm"),
        (r"^head\.proj", "head.projection"),
    ],
}


@pytest.mark.parametrize("case", ANCHORS)
def test_the_naive_model_equals_the_stored_outputs(case):
    settings, (theirs, outputs) = ANCHORS[case], reference.stored(case)
    shapes = naive.shapes(settings)
    state = {}
    for name, shape in theirs.items():
        ours = functools.reduce(
            lambda n, rule: re.sub(rule[0], rule[1], n), NAMES[case.split("_")[0]], name
        )
        state[ours] = reference.draw_weight(name, shape).reshape(shapes[ours])
    assert state.keys() == shapes.keys()
    clips = reference.clip(case)
    for clip, expected in zip(clips, outputs["logits"], strict=True):
        logits = naive.forward(state, settings, clip.reshape(3, -1, *clip.shape[-2:]))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


# Our model against the naive one, in float64.

FRAMES, SIZE = 4, 24  # 2 x 6 x 6 tokens
BASE = {"frames": FRAMES, "size": SIZE, "num_classes": 5, "width": 8, "depths": (1, 1),
        "kv_stride": (1, 2, 2)}  # fmt: skip
OURS_V2 = {"positions": "none", "relative_positions": "both", "residual_pool": "grid",
           "full_q_pool": True, "expand": "attention"}  # fmt: skip


NO_KERNEL = {"kernel": None}
CASES = {  # our fields, the naive model's settings, and a clip size that is not nominal
    "v1": ({}, settings()),
    "separate qkv": ({"separate_qkv": True}, settings(separate=True)),
    "v2": (OURS_V2, v2()),
    "v2, separate qkv": (OURS_V2 | {"separate_qkv": True}, v2(separate=True)),
    "pool first": ({"pool_first": True}, settings(pool_first=True)),
    "pool first, v2": (OURS_V2 | {"pool_first": True}, v2(pool_first=True)),
    "pool first, unshared": (
        {"pool_first": True, "pool_mode": "conv_unshared"},
        settings(pool_first=True, mode="conv_unshared"),
    ),
    "pool first, unshared, v2": (
        OURS_V2 | {"pool_first": True, "pool_mode": "conv_unshared"},
        v2(pool_first=True, mode="conv_unshared"),
    ),
    "pool first, max": (
        {"pool_first": True, "pool_mode": "max"},
        settings(NO_KERNEL, pool_first=True, mode="max"),
    ),
    "max, v2": (OURS_V2 | {"pool_mode": "max"}, v2(blocks=NO_KERNEL, mode="max")),
    "avg, v2": (OURS_V2 | {"pool_mode": "avg"}, v2(blocks=NO_KERNEL, mode="avg")),
    "relative time alone": (OURS_V2 | {"relative_positions": "time"}, v2(relative="time")),
    "relative space alone": (OURS_V2 | {"relative_positions": "space"}, v2(relative="space")),
    "absolute and relative": (
        {"relative_positions": "both", "positions": "joint"},
        settings(relative="both", positions="joint"),
    ),
    "v2 without class token": (OURS_V2 | {"class_token": False}, v2(class_token=False)),
    "residual of all": (OURS_V2 | {"residual_pool": "all"}, v2(residual="all")),
    "maskfeat": (
        OURS_V2 | {"expand": "mlp", "mean_pooling": True},
        v2(blocks={"attention": False}, mean_pooling=True),
    ),
    "mean pooling without class token": (
        {"mean_pooling": True, "class_token": False},
        settings(mean_pooling=True, class_token=False),
    ),
    "sincos": (
        {"positions": "sincos", "width": 16},
        Settings(
            blocks=tuple(
                b._replace(width=2 * b.width, attention=2 * b.attention, out=2 * b.out)
                for b in settings().blocks
            ),
            grid=(2, 6, 6),
            positions="sincos",
        ),
    ),
    "stem norm": ({"stem_norm": True}, settings(stem_norm=True)),
    "no bias": ({"qkv_bias": False}, settings(qkv_bias=False)),
    "plain skip": ({"skip": "plain"}, settings(skip="plain")),
    "plain skip, v2": (OURS_V2 | {"skip": "plain"}, v2(skip="plain")),
    "no skip": ({"skip": "none"}, settings(skip="none")),
    "no skip, v2": (OURS_V2 | {"skip": "none"}, v2(skip="none")),
    "strides not adaptive": ({"kv_adaptive": False}, settings({"adaptive": False})),
    "no growth": (OURS_V2 | {"growth": 1}, v2(blocks={"growth": 1})),
    "growth of 3": ({"growth": 3}, settings({"growth": 3})),
    "strides along time": (
        OURS_V2 | {"q_stride": (2, 2, 2), "kv_stride": (2, 4, 4)},
        v2(blocks={"q": (2, 2, 2), "kv": (2, 4, 4)}),
    ),
    "kernels of stride + 1": ({"pool_kernel": "stride + 1"}, settings(NO_KERNEL)),
    "kernels flat in time": (
        OURS_V2 | {"pool_kernel": (1, 3, 3)},
        v2(blocks={"kernel": (1, 3, 3)}),
    ),
    "rectangle": ({}, settings(), (6, 28, 20)),
    "rectangle, joint": ({"positions": "joint"}, settings(positions="joint"), (7, 20, 28)),
    "rectangle, v2": (OURS_V2, v2(), (6, 36, 20)),
    "one frame": ({}, settings(), (1, 24, 24)),
    "one frame, v2": (OURS_V2, v2(), (1, 24, 24)),
    "one pixel": ({}, settings(), (1, 1, 1)),
    "one pixel, v2": (OURS_V2, v2(), (1, 1, 1)),
    "image": ({"frames": 1}, settings({"kernel": (1, 3, 3)}, **IMAGE)),
    "distances that depend on rounding": (  # 39 queries, 10 keys
        OURS_V2 | {"frames": 1, "size": 156, "kv_stride": (1, 4, 4), "relative_positions": "space"},
        v2(
            blocks={"kernel": (1, 3, 3), "kv": (1, 4, 4)},
            **IMAGE | {"grid": (1, 39, 39), "positions": "none"},
            relative="space",
        ),
        (1, 156, 156),
    ),
    "video for an image model": (
        {"frames": 1},
        settings({"kernel": (1, 3, 3)}, **IMAGE),
        (3, 20, 28),
    ),
}


def vit(**options):
    """Returns one stage without pooling, on patches that do not overlap."""
    patch = (1, 4, 4), (1, 4, 4), (0, 0, 0)
    fields = dict(zip(("patch_kernel", "patch_stride", "patch_padding"), patch, strict=True))
    fields |= {"heads": 2, "depths": (2,), "pool_kernel": "stride + 1", "kv_stride": (1, 1, 1)}
    blocks = (naive.Block(8, 8, 8, 2),) * 2
    return fields | options, Settings(blocks=blocks, grid=(4, 6, 6), patch=patch, **options)


VITS = {
    f"vit, {positions}, {token}": vit(positions=positions, class_token=token)
    for positions in ("none", "space", "separate", "joint")
    for token in (True, False)
}
CASES |= VITS
QUICK = {
    "vit, joint, True", "vit, separate, False", "vit, none, True",
    "pool first, unshared, v2", "max, v2", "relative space alone", "no skip",
    "strides along time", "rectangle, joint", "one pixel, v2",
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_the_model_equals_the_naive_one(case):
    compare(*CASES[case])


def test_sincos_embeddings_are_not_required_in_the_file():
    compare(*CASES["sincos"], without=("pos_embed",))


def compare(fields, plain, *size, without=()):
    variant = "mvit_b16" if fields.get("frames") == 1 else "mvit_b_16x4"
    shapes = naive.shapes(plain)
    state = {n: reference.draw_weight(n, s) for n, s in shapes.items() if n not in without}
    loaded = load(state, variant, **BASE | fields)
    frames, height, width = size[0] if size else (FRAMES if variant != "mvit_b16" else 1, 24, 24)
    clip = reference.draw("clip", (3, frames, height, width))
    expected = naive.forward(state, plain, clip)
    with jax.enable_x64(True):
        run = jax.jit(functional(loaded.config, dtype=jnp.float64).apply)
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), loaded.params)
        logits, _ = run(params, np.moveaxis(clip, 0, -1)[None].astype(np.float64))
    np.testing.assert_allclose(np.asarray(logits)[0], expected, rtol=0, atol=1e-12)
    assert np.std(expected) > 0.1
