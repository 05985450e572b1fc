"""Weights out: what came in goes back bit for bit, and other projects' names are met exactly."""

import dataclasses
import functools

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mvit_jax.common.errors import UserError
from mvit_jax.models.functional import functional
from mvit_jax.models.plan import plan
from mvit_jax.models.positions import sincos
from mvit_jax.models.variants import VARIANTS, variant
from mvit_jax.weights.export import TARGETS, save_torch, state_dict
from mvit_jax.weights.load import Loaded, load
from mvit_jax.weights.tensor_files import read_tensors
from tests.models.test_parity import CASES
from tests.reference import make_names
from tests.weights import foreign
from tests.weights.foreign import same

FORMS = [*CASES, *foreign.FORMS]


def asked(form: str) -> tuple[str, dict]:
    """Its variant, and what to override."""
    if form in CASES:
        return CASES[form]
    kind, _ = foreign.FORMS[form]
    return foreign.VARIANTS[kind], foreign.fields(kind)


@functools.cache
def tensors_of(form: str) -> dict[str, np.ndarray]:
    if form in CASES:
        return foreign.original(form)
    kind, how = foreign.FORMS[form]
    return foreign.slowfast(kind, **how)


@functools.cache
def loaded(form: str) -> Loaded:
    name, fields = asked(form)
    return load(tensors_of(form), name, **fields)


# There and back.


@pytest.mark.parametrize("form", FORMS)
def test_what_came_in_goes_back_bit_for_bit(form):
    """Also without an origin, where a family always gives kernels as many axes."""
    found = loaded(form)
    family = found.origin.family
    same(state_dict(found.params, found.config, family, found.origin), tensors_of(form))
    made = state_dict(found.params, found.config, family)
    if form == "v2 image, 5-D pools":
        shapes = {name: values.shape for name, values in made.items()}
        assert shapes == foreign.shapes("v2 image", pool_axes=4)  # the image models' repository
    else:
        same(made, tensors_of(form))


@pytest.mark.parametrize("form", ["torchvision_v2", "timm", "pytorchvideo", "v1 video, separate",
                                  "v2 image, 4-D pools", "v2 image, 5-D pools"])  # fmt: skip
def test_so_do_files_in_the_familys_own_format_and_in_safetensors(form, tmp_path):
    found = loaded(form)
    family = found.origin.family
    for to in (family, "safetensors"):
        done = save_torch(found.params, found.config, tmp_path / to, to, origin=found.origin)
        assert (done.family, done.tensors) == (family, len(tensors_of(form)))
        read = read_tensors(tmp_path / to)
        same(read.tensors, tensors_of(form))
        assert read.format == ("safetensors" if to == "safetensors" else "torch")
        # PySlowFast looks for its wrapper; torchvision and timm load the dict itself.
        assert read.wrapper == ("model_state" if to == "slowfast" else "")
    assert {path.name for path in tmp_path.iterdir()} == {family, "safetensors"}


@pytest.mark.parametrize(
    ("form", "to"),
    [
        ("torchvision_v1", "slowfast"), ("torchvision_v1", "pytorchvideo"),
        ("torchvision_v2", "slowfast"), ("timm", "slowfast"), ("timm_class_token", "slowfast"),
        ("timm_mlp", "slowfast"), ("pytorchvideo", "slowfast"), ("pytorchvideo", "torchvision"),
        ("pytorchvideo_image", "slowfast"), ("pytorchvideo_image", "timm"),
        ("pytorchvideo_max", "slowfast"), ("pytorchvideo_avg", "slowfast"),
        ("v1 video, separate", "torchvision"), ("v2 video", "torchvision"),
        ("v2 image, 5-D pools", "timm"), ("v1 image", "timm"), ("v1 image", "pytorchvideo"),
    ],
)  # fmt: skip
def test_through_another_family_and_back_nothing_changes(form, to):
    """A conversion from A to B, then from B to A."""
    found = loaded(form)
    there = state_dict(found.params, found.config, to)
    fields = dataclasses.asdict(found.config)
    fields |= {"separate_qkv": found.config.separate_qkv}  # other families fuse the three
    back = load(there, asked(form)[0], **fields)
    assert back.origin.family == to
    origin = found.origin
    same(state_dict(back.params, found.config, origin.family, origin), tensors_of(form))


def test_fixed_positions_are_written_for_slowfast_and_not_read():
    config = variant("mvit_b_16x4", **foreign.fields("v1 video", width=16, positions="sincos"))
    params = unflatten_dict(foreign.filled(functional(config).shapes()), sep="/")
    tensors = state_dict(params, config, "slowfast")
    table = tensors["pos_embed"]
    assert table.shape == (1, 1 + 2 * 8 * 8, 16) and not table[0, 0].any()
    np.testing.assert_allclose(
        table[0, 1:].reshape(2, 8, 8, 16), sincos((2, 8, 8), 16), rtol=0, atol=1e-7
    )
    fields = foreign.fields("v1 video", width=16, positions="sincos")
    back = load(tensors, "mvit_b_16x4", **fields)
    assert back.config == config
    same(flatten_dict(back.params, sep="/"), flatten_dict(params, sep="/"))
    assert [line.source for line in back.report.lines if line.done == "unused"] == ["pos_embed"]


# What strict loading on the other side needs, at full size.

