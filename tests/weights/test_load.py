"""Checkpoints in: every form of PySlowFast's files gives the right values, and all that is wrong
with a state dict is said at once. The originals of the other families are in test_parity.py."""

import contextlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import mvit_jax
from mvit_jax.common.errors import UserError
from mvit_jax.models import mvit
from mvit_jax.models.functional import functional, params_of
from mvit_jax.models.variants import VARIANTS, variant
from mvit_jax.weights import export
from mvit_jax.weights import load as loading
from mvit_jax.weights.load import Loaded, load
from mvit_jax.weights.report import WeightsError
from mvit_jax.weights.tensor_files import write_safetensors, write_torch
from tests.reference import make_outputs as originals
from tests.weights import foreign

KIND = "v1 video"


def loaded(tensors, kind=KIND, **overrides) -> Loaded:
    return load(tensors, foreign.VARIANTS[kind], **foreign.fields(kind, **overrides))


def params(tensors, kind=KIND, **overrides) -> dict[str, np.ndarray]:
    return flatten_dict(loaded(tensors, kind, **overrides).params, sep="/")


def by_hand(tensors: dict[str, np.ndarray], separate: bool) -> dict[str, np.ndarray]:
    """What a PySlowFast state dict is in our names and shapes."""
    made: dict[str, np.ndarray] = {}
    for i in range(4):
        theirs, ours = f"blocks.{i}.", f"blocks/{i}/"
        for name in ("norm1", "norm2"):
            made[ours + name + "/scale"] = tensors[theirs + name + ".weight"]
            made[ours + name + "/bias"] = tensors[theirs + name + ".bias"]
        linear = {"attn.proj": "attn/proj", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
        linear |= {f"attn.{x}": f"attn/{x}" for x in ("q", "k", "v") if separate}
        linear |= {} if separate else {"attn.qkv": "attn/qkv"}
        linear |= {"proj": "proj"} if theirs + "proj.weight" in tensors else {}
        for name, path in linear.items():
            made[ours + path + "/kernel"] = np.einsum("oi->io", tensors[f"{theirs}{name}.weight"])
            made[ours + path + "/bias"] = tensors[f"{theirs}{name}.bias"]
        for x in "qkv":
            if theirs + f"attn.pool_{x}.weight" not in tensors:
                continue
            taps = tensors[theirs + f"attn.pool_{x}.weight"]
            taps = taps[:, :, None] if taps.ndim == 4 else taps
            made[ours + f"attn/pool_{x}/kernel"] = np.einsum("cithw->thwc", taps)
            made[ours + f"attn/pool_{x}/norm/scale"] = tensors[theirs + f"attn.norm_{x}.weight"]
            made[ours + f"attn/pool_{x}/norm/bias"] = tensors[theirs + f"attn.norm_{x}.bias"]
        for letter, axis in (("t", "time"), ("h", "height"), ("w", "width")):
            if theirs + f"attn.rel_pos_{letter}" in tensors:
                table = tensors[theirs + f"attn.rel_pos_{letter}"]
                made[ours + f"attn/relative/{axis}"] = table
    cubes = tensors["patch_embed.proj.weight"]
    cubes = cubes[:, :, None] if cubes.ndim == 4 else cubes
    made["patch_embed/proj/kernel"] = np.einsum("oithw->thwio", cubes)
    made["patch_embed/proj/bias"] = tensors["patch_embed.proj.bias"]
    made["norm/scale"], made["norm/bias"] = tensors["norm.weight"], tensors["norm.bias"]
    made["head/classifier/kernel"] = np.einsum("oi->io", tensors["head.projection.weight"])
    made["head/classifier/bias"] = tensors["head.projection.bias"]
    if "cls_token" in tensors:
        made["positions/class_token"] = tensors["cls_token"][0]
    if "pos_embed" in tensors:
        made["positions/class_position"] = tensors["pos_embed"][0, :1]
        made["positions/joint"] = tensors["pos_embed"][0, 1:].reshape(1, 8, 8, 8)
    if "pos_embed_spatial" in tensors:
        made["positions/space"] = tensors["pos_embed_spatial"][0].reshape(8, 8, 8)
        made["positions/time"] = tensors["pos_embed_temporal"][0]
        made["positions/class_position"] = tensors["pos_embed_class"][0]
    return made


def same(ours, expected) -> None:
    assert ours.keys() == expected.keys()
    for path, values in expected.items():
        assert np.asarray(ours[path]).dtype == np.float32, path
        np.testing.assert_array_equal(ours[path], values, err_msg=path)


# What comes in, and how.


@pytest.mark.parametrize("form", foreign.FORMS)
def test_every_form_of_slowfasts_files_gives_the_right_values(form):
    kind, how = foreign.FORMS[form]
    tensors = foreign.slowfast(kind, **how)
    found = loaded(tensors, kind)
    assert found.origin.family == "slowfast"
    same(
        flatten_dict(found.params, sep="/"), by_hand(tensors, separate=how.get("qkv") == "separate")
    )


@pytest.mark.parametrize("form", foreign.FORMS)
def test_the_report_has_a_line_for_every_tensor_on_both_sides(form):
    kind, how = foreign.FORMS[form]
    tensors = foreign.slowfast(kind, **how)
    found = loaded(tensors, kind)
    lines = found.report.lines
    assert {line.source for line in lines} == set(tensors)
    assert sorted(line.path for line in lines) == sorted(flatten_dict(found.params, sep="/"))
    for line in lines:
        assert line.source_shape == tensors[line.source].shape
        assert line.shape == flatten_dict(found.params, sep="/")[line.path].shape
        if line.source.endswith(("qkv.weight", "fc1.weight")):
            assert line.done == "transposed"
        if re.search(r"norm\d?\.weight|rel_pos|cls_token", line.source):
            assert line.done == "copied"
    rows = str(found.report).splitlines()
    for name in tensors:
        assert any(row.split()[0] == name for row in rows), name
    assert f"slowfast -> {foreign.VARIANTS[kind]}, {len(tensors)} tensors" in rows[-2]
    assert sum(found.report.counts.values()) == len(lines)


def test_pools_that_the_file_lacks_are_not_in_the_model():
    """Trap 3: two checkpoints of the "same" MViT-B differ in the last blocks' pools."""
    old = loaded(foreign.slowfast(KIND, last_pools=False))
    new = loaded(foreign.slowfast(KIND))
    assert not any("blocks/3/attn/pool_k" in path for path in flatten_dict(old.params, sep="/"))
    assert any("blocks/3/attn/pool_k" in path for path in flatten_dict(new.params, sep="/"))
    assert old.config.kv_kernels[-1] == (1, 1, 1) and not new.config.kv_kernels
    clip = jnp.ones((1, 4, 32, 32, 3))
    for found in (old, new):
        shape = jax.eval_shape(lambda p, c=found.config: functional(c).apply(p, clip)[0],
                               found.params).shape  # fmt: skip
        assert shape == (1, foreign.CLASSES)


def test_what_the_user_overrides_holds_against_the_file():
    fused, separate = foreign.slowfast(KIND), foreign.slowfast(KIND, qkv="separate")
    split = params(fused, separate_qkv=True)
    for i, x in enumerate("qkv"):
        rows = fused["blocks.1.attn.qkv.weight"][16 * i : 16 * (i + 1)]
        np.testing.assert_array_equal(split[f"blocks/1/attn/{x}/kernel"], rows.T)
    joined = params(separate, separate_qkv=False)
    rows = [separate[f"blocks.1.attn.{x}.bias"] for x in "qkv"]
    np.testing.assert_array_equal(joined["blocks/1/attn/qkv/bias"], np.concatenate(rows))


WRAPPINGS = {
    "nothing": lambda t: t,
    "model_state": lambda t: {"epoch": 200, "model_state": t, "cfg": "TRAIN: x"},
    "state_dict": lambda t: {"state_dict": t},
    "module.": lambda t: {f"module.{name}": values for name, values in t.items()},
    "module.model.": lambda t: {f"module.model.{name}": values for name, values in t.items()},
    "model_state of module.": lambda t: {"model_state": {f"module.{n}": v for n, v in t.items()}},
    "JAX arrays": lambda t: {name: jnp.asarray(values) for name, values in t.items()},
    "another order": lambda t: dict(reversed(t.items())),
}


@pytest.mark.parametrize("how", WRAPPINGS)
def test_wrappers_and_prefixes_are_taken_off(how):
    tensors = foreign.slowfast(KIND)
    found = loaded(WRAPPINGS[how](tensors))
    same(flatten_dict(found.params, sep="/"), by_hand(tensors, separate=False))
    if "module" in how:
        assert "'module." in found.report.summary()
    if "model_state" in how:
        assert "'model_state'" in found.report.summary()


def test_files_give_what_mappings_give(tmp_path):
    tensors = foreign.slowfast(KIND)
    write_torch(tmp_path / "a.pyth", tensors, wrapper="model_state", extra={"epoch": 3})
    write_torch(tmp_path / "b.pth", tensors)
    write_safetensors(tmp_path / "c.safetensors", tensors)
    for path in tmp_path.iterdir():
        same(params(path), by_hand(tensors, separate=False))
        same(params(str(path)), by_hand(tensors, separate=False))
    hub = originals_of("pytorchvideo")
    write_torch(tmp_path / "hub.pyth", hub, wrapper="model_state", extra={"epoch": 3})
    model, report = mvit_jax.load_torch(tmp_path / "hub.pyth", *PTV[:1], **PTV[1])
    assert report.ok and isinstance(model, mvit.MViT)
    same(
        flatten_dict(params_of(model), sep="/"),
        flatten_dict(load(hub, PTV[0], **PTV[1]).params, sep="/"),
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_precisions_become_float32_and_the_report_says_so(dtype):
    tensors = {name: v.astype(dtype) for name, v in foreign.slowfast(KIND).items()}
    found = loaded(tensors)
    wide = {name: v.astype(np.float32) for name, v in tensors.items()}
    same(flatten_dict(found.params, sep="/"), by_hand(wide, separate=False))
    assert all(f"from {np.dtype(dtype)}" in line.done for line in found.report.lines)


@pytest.mark.slow
def test_the_model_computes_in_inference_mode_and_in_the_dtype_asked_for():
    tensors = foreign.slowfast(KIND)
    name, fields = foreign.VARIANTS[KIND], foreign.fields(KIND, drop_path=0.9, dropout=0.9)
    model, _ = mvit_jax.load_torch(tensors, name, **fields)
    half, _ = mvit_jax.load_torch(tensors, name, dtype=jnp.bfloat16, **fields)
    clip = jax.random.normal(jax.random.key(0), (1, 4, 32, 32, 3))
    logits, again = jax.device_get(jax.jit(lambda clip: (model(clip), model(clip)))(clip))
    np.testing.assert_array_equal(logits, again)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params_of(half)))
    rounded = np.asarray(jax.jit(lambda clip: half(clip))(clip), np.float32)
    assert 0 < np.abs(rounded - logits).max() < 0.3 * logits.std()


