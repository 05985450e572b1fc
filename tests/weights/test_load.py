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
from tests.models.test_parity import CASES
from tests.weights import foreign
from tests.weights.foreign import same

KIND = "v1 video"


def loaded(tensors, kind=KIND, **overrides) -> Loaded:
    return load(tensors, foreign.VARIANTS[kind], **foreign.fields(kind, **overrides))


def flat(found: Loaded) -> dict[str, np.ndarray]:
    return flatten_dict(found.params, sep="/")


NAMES = {  # what PySlowFast calls parts of names, and what we do
    r"head\.projection": "head/classifier", r"norm_([qkv])": r"pool_\1/norm",
    "rel_pos_t": "relative/time", "rel_pos_h": "relative/height", "rel_pos_w": "relative/width",
    "cls_token": "positions/class_token", "pos_embed_class": "positions/class_position",
    "pos_embed_spatial": "positions/space", "pos_embed_temporal": "positions/time",
    "pos_embed$": "positions/joint", r"\.": "/",
}  # fmt: skip


def by_path(name: str) -> str:
    """Our path of a PySlowFast name, but for the last part of a weight."""
    for theirs, ours in NAMES.items():
        name = re.sub(theirs, ours, name)
    return name


def by_hand(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a PySlowFast state dict is in our names and shapes."""
    made: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        path = by_path(name)
        if path == "positions/joint":
            made["positions/class_position"] = values[0, :1]
            values = values[0, 1:].reshape(1, 8, 8, 8)
        elif path == "positions/space":
            values = values[0].reshape(8, 8, 8)
        elif path.startswith("positions/"):
            values = values[0]
        elif values.ndim >= 4:
            values = values[:, :, None] if values.ndim == 4 else values
            values = np.einsum("oithw->thwio", values)
            values = values[..., 0, :] if "/pool_" in path else values
        elif path.endswith("weight") and values.ndim == 2:
            values = values.T
        made[re.sub("weight$", "scale" if values.ndim == 1 else "kernel", path)] = values
    return made


# What comes in, and how.


@pytest.mark.parametrize("form", foreign.FORMS)
def test_every_form_of_slowfasts_files_gives_the_right_values(form):
    """And a report with a line for every tensor on both sides."""
    kind, how = foreign.FORMS[form]
    tensors = foreign.slowfast(kind, **how)
    found = loaded(tensors, kind)
    assert found.origin.family == "slowfast" and found.config.num_classes == foreign.CLASSES
    ours = flat(found)
    same(ours, by_hand(tensors))
    lines = found.report.lines
    assert {line.source for line in lines} == set(tensors)
    assert sorted(line.path for line in lines) == sorted(ours)
    for line in lines:
        assert line.source_shape == tensors[line.source].shape
        assert line.shape == ours[line.path].shape
        if line.source.endswith(("qkv.weight", "fc1.weight")):
            assert line.done == "transposed"
        if re.search(r"norm\d?\.weight|rel_pos|cls_token", line.source):
            assert line.done == "copied"
    rows = str(found.report).splitlines()
    assert set(tensors) <= {row.split()[0] for row in rows if row}
    assert f"slowfast -> {foreign.VARIANTS[kind]}, {len(tensors)} tensors" in rows[-2]
    assert sum(found.report.counts.values()) == len(lines)


def test_pools_that_the_file_lacks_are_not_in_the_model():
    """Trap 3: two checkpoints of the "same" MViT-B differ in the last blocks' pools."""
    old = loaded(foreign.slowfast(KIND, last_pools=False))
    new = loaded(foreign.slowfast(KIND))
    assert not any("blocks/3/attn/pool_k" in path for path in flat(old))
    assert any("blocks/3/attn/pool_k" in path for path in flat(new))
    assert old.config.kv_kernels[-1] == (1, 1, 1) and not new.config.kv_kernels
    clip = jnp.ones((1, 4, 32, 32, 3))
    for found in (old, new):
        logits, _ = jax.eval_shape(functional(found.config).apply, found.params, clip)
        assert logits.shape == (1, foreign.CLASSES)


def test_what_the_user_overrides_holds_against_the_file():
    fused, separate = foreign.slowfast(KIND), foreign.slowfast(KIND, qkv="separate")
    split = flat(loaded(fused, separate_qkv=True))
    for i, x in enumerate("qkv"):
        rows = fused["blocks.1.attn.qkv.weight"][16 * i : 16 * (i + 1)]
        np.testing.assert_array_equal(split[f"blocks/1/attn/{x}/kernel"], rows.T)
    joined = flat(loaded(separate, separate_qkv=False))
    rows = [separate[f"blocks.1.attn.{x}.bias"] for x in "qkv"]
    np.testing.assert_array_equal(joined["blocks/1/attn/qkv/bias"], np.concatenate(rows))


WRAPPINGS = {
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
    same(flat(found), by_hand(tensors))
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
        same(flat(loaded(path)), by_hand(tensors))
    name, fields = foreign.VARIANTS[KIND], foreign.fields(KIND)
    model, report = mvit_jax.load_torch(str(tmp_path / "a.pyth"), name, **fields)
    assert report.ok and isinstance(model, mvit.MViT)
    same(flatten_dict(params_of(model), sep="/"), by_hand(tensors))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_precisions_become_float32_and_the_report_says_so(dtype):
    tensors = {name: v.astype(dtype) for name, v in foreign.slowfast(KIND).items()}
    found = loaded(tensors)
    same(flat(found), by_hand({name: v.astype(np.float32) for name, v in tensors.items()}))
    assert all(f"from {np.dtype(dtype)}" in line.done for line in found.report.lines)
    if dtype != np.float64:  # half precision goes back bit for bit
        back = export.state_dict(found.params, found.config, "slowfast", found.origin)
        assert back.keys() == tensors.keys()
        for name, values in tensors.items():
            assert back[name].dtype == dtype and back[name].tobytes() == values.tobytes(), name


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
    ours = flat(found)
    head = {"head/classifier/kernel": (32, 3), "head/classifier/bias": (3,)}
    assert {path: ours.pop(path).shape for path in head} == head
    same(ours, without(by_hand(tensors), *head))
    assert {line.path for line in found.report.lines if line.done == "new"} == set(head)
    unused = {line.source for line in found.report.lines if line.done == "unused"}
    assert unused == {"head.projection.weight", "head.projection.bias"}


def test_positions_are_resized_to_other_frames_and_sizes():
    """A table that is linear along time stays so between its ends; constants stay constant."""
    tensors = foreign.slowfast("v2 video")
    tensors |= {name: np.full_like(v, 0.5) for name, v in tensors.items() if "rel_pos_h" in name}
    times = np.array([1.0, 2.0, 3.0], np.float32)[:, None] + np.zeros((1, 8), np.float32)
    tensors["blocks.0.attn.rel_pos_t"] = times
    found = loaded(tensors, "v2 video", frames=8, size=64)
    ours = flat(found)
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
    found = loaded(tensors, f"{version} video", inflate=how, num_classes=foreign.CLASSES)
    ours, image = flat(found), by_hand(tensors)
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
    assert not any(v.any() for path, v in ours.items() if path.endswith("/time"))  # section 4.3
    if version == "v1":
        np.testing.assert_array_equal(ours["positions/space"], image["positions/joint"][0])
    assert "inflated" in found.report.summary() and found.report.ok


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_video_model_becomes_an_image_model(version):
    tensors = foreign.slowfast(f"{version} video")
    found = loaded(tensors, f"{version} image", inflate="centre", num_classes=foreign.CLASSES)
    ours, video = flat(found), by_hand(tensors)
    assert {p: v.shape for p, v in ours.items()} == functional(found.config).shapes()
    for path in ("patch_embed/proj/kernel", "blocks/2/attn/pool_v/kernel"):
        np.testing.assert_array_equal(ours[path], video[path][1:2])
    assert not any(path.endswith("/time") for path in ours)


def test_between_images_and_video_one_says_how():
    with pytest.raises(WeightsError, match=r"mvitv2_s_16x4.*inflate=centre, mean or repeat"):
        loaded(foreign.slowfast("v2 image"), "v2 video")


def test_second_names_are_no_problem_unless_they_are_of_other_tensors():
    """Versions of PyTorchVideo after 0.1 write pools twice."""
    tensors, (variant, fields) = foreign.original("pytorchvideo"), CASES["pytorchvideo"]
    second = {
        re.sub(r"\.(pool|norm)_([qkv])\.", r"._attention_pool_\2.\1.", name): values
        for name, values in tensors.items()
        if re.search(r"\.(pool|norm)_[qkv]\.", name)
    }
    assert len(second) == 3 * (3 * 4 - 2)  # two blocks pool no queries
    once, twice = (load(t, variant, **fields) for t in (tensors, tensors | second))
    same(flat(twice), flat(once))
    done = [line.done for line in twice.report.lines if "_attention_pool" in line.source]
    assert len(done) == 30 and all(d.startswith("second name of blocks.") for d in done)
    name = "blocks.2.attn._attention_pool_k.pool.weight"
    second[name] = second[name] + 1
    says = f"{name} 8x1x3x3x3: differs from its other name blocks.2.attn.pool_k.weight"
    with pytest.raises(WeightsError, match=re.escape(says)):
        load(tensors | second, variant, **fields)


# What is wrong, all of it at once.


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
    assert "blocks.0.attn.ls 3: has no counterpart in this model" in found
    assert "decoder.weight 2x2: has no counterpart in this model" in found


def some(tensors) -> list[str]:
    """A block that has everything, and what is in no block."""
    return [name for name in tensors if not re.match(r"blocks\.[023]\.", name)]


def refused_for(name: str):
    """Expects a refusal that names a tensor, ours, or the field that is read from it."""
    read = {"patch_embed.proj.weight": "patch_kernel", "head.projection.weight": "num_classes",
            "pos_embed_spatial": "positions=", "pos_embed_temporal": "positions=",
            "cls_token": "class_token="}  # fmt: skip
    words = name, by_path(name).removesuffix("/weight"), read.get(name, name)
    return pytest.raises(UserError, match="|".join(map(re.escape, words)))


@pytest.mark.parametrize("kind", ["v1 video", "v2 image"])
def test_a_tensor_that_is_missing_is_named_whichever_it_is(kind):
    """Also one that a family is recognised by, or that an architecture is read from."""
    tensors = foreign.slowfast(kind)
    for name in [*some(tensors), "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"]:
        with refused_for(name):
            loaded(without(tensors, name), kind)


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
    for name in some(tensors):
        if kind != KIND and name in first and first[name].ndim == tensors[name].ndim:
            continue
        spoilt = SPOILT[how](tensors[name])
        if spoilt.shape == tensors[name].shape or re.match(HARMLESS.get(how, "$"), name):
            continue
        with refused_for(name):
            loaded(tensors | {name: spoilt}, kind)


def test_a_new_classifier_is_new_as_a_whole_or_not_at_all():
    """Where the user asks for as many classes as the file has, its two tensors are both used."""
    tensors = foreign.slowfast(KIND)
    found = problems(without(tensors, "head.projection.bias"), num_classes=foreign.CLASSES)
    assert len(found) == 1 and found[0].startswith("head/classifier/bias")
    headless = without(tensors, "head.projection.bias", "head.projection.weight")
    assert flat(loaded(headless, num_classes=7))["head/classifier/kernel"].shape == (32, 7)
    assert len(problems(headless)) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    tensors = foreign.slowfast(KIND)
    spoilt = ["blocks.1.attn.qkv.weight", "pos_embed_spatial", "norm.bias"]
    for name in spoilt:
        tensors[name].reshape(-1)[3] = bad
    found = problems(tensors)
    assert sorted(line.split()[0] for line in found) == sorted(spoilt)
    assert all("not finite" in line for line in found)


def test_whole_numbers_are_weights_and_truth_values_are_none():
    tensors = foreign.slowfast(KIND)
    for dtype in (np.int64, np.uint8):
        found = loaded(tensors | {"norm.weight": np.ones(32, dtype)})
        assert (found.params["norm"]["scale"] == 1).all()
    assert problems(tensors | {"norm.weight": np.ones(32, bool)}) == ["norm.weight 32: is bool"]


def test_names_that_collide_are_named():
    tensors = foreign.slowfast(KIND)
    parts = {f"blocks.2.attn.{x}.weight": np.ones((16, 16), np.float32) for x in "qkv"}
    beside = {"module.norm.weight": tensors["norm.weight"]}
    found = problems(tensors | parts | beside)
    assert "module.norm.weight 32: collides with norm.weight" in found
    for name in parts:
        assert any(line.startswith(name) for line in found), name
    timm, (name, fields) = foreign.original("timm"), CASES["timm"]
    also = {n.replace("_attn", "_mlp"): v for n, v in timm.items() if "shortcut_proj_attn" in n}
    with pytest.raises(WeightsError) as error:
        load(timm | also, name, **fields)
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


OTHERS = [  # in one line, where it is no MViT at all
    ({"conv1.weight": (64, 3, 7, 7), "fc.bias": (10,)}, r"^.* is no MViT .*conv1\.weight.*$"),
    ({"rev_backbone.layers.0.F.norm.weight": (8,)}, "^.*reversible.*rev_backbone.*$"),
    ({"cls_token": (1, 1, 8), "pos_embed": (1, 5, 8), "patch_embed.proj.weight": (8, 3, 4, 4),
      "blocks.0.norm1.weight": (8,), "blocks.0.attn.qkv.weight": (24, 8), "head.weight": (5, 8)},
     "another model than mvit_b_16x4: no variant fits"),
    (foreign.shapes("v2 image"), "the file has expand=attention, mvit_b_16x4 has mlp"),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "says"), OTHERS)
def test_checkpoints_of_other_models_are_refused(shapes, says):
    with pytest.raises(UserError, match=says):
        loaded(foreign.filled(shapes))


@pytest.mark.parametrize(
    ("fits", "asked"),
    [
        ("mvitv2_s", "mvit_b_16x4"),
        ("mvitv2_s", "mvitv2_t"),
        ("mvitv2_s", "mvitv2_s_16x4"),
        ("mvitv2_t", "mvitv2_s"),
        ("mvitv2_b", "mvitv2_s"),
        ("mvit_b16", "mvitv2_s"),
        ("mvit_b_16x4", "mvitv2_s_16x4"),
        ("mvit_b24_32x3", "mvit_b_16x4"),
    ],
)
def test_a_wrong_variant_is_answered_with_the_right_one(fits, asked):
    config = VARIANTS[fits]
    shapes = functional(config).shapes()
    ones = {path: np.broadcast_to(np.int8(1), shape) for path, shape in shapes.items()}
    tensors = export.state_dict(unflatten_dict(ones, sep="/"), config, "slowfast")
    with pytest.raises(WeightsError) as error:
        load(tensors, asked)
    hint = next(line for line in str(error.value).splitlines() if "what fits is" in line)
    names = re.split(r" or |, ", re.sub(r".*what fits is |;.*", "", hint))
    assert fits in names and asked not in names
    assert f"another model than {asked}" in hint
    # All that fit are of one kind: images or video, as many blocks, as wide.
    kinds = {(VARIANTS[n].patch_kernel[0], VARIANTS[n].depths, VARIANTS[n].width) for n in names}
    assert len(kinds) == 1
    assert ("inflate" in hint) == (kinds.pop()[0] != VARIANTS[asked].patch_kernel[0])


# What a first reader of this code stumbled over.


def test_a_joint_table_is_never_cut_by_the_wrong_number_of_frames():
    """128 positions are 8 x 4 x 4, and could be 2 x 8 x 8."""
    small = {"width": 16, "heads": 2, "depths": (2,), "size": 64}
    config = variant("vit_b_8x8", frames=8, **small)
    params = unflatten_dict(foreign.filled(functional(config).shapes()), sep="/")
    state = export.state_dict(params, config, "slowfast")
    back = load(state, "vit_b_8x8", frames=8, **small).params["positions"]
    np.testing.assert_array_equal(back["joint"], params["positions"]["joint"])
    with pytest.raises(WeightsError, match=r"128 positions .* give the frames and size"):
        load(state, "vit_b_8x8", frames=2, **small)


def test_a_prefix_before_most_names_is_taken_off_and_the_rest_is_named():
    tensors = {f"model.{name}": values for name, values in foreign.slowfast(KIND).items()}
    tensors["criterion.weight"] = np.ones(3, np.float32)
    found = problems({"state_dict": tensors})
    assert found == ["criterion.weight 3: has no counterpart in this model"]


@pytest.mark.parametrize("thing", [None, 3, object()])
def test_what_is_neither_file_nor_state_dict_is_refused(thing):
    # The tests' own check of signatures would come before it in `load`.
    with pytest.raises(UserError, match=rf"not from a {type(thing).__name__}: .*state_dict\(\)"):
        loading._open(thing)


def test_stages_with_huge_numbers_are_refused_at_once():
    names = [f"stages.{stage}.blocks.0.attn.proj.bias" for stage in ("0", "300000000", "9" * 5000)]
    with pytest.raises(WeightsError, match="depths"):
        load({name: np.ones(96, np.float32) for name in names}, "mvitv2_t")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["v1 video", "v2 image"])
def test_no_shape_of_any_tensor_crashes_the_importer(kind):
    tensors = foreign.slowfast(kind)
    odd = [(), (0,), (1,), (3,), (0, 0), (1, 1), (5, 7), (2, 3, 4), (1,) * 4, (2,) * 5, (1,) * 6]
    for changed in tensors:
        if re.match(r"blocks\.[2-9]", changed):
            continue  # as the blocks before
        for shape in odd:
            with contextlib.suppress(UserError):
                loaded(tensors | {changed: np.ones(shape, np.float32)}, kind)
        with pytest.raises(UserError):
            loaded(without(tensors, changed), kind)
