"""Export of weights: round trips bit for bit, and names of other projects' full-size models."""

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


def variant_and_fields(form: str) -> tuple[str, dict]:
    """Returns the variant of a case and the fields to override."""
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
    name, fields = variant_and_fields(form)
    return load(tensors_of(form), name, **fields)


# Round trips.


@pytest.mark.parametrize("form", FORMS)
def test_exported_tensors_equal_the_imported_ones_bit_for_bit(form):
    """Also without an origin, for which a format has a fixed number of kernel axes."""
    result = loaded(form)
    format = result.origin.format
    same(state_dict(result.params, result.config, format, result.origin), tensors_of(form))
    tensors = state_dict(result.params, result.config, format)
    if form == "v2 image, 5-D pools":
        shapes = {name: values.shape for name, values in tensors.items()}
        assert shapes == foreign.shapes("v2 image", pool_axes=4)  # the image models' repository
    else:
        same(tensors, tensors_of(form))


@pytest.mark.parametrize("form", ["torchvision_v2", "timm", "pytorchvideo", "v1 video, separate",
                                  "v2 image, 4-D pools", "v2 image, 5-D pools"])  # fmt: skip
def test_files_of_torch_and_safetensors_hold_the_imported_tensors(form, tmp_path):
    result = loaded(form)
    format = result.origin.format
    for to in (format, "safetensors"):
        saved = save_torch(result.params, result.config, tmp_path / to, to, origin=result.origin)
        assert (saved.format, saved.tensors) == (format, len(tensors_of(form)))
        stored = read_tensors(tmp_path / to)
        same(stored.tensors, tensors_of(form))
        assert stored.format == ("safetensors" if to == "safetensors" else "torch")
        # PySlowFast loads from a wrapper; torchvision and timm load the dict itself.
        assert stored.wrapper == ("model_state" if to == "slowfast" else "")
    assert {path.name for path in tmp_path.iterdir()} == {format, "safetensors"}


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
def test_a_round_trip_through_another_format_is_exact(form, to):
    result = loaded(form)
    exported = state_dict(result.params, result.config, to)
    fields = dataclasses.asdict(result.config)
    fields |= {"separate_qkv": result.config.separate_qkv}  # other formats fuse them
    back = load(exported, variant_and_fields(form)[0], **fields)
    assert back.origin.format == to
    origin = result.origin
    same(state_dict(back.params, result.config, origin.format, origin), tensors_of(form))


def test_sincos_embeddings_are_exported_to_slowfast_and_not_loaded():
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


# Strict loading by other projects, at full size.

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
def test_full_size_exports_have_the_names_and_shapes_of_the_originals(model):
    """Loads them back too, but for the largest, whose 80 blocks in float32 are 2.7 GB."""
    format, config = model.split()[0], VARIANTS[OURS[model]]
    # Only shapes are compared: all arrays are broadcast from one byte.
    flat = {path: np.broadcast_to(np.int8(0), s) for path, s in functional(config).shapes().items()}
    tensors = state_dict(unflatten_dict(flat, sep="/"), config, format)
    assert {name: values.shape for name, values in tensors.items()} == make_names.stored()[model]
    if "huge" not in model:
        result = load(tensors, OURS[model])
        assert result.report.ok and result.origin.format == format
        assert {line.source for line in result.report.lines} == set(tensors)
        assert [b.kv_pool for b in plan(result.config)] == [b.kv_pool for b in plan(config)]
        assert functional(result.config).shapes() == functional(config).shapes()


# Models that a format cannot hold.

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
        ("torchvision", V1, {"pool_mode": "max"}, ["pool_mode is max, but must be conv"]),
        ("torchvision", V1, {"pool_first": True}, ["pool_first is True"]),
        ("torchvision", V1, {"mean_pooling": True}, ["mean_pooling is True"]),
        ("torchvision", V1, {"stem_norm": True}, ["stem_norm/scale has no counterpart",
                                                  "stem_norm/bias has no counterpart"]),
        ("torchvision", IMAGE, {}, ["positions is joint", "positions/joint has no counterpart"]),
        ("pytorchvideo", V2, {}, ["expand is attention",
                                  "blocks/3/attn/relative/height has no counterpart"]),
        ("pytorchvideo", V1, {"skip": "none"}, ["skip is none"]),
        ("timm", V1, {}, ["frames is 4, but must be 1", "positions is separate",
                          "positions/time has no counterpart"]),
        ("timm", V2, {}, ["frames is 4", "blocks/0/attn/relative/time has no counterpart"]),
        ("timm", IMAGE, {"pool_first": True}, ["pool_first is True"]),
        ("timm", IMAGE2, {"mean_pooling": True}, ["mean_pooling is True"]),
        ("timm", IMAGE2, {"stem_norm": True}, ["stem_norm/bias has no counterpart"]),
        ("safetensors", V1, {"skip": "plain"}, ["slowfast cannot hold this model"]),
    ],
)  # fmt: skip
def test_a_model_that_a_format_cannot_hold_is_refused_with_all_reasons(
    to, kind, changes, words, tmp_path
):
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


def test_an_unknown_target_is_refused(tmp_path):
    result = loaded("timm")
    with pytest.raises(UserError, match=f"can be exported to {', '.join(TARGETS)}, not to 'onnx'"):
        save_torch(result.params, result.config, tmp_path / "out", "onnx")


def test_differences_in_computation_are_noted(tmp_path):
    """Norms after pools in PyTorchVideo 0.1; residual pooling of the class token."""
    result = loaded("pytorchvideo")
    assert result.config.pool_norm_eps == 1e-5
    saved = save_torch(result.params, result.config, tmp_path / "a", "torchvision")
    assert len(saved.notes) == 1 and "eps 1e-05 in this model" in saved.notes[0]
    result = loaded("timm_class_token")
    saved = save_torch(result.params, result.config, tmp_path / "b", "slowfast")
    assert len(saved.notes) == 1 and "residual pooling" in saved.notes[0]
    result = loaded("torchvision_v2")
    assert not save_torch(result.params, result.config, tmp_path / "c", "torchvision").notes