# A new head, other sizes, between images and video.


def test_another_number_of_classes_gives_a_new_classifier_and_nothing_else_new():
    tensors = foreign.slowfast(KIND)
    found = loaded(tensors, num_classes=3)
    expected = by_hand(tensors, separate=False)
    ours = flatten_dict(found.params, sep="/")
    head = {"head/classifier/kernel": (32, 3), "head/classifier/bias": (3,)}
    assert {path: ours[path].shape for path in head} == head
    same({p: v for p, v in ours.items() if p not in head},
         {p: v for p, v in expected.items() if p not in head})  # fmt: skip
    new = {line.path for line in found.report.lines if line.done == "new"}
    assert new == set(head)
    unused = {line.source for line in found.report.lines if line.done == "unused"}
    assert unused == {"head.projection.weight", "head.projection.bias"}


def test_without_being_asked_the_classes_are_the_files():
    tensors = foreign.slowfast(KIND)
    found = loaded(tensors)
    assert found.config.num_classes == foreign.CLASSES
    same(flatten_dict(found.params, sep="/"), by_hand(tensors, separate=False))


def test_positions_are_resized_to_other_frames_and_sizes():
    """A table that is linear along time stays so between its ends; constants stay constant."""
    tensors = foreign.slowfast("v2 video")
    tensors |= {name: np.full_like(v, 0.5) for name, v in tensors.items() if "rel_pos_h" in name}
    times = np.array([1.0, 2.0, 3.0], np.float32)[:, None] + np.zeros((1, 8), np.float32)
    tensors["blocks.0.attn.rel_pos_t"] = times
    found = loaded(tensors, "v2 video", frames=8, size=64)
    ours = flatten_dict(found.params, sep="/")
    assert ours["blocks/0/attn/relative/height"].shape == (31, 8)
    np.testing.assert_allclose(ours["blocks/0/attn/relative/height"], 0.5, atol=1e-6)
    # Seven places over three: centres at (i + 0.5) 3 / 7 - 0.5.
    places = np.clip((np.arange(7) + 0.5) * 3 / 7 - 0.5, 0, 2)
    np.testing.assert_allclose(ours["blocks/0/attn/relative/time"][:, 0], 1 + places, atol=1e-6)
    resized = {line.path for line in found.report.lines if "resized" in line.done}
    assert resized == {path for path in ours if "/relative/" in path}
    assert "were made for frames=4 size=32" in found.report.summary()