OURS = {
    "torchvision mvit_v1_b": "mvit_b_16x4",
    "torchvision mvit_v2_s": "mvitv2_s_16x4",
    "timm mvitv2_tiny": "mvitv2_t",
    "timm mvitv2_small": "mvitv2_s",
    "timm mvitv2_base": "mvitv2_b",
    "timm mvitv2_large": "mvitv2_l",
    "timm mvitv2_base_cls": "mvitv2_b_in21k",
    "timm mvitv2_large_cls": "mvitv2_l_in21k",
    "timm mvitv2_huge_cls": "mvitv2_h_in21k",
}
QUICK = ("torchvision mvit_v1_b", "torchvision mvit_v2_s", "timm mvitv2_tiny")
LARGE = ("timm mvitv2_large", "timm mvitv2_large_cls", "timm mvitv2_huge_cls")


MODELS = [
    *QUICK,
    *(pytest.param(m, marks=pytest.mark.slow) for m in OURS if m not in (*QUICK, *LARGE)),
    *(pytest.param(m, marks=pytest.mark.nightly) for m in LARGE),
]


@pytest.mark.parametrize("model", MODELS)
def test_full_size_models_have_exactly_the_other_sides_names_and_shapes(model):
    """And theirs are taken whole; but for the largest, whose 80 blocks in float32 are 2.7 GB."""
    family, config = model.split()[0], VARIANTS[OURS[model]]
    # One byte a number, and that one byte for all of them, since only shapes are compared.
    flat = {path: np.broadcast_to(np.int8(0), s) for path, s in functional(config).shapes().items()}
    made = state_dict(unflatten_dict(flat, sep="/"), config, family)
    assert {name: values.shape for name, values in made.items()} == make_names.stored()[model]
    if "huge" not in model:
        found = load(made, OURS[model])
        assert found.report.ok and found.origin.family == family
        assert {line.source for line in found.report.lines} == set(made)
        assert [b.kv_pool for b in plan(found.config)] == [b.kv_pool for b in plan(config)]
        assert functional(found.config).shapes() == functional(config).shapes()


# What a family cannot hold.

V1, V2 = ("mvit_b_16x4", "v1 video"), ("mvitv2_s_16x4", "v2 video")
IMAGE, IMAGE2 = ("mvit_b16", "v1 image"), ("mvitv2_s", "v2 image")


@pytest.mark.parametrize(
    ("to", "kind", "changes", "words"),
    [
        ("slowfast", V1, {"skip": "plain"}, ["skip is plain"]),
        ("slowfast", V1, {"growth": 4}, ["growth is 4"]),
        ("torchvision", V1, {"class_token": False}, ["class_token is False"]),
        ("torchvision", V1, {"positions": "space"}, ["positions is space"]),
        ("torchvision", V2, {"relative_positions": "space"}, ["relative_positions is space"]),
        ("torchvision", V1, {"pool_mode": "max"}, ["pool_mode is max, torchvision has conv"]),
        ("torchvision", V1, {"pool_first": True}, ["pool_first is True"]),
        ("torchvision", V1, {"mean_pooling": True}, ["mean_pooling is True"]),
        ("torchvision", V1, {"stem_norm": True}, ["no tensor for stem_norm/scale",
                                                  "no tensor for stem_norm/bias"]),
        ("torchvision", IMAGE, {}, ["positions is joint", "no tensor for positions/joint"]),
        ("pytorchvideo", V2, {}, ["expand is attention",
                                  "no tensor for blocks/3/attn/relative/height"]),
        ("pytorchvideo", V1, {"skip": "none"}, ["skip is none"]),
        ("timm", V1, {}, ["frames is 4, timm has 1", "positions is separate",
                          "no tensor for positions/time"]),
        ("timm", V2, {}, ["frames is 4", "no tensor for blocks/0/attn/relative/time"]),
        ("timm", IMAGE, {"pool_first": True}, ["pool_first is True"]),
        ("timm", IMAGE2, {"mean_pooling": True}, ["mean_pooling is True"]),
        ("timm", IMAGE2, {"stem_norm": True}, ["no tensor for stem_norm"]),
        ("safetensors", V1, {"skip": "plain"}, ["slowfast cannot hold this model"]),
    ],
)  # fmt: skip
def test_what_a_family_cannot_hold_is_refused_with_every_reason(to, kind, changes, words, tmp_path):
    name, form = kind
    config = variant(name, **foreign.fields(form, **changes))
    params = unflatten_dict(
        {p: np.zeros(s, np.float32) for p, s in functional(config).shapes().items()}, sep="/"
    )
    with pytest.raises(UserError) as error:
        save_torch(params, config, tmp_path / "out", to)
    message = str(error.value)
    assert "cannot hold this model: " in message and "\n" not in message
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


def test_a_target_that_does_not_exist_is_refused(tmp_path):
    found = loaded("timm")
    with pytest.raises(UserError, match=f"can go to {', '.join(TARGETS)}, not to 'onnx'"):
        save_torch(found.params, found.config, tmp_path / "out", "onnx")


def test_what_the_other_side_computes_otherwise_is_said(tmp_path):
    """Norms after pools, in PyTorchVideo 0.1; and whether the class token's query is added."""
    found = loaded("pytorchvideo")
    assert found.config.pool_norm_eps == 1e-5
    done = save_torch(found.params, found.config, tmp_path / "a", "torchvision")
    assert len(done.notes) == 1 and "eps 1e-05 here" in done.notes[0]
    found = loaded("timm_class_token")
    done = save_torch(found.params, found.config, tmp_path / "b", "slowfast")
    assert len(done.notes) == 1 and "residual pooling" in done.notes[0]
    found = loaded("torchvision_v2")
    assert not save_torch(found.params, found.config, tmp_path / "c", "torchvision").notes