@pytest.mark.parametrize("how", ["centre", "mean", "repeat"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_image_model_becomes_a_video_model(version, how):
    tensors = foreign.slowfast(f"{version} image")
    kind = f"{version} video"
    found = loaded(tensors, kind, inflate=how, num_classes=foreign.CLASSES)
    ours, image = flatten_dict(found.params, sep="/"), by_hand(tensors, separate=False)
    assert {p: v.shape for p, v in ours.items()} == functional(found.config).shapes()
    assert ours["patch_embed/proj/kernel"].shape[0] == 3 == len(ours["blocks/0/attn/pool_k/kernel"])
    for path, values in image.items():
        if ("/pool_" in path and path.endswith("/kernel")) or path == "patch_embed/proj/kernel":
            zero, whole = np.zeros_like(values), values
            frames = {"centre": [zero, whole, zero], "mean": [whole / 3] * 3,
                      "repeat": [whole] * 3}[how]  # fmt: skip
            np.testing.assert_allclose(ours[path], np.concatenate(frames), atol=1e-7, err_msg=path)
        elif not path.startswith("positions/"):
            np.testing.assert_array_equal(ours[path], values, err_msg=path)
    for path in ours:
        if path.endswith("/time"):
            assert not ours[path].any(), path  # MViTv2, section 4.3
    if version == "v1":
        np.testing.assert_array_equal(ours["positions/space"], image["positions/joint"][0])
    summary = found.report.summary()
    assert "inflated" in summary and not found.report.problems


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_video_model_becomes_an_image_model(version):
    tensors = foreign.slowfast(f"{version} video")
    kind = f"{version} image"
    found = loaded(tensors, kind, inflate="centre", num_classes=foreign.CLASSES)
    ours, video = flatten_dict(found.params, sep="/"), by_hand(tensors, separate=False)
    assert {p: v.shape for p, v in ours.items()} == functional(found.config).shapes()
    for path in ("patch_embed/proj/kernel", "blocks/2/attn/pool_v/kernel"):
        np.testing.assert_array_equal(ours[path], video[path][1:2])
    assert not any(path.endswith("/time") for path in ours)


def test_between_images_and_video_one_says_how():
    tensors = foreign.slowfast("v2 image")
    message = refused(tensors, "v2 video")
    assert "mvitv2_s_16x4" in message and "inflate=centre, mean or repeat" in message


# PyTorchVideo's second names.

PTV = ("mvit_b_16x4", {"width": 8, "depths": (1, 2, 1), "frames": 4, "size": 32,
                       "kv_stride": (1, 4, 4)})  # fmt: skip


def originals_of(case):
    shapes, _ = originals.stored(case)
    return {name: originals.draw_weight(name, shape) for name, shape in shapes.items()}


def with_second_names(tensors):
    """As versions after 0.1 write them."""
    second = {
        re.sub(r"\.(pool|norm)_([qkv])\.", r"._attention_pool_\2.\1.", name): values
        for name, values in tensors.items()
        if re.search(r"\.(pool|norm)_[qkv]\.", name)
    }
    assert len(second) == 3 * (3 * 4 - 2)  # two blocks pool no queries
    return tensors | second


def test_second_names_of_the_same_tensors_are_no_problem():
    tensors = originals_of("pytorchvideo")
    once, twice = (load(t, PTV[0], **PTV[1]) for t in (tensors, with_second_names(tensors)))
    same(flatten_dict(twice.params, sep="/"), flatten_dict(once.params, sep="/"))
    second = [line for line in twice.report.lines if "_attention_pool" in line.source]
    assert len(second) == 30
    assert all(line.done.startswith("second name of blocks.") for line in second)


def test_second_names_of_other_tensors_are_a_problem():
    tensors = with_second_names(originals_of("pytorchvideo"))
    name = "blocks.2.attn._attention_pool_k.pool.weight"
    tensors[name] = tensors[name] + 1
    with pytest.raises(WeightsError) as error:
        load(tensors, PTV[0], **PTV[1])
    assert f"{name} 8x1x3x3x3: differs from its other name blocks.2.attn.pool_k.weight" in str(
        error.value
    )


# What is wrong, all of it at once.


def refused(tensors, kind=KIND, **overrides) -> str:
    """The one message; of a report, every line of it that a person needs."""
    with pytest.raises(UserError) as error:
        loaded(tensors, kind, **overrides)
    return str(error.value)


def problems(tensors, kind=KIND, **overrides) -> list[str]:
    with pytest.raises(WeightsError) as error:
        loaded(tensors, kind, **overrides)
    assert not error.value.report.ok
    assert str(error.value) == error.value.report.summary()
    lines = str(error.value).splitlines()
    return [line.removeprefix("problem: ") for line in lines if line.startswith("problem: ")]


def without(tensors, *names):
    return {name: values for name, values in tensors.items() if name not in names}


def test_everything_that_is_missing_or_left_over_is_listed():
    tensors = foreign.slowfast(KIND)
    gone = ["blocks.0.mlp.fc2.bias", "blocks.3.attn.proj.weight", "norm.weight",
            "head.projection.bias"]  # fmt: skip
    extra = {"blocks.0.attn.ls": np.zeros(3), "decoder.weight": np.zeros((2, 2))}
    found = problems(without(tensors, *gone) | extra)
    assert len(found) == 6
    for path in ("blocks/0/mlp/fc2/bias 16", "blocks/3/attn/proj/kernel 32x32", "norm/scale 32",
                 f"head/classifier/bias {foreign.CLASSES}"):  # fmt: skip
        assert sum(line.startswith(path) and "missing" in line for line in found) == 1, path
    assert "blocks.0.attn.ls 3: has no place in this model" in found
    assert "decoder.weight 2x2: has no place in this model" in found


def some(tensors) -> list[str]:
    """A block that has everything, and what is in no block."""
    return [name for name in tensors if not re.match(r"blocks\.[023]\.", name)]


@pytest.mark.parametrize("kind", ["v1 video", "v2 image"])
def test_a_tensor_that_is_missing_is_named_whichever_it_is(kind):
    """Also one that a family is recognised by, or that an architecture is read from."""
    tensors = foreign.slowfast(kind)
    wrong = {}
    for name in [*some(tensors), "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"]:
        try:
            loaded(without(tensors, name), kind)
        except UserError as error:
            if not any(word in str(error) for word in words(name)):
                wrong[name] = str(error)
        except Exception as error:
            wrong[name] = repr(error)
        else:
            wrong[name] = "was loaded"
    assert wrong == {}


def words(name: str) -> tuple[str, ...]:
    """By what a message may name a tensor: its name, ours, the field that is read from it."""
    read = {"patch_embed.proj.weight": "patch_kernel", "head.projection.weight": "num_classes",
            "pos_embed_spatial": "positions=", "pos_embed_temporal": "positions="}  # fmt: skip
    return name, by_path(name), read.get(name, name)


def by_path(name: str) -> str:
    """Our path of a PySlowFast name, but for the last part."""
    name = name.rsplit(".", 1)[0] if name.endswith(("weight", "bias")) else name
    special = {"cls_token": "class_token", "pos_embed_spatial": "positions/space",
               "pos_embed_temporal": "positions/time", "pos_embed_class": "class_position",
               "head.projection": "head/classifier"}  # fmt: skip
    name = re.sub(r"norm_([qkv])", r"pool_\1/norm", special.get(name, name))
    name = name.replace("rel_pos_h", "relative/height").replace("rel_pos_w", "relative/width")
    return name.replace(".", "/")


SPOILT = {
    "0-d": lambda v: np.float32(1).reshape(()),
    "a row": lambda v: v.reshape(-1),
    "nothing in it": lambda v: v[:0],
    "six axes": lambda v: v.reshape(1, *([1] * (5 - v.ndim)), *v.shape),
    "one more": lambda v: np.concatenate([v, v[:1]]),
    "last axis longer": lambda v: np.concatenate([v, v[..., :1]], -1),
}


# Tables of positions may be made for another size, some may stand in fewer axes, a pool's kernel is
# whatever it is.
HARMLESS = {
    "a row": r"(cls_token|pos_embed_class)$",
    "one more": r"(.*rel_pos_[hw]|pos_embed_temporal)$",
    "last axis longer": r".*pool_[qk].weight$",  # of pool_k, that pool_v has another
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("kind", ["v1 video", "v2 image"])
def test_a_tensor_of_a_wrong_shape_is_refused_and_never_a_crash(kind, how):
    """Of the second kind, the tensors that the first has not, or with other axes."""
    tensors, first = foreign.slowfast(kind), foreign.slowfast(KIND)
    wrong = {}
    for name in some(tensors):
        if kind != KIND and name in first and first[name].ndim == tensors[name].ndim:
            continue
        spoilt = SPOILT[how](tensors[name])
        if spoilt.shape == tensors[name].shape or re.match(HARMLESS.get(how, "$"), name):
            continue
        try:
            loaded(tensors | {name: spoilt}, kind)
        except UserError as error:
            if not any(word in str(error) for word in words(name)):
                wrong[name] = str(error)
        except Exception as error:
            wrong[name] = repr(error)
        else:
            wrong[name] = "was loaded"
    assert wrong == {}


def test_a_new_classifier_is_new_as_a_whole_or_not_at_all():
    """Where the user asks for as many classes as the file has, its two tensors are both used."""
    tensors = foreign.slowfast(KIND)
    found = problems(without(tensors, "head.projection.bias"), num_classes=foreign.CLASSES)
    assert len(found) == 1 and found[0].startswith("head/classifier/bias")
    headless = without(tensors, "head.projection.bias", "head.projection.weight")
    assert params(headless, num_classes=7)["head/classifier/kernel"].shape == (32, 7)
    assert len(problems(headless)) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    tensors = foreign.slowfast(KIND)
    spoilt = ["blocks.1.attn.qkv.weight", "pos_embed_spatial", "norm.bias"]
    for name in spoilt:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[3] = bad
    found = problems(tensors)
    assert len(found) == 3
    for name in spoilt:
        assert any(line.startswith(name) and "not finite" in line for line in found)


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8])
def test_weights_that_are_no_floating_point_numbers_are_named(dtype):
    tensors = foreign.slowfast(KIND)
    tensors["norm.weight"] = np.ones(32, dtype)
    if dtype is bool:
        found = problems(tensors)
        assert found == ["norm.weight 32: is bool"]
    else:
        assert (params(tensors)["norm/scale"] == 1).all()


def test_names_that_collide_are_named():
    tensors = foreign.slowfast(KIND)
    parts = {f"blocks.2.attn.{x}.weight": np.ones((16, 16), np.float32) for x in "qkv"}
    beside = {"module.norm.weight": tensors["norm.weight"]}
    found = problems(tensors | parts | beside)
    assert "module.norm.weight 32: collides with norm.weight" in found
    for name in parts:
        assert any(line.startswith(name) for line in found), name
    timm = originals_of("timm")
    names = [name for name in timm if "shortcut_proj_attn" in name]
    also = {name.replace("_attn", "_mlp"): timm[name] for name in names}
    with pytest.raises(WeightsError) as error:
        load(timm | also, "mvitv2_t", width=8, depths=(1, 2, 1), size=32)
    for name in also:
        assert re.search(rf"problem: {re.escape(name)} .*collides with", str(error.value))


def test_prefixes_before_some_names_only_are_one_report():
    tensors = foreign.slowfast(KIND)
    mixed = {(f"module.{n}" if n.startswith("blocks.1.mlp") else n): v for n, v in tensors.items()}
    found = problems(mixed)
    for leaf in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert any(line.startswith(f"module.blocks.1.mlp.{leaf}") for line in found)
    assert sum("is missing" in line for line in found) == 4


def test_a_state_dict_and_its_prefixed_copy_collide_throughout():
    tensors = foreign.slowfast(KIND)
    found = problems(tensors | {f"module.{name}": v for name, v in tensors.items()})
    assert len(found) == len(tensors)
    assert all("collides with" in line for line in found)


RESNET = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "layer1.0.conv1.weight": (64, 64, 1),
          "layer1.0.bn1.bias": (64,), "fc.weight": (10, 64), "fc.bias": (10,)}  # fmt: skip
VIT = {"cls_token": (1, 1, 8), "pos_embed": (1, 5, 8), "patch_embed.proj.weight": (8, 3, 4, 4),
       "blocks.0.norm1.weight": (8,), "blocks.0.attn.qkv.weight": (24, 8),
       "blocks.0.mlp.fc1.weight": (32, 8), "head.weight": (5, 8)}  # fmt: skip


def test_checkpoints_of_other_models_are_refused():
    message = refused(foreign.filled(RESNET))
    assert "is no MViT" in message and "conv1.weight" in message and "\n" not in message
    message = refused(foreign.filled(VIT))
    assert "mvit_b_16x4" in message and "no variant fits" in message
    reversible = {"patch_embed.proj.weight": (8, 3, 3, 7, 7),
                  "rev_backbone.layers.0.F.norm.weight": (8,)}  # fmt: skip
    message = refused(foreign.filled(reversible))
    assert "reversible" in message and "rev_backbone" in message and "\n" not in message


@pytest.mark.parametrize("empty", [{}, {"model_state": {}}, {"epoch": 3}])
def test_an_empty_state_dict_is_refused(empty):
    assert "holds no state dict" in refused(empty)


def full_size(kind, width, depths, classes, last_pools=True):
    """Names and shapes of a published model, its numbers all in one byte."""
    version = kind.split()[0]
    shapes = {}
    tiny = foreign.shapes(kind, last_pools=last_pools, pool_axes=4)
    channels = []  # in, attention, out
    for stage, depth in enumerate(depths):
        for i in range(depth):
            wide = width * 2**stage
            if version == "v2":
                channels.append((wide // 2 if stage and not i else wide, wide, wide))
            else:
                last = i == depth - 1 and stage < len(depths) - 1
                channels.append((wide, wide, 2 * wide if last else wide))
    for name, shape in tiny.items():
        if not name.startswith("blocks."):
            last = channels[-1][2]
            swap = {8: width, 32: last, foreign.CLASSES: classes, 65: 3137, 64: 3136, 2: 8}
            shapes[name] = tuple(swap.get(n, n) for n in shape)
    for i, (into, attention, out) in enumerate(channels):
        block = {
            "norm1.weight": (into,), "norm1.bias": (into,), "attn.qkv.bias": (3 * attention,),
            "attn.qkv.weight": (3 * attention, into), "attn.proj.weight": (attention, attention),
            "attn.proj.bias": (attention,), "norm2.weight": (attention,),
            "norm2.bias": (attention,), "mlp.fc1.weight": (4 * attention, attention),
            "mlp.fc1.bias": (4 * attention,), "mlp.fc2.weight": (out, 4 * attention),
            "mlp.fc2.bias": (out,),
        }  # fmt: skip
        if into != out:
            block |= {"proj.weight": (out, into), "proj.bias": (out,)}
        if version == "v2":
            block |= {"attn.rel_pos_h": (111, width), "attn.rel_pos_w": (111, width)}
            for x in "qkv":
                block[f"attn.pool_{x}.weight"] = (width, 1, 3, 3)
                block |= {f"attn.norm_{x}.weight": (width,), f"attn.norm_{x}.bias": (width,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {name: np.broadcast_to(np.int8(1), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("tensors", "asked", "fits"),
    [
        (lambda: full_size("v2 image", 96, (1, 2, 11, 2), 1000), "mvit_b_16x4", "mvitv2_s"),
        (lambda: full_size("v2 image", 96, (1, 2, 11, 2), 1000), "mvitv2_t", "mvitv2_s"),
        (lambda: full_size("v2 image", 96, (1, 2, 11, 2), 1000), "mvitv2_s_16x4", "mvitv2_s"),
        (lambda: full_size("v2 image", 96, (1, 2, 5, 2), 1000), "mvitv2_s", "mvitv2_t"),
        (lambda: full_size("v2 image", 96, (2, 3, 16, 3), 1000), "mvitv2_s", "mvitv2_b"),
        (lambda: full_size("v1 image", 96, (1, 2, 11, 2), 1000), "mvitv2_s", "mvit_b16"),
        (lambda: full_size("v1 video", 96, (1, 2, 11, 2), 400), "mvitv2_s_16x4", "mvit_b_16x4"),
        (lambda: full_size("v1 video", 96, (2, 3, 16, 3), 600), "mvit_b_16x4", "mvit_b24_32x3"),
    ],
)
def test_a_wrong_variant_is_answered_with_the_right_one(tensors, asked, fits):
    with pytest.raises(WeightsError) as error:
        load(tensors(), asked)
    message = str(error.value)
    hint = next(line for line in message.splitlines() if "what fits is" in line)
    names = re.split(r" or |, ", re.sub(r".*what fits is |;.*", "", hint))
    assert fits in names and asked not in names
    assert f"another model than {asked}" in hint
    # All that fit are of one kind: images or video, as many blocks, as wide.
    kinds = {(VARIANTS[n].patch_kernel[0], VARIANTS[n].depths, VARIANTS[n].width) for n in names}
    assert len(kinds) == 1
    assert ("inflate" in hint) == (kinds.pop()[0] != VARIANTS[asked].patch_kernel[0])


def test_an_unknown_variant_and_an_unknown_field_are_one_sentence():
    tensors = foreign.slowfast(KIND)
    with pytest.raises(UserError, match=r"no variant 'mvit_b_16x5'; did you mean 'mvit_b_16x4'"):
        load(tensors, "mvit_b_16x5")
    with pytest.raises(UserError, match=r"'frame' is no field .*did you mean 'frames'"):
        load(tensors, "mvit_b_16x4", frame=3)


# What a first reader of this code stumbled over.


def vit_with_joint_positions():
    small = {"width": 16, "heads": 2, "depths": (2,), "size": 64}
    config = variant("vit_b_8x8", frames=8, **small)
    params = unflatten_dict(foreign.filled(functional(config).shapes()), sep="/")
    return export.state_dict(params, config, "slowfast"), params, small


def test_a_joint_table_is_never_cut_by_the_wrong_number_of_frames():
    """128 places are 8 x 4 x 4, and could be 2 x 8 x 8."""
    state, params, small = vit_with_joint_positions()
    back = flatten_dict(load(state, "vit_b_8x8", frames=8, **small).params, sep="/")
    np.testing.assert_array_equal(back["positions/joint"], params["positions"]["joint"])
    with pytest.raises(
        WeightsError, match=r"128 places in space-time, .* give the frames and size"
    ):
        load(state, "vit_b_8x8", frames=2, **small)


def test_a_prefix_before_most_names_is_taken_off_and_the_rest_is_named():
    tensors = {f"model.{name}": values for name, values in foreign.slowfast(KIND).items()}
    tensors["criterion.weight"] = np.ones(3, np.float32)
    with pytest.raises(WeightsError) as error:
        load({"state_dict": tensors}, "mvit_b_16x4", **foreign.fields(KIND))
    problems = [line.source for line in error.value.report.lines if line.problem]
    assert problems == ["criterion.weight"]


@pytest.mark.parametrize("thing", [None, 3, object()])
def test_what_is_neither_file_nor_state_dict_is_refused(thing):
    # The tests' own check of signatures would come before it in `load`.
    with pytest.raises(UserError, match=rf"not from a {type(thing).__name__}: .*state_dict\(\)"):
        loading._open(thing)


def test_stages_with_huge_numbers_are_refused_at_once():
    names = [f"stages.{stage}.blocks.0.attn.proj.bias" for stage in ("0", "300000000", "9" * 5000)]
    with pytest.raises(WeightsError, match="depths"):
        load({name: np.ones(96, np.float32) for name in names}, "mvitv2_t")


def test_half_precision_goes_back_bit_for_bit():
    tensors = {n: v.astype(np.float16) for n, v in foreign.slowfast(KIND).items()}
    found = load(tensors, "mvit_b_16x4", **foreign.fields(KIND))
    back = export.state_dict(found.params, found.config, "slowfast", found.origin)
    assert {n: (v.dtype, v.tobytes()) for n, v in back.items()} == {
        n: (v.dtype, v.tobytes()) for n, v in tensors.items()
    }


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["v1 video", "v2 image"])
def test_no_shape_of_any_tensor_crashes_the_importer(kind):
    tensors, name = foreign.slowfast(kind), {"v1": "mvit_b_16x4", "v2": "mvitv2_s"}[kind[:2]]
    odd = [
        (),
        (0,),
        (1,),
        (3,),
        (0, 0),
        (1, 1),
        (5, 7),
        (2, 3, 4),
        (1, 1, 1, 1),
        (2,) * 5,
        (1,) * 6,
    ]
    for changed in tensors:
        if re.match(r"blocks\.[2-9]", changed):
            continue  # as the blocks before
        for shape in odd:
            mutated = tensors | {changed: np.ones(shape, np.float32)}
            with contextlib.suppress(UserError):
                load(mutated, name, **foreign.fields(kind))
        with pytest.raises(UserError):
            load({k: v for k, v in tensors.items() if k != changed}, name, **foreign.fields(kind))
