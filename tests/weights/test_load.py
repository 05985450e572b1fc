"""Loading of checkpoints: values from every layout of PySlowFast's files, and lists of problems.

The originals of the other formats are in test_parity.py.
"""

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
from tests.support.marks import slow
from tests.weights import foreign
from tests.weights.foreign import same

KIND = "v1 video"


def loaded(tensors, kind=KIND, **overrides) -> Loaded:
    return load(tensors, foreign.VARIANTS[kind], **foreign.fields(kind, **overrides))


def flat(result: Loaded) -> dict[str, np.ndarray]:
    return flatten_dict(result.params, sep="/")


NAMES = {  # parts of PySlowFast's names: ours
    r"head\.projection": "head/classifier", r"norm_([qkv])": r"pool_\1/norm",
    "rel_pos_t": "relative/time", "rel_pos_h": "relative/height", "rel_pos_w": "relative/width",
    "cls_token": "positions/class_token", "pos_embed_class": "positions/class_position",
    "pos_embed_spatial": "positions/space", "pos_embed_temporal": "positions/time",
    "pos_embed$": "positions/joint", r"\.": "/",
}  # fmt: skip


def our_path(name: str) -> str:
    """Returns our path of a PySlowFast name, but for the last part of a weight."""
    for theirs, ours in NAMES.items():
        name = re.sub(theirs, ours, name)
    return name


def by_hand(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a PySlowFast state dict with our names and shapes."""
    result: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        path = our_path(name)
        if path == "positions/joint":
            result["positions/class_position"] = values[0, :1]
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
        result[re.sub("weight$", "scale" if values.ndim == 1 else "kernel", path)] = values
    return result


# Layouts, wrappers, dtypes.


@pytest.mark.parametrize("layout", foreign.FORMS)
def test_every_layout_of_slowfast_files_is_loaded(layout):
    """Checks the report too: a line for every tensor on both sides."""
    kind, how = foreign.FORMS[layout]
    tensors = foreign.slowfast(kind, **how)
    result = loaded(tensors, kind)
    assert result.origin.format == "slowfast" and result.config.num_classes == foreign.CLASSES
    ours = flat(result)
    same(ours, by_hand(tensors))
    lines = result.report.lines
    assert {line.source for line in lines} == set(tensors)
    assert sorted(line.path for line in lines) == sorted(ours)
    for line in lines:
        assert line.source_shape == tensors[line.source].shape
        assert line.shape == ours[line.path].shape
        if line.source.endswith(("qkv.weight", "fc1.weight")):
            assert line.done == "transposed"
        if re.search(r"norm\d?\.weight|rel_pos|cls_token", line.source):
            assert line.done == "copied"
    rows = str(result.report).splitlines()
    assert set(tensors) <= {row.split()[0] for row in rows if row}
    assert f"slowfast -> {foreign.VARIANTS[kind]}, {len(tensors)} tensors" in rows[-2]
    assert sum(result.report.counts.values()) == len(lines)


def test_pools_missing_from_the_file_are_left_out_of_the_model():
    """Trap 3: two released checkpoints of MViT-B differ in the pools of the last blocks."""
    old = loaded(foreign.slowfast(KIND, last_pools=False))
    new = loaded(foreign.slowfast(KIND))
    assert not any("blocks/3/attn/pool_k" in path for path in flat(old))
    assert any("blocks/3/attn/pool_k" in path for path in flat(new))
    assert old.config.kv_kernels[-1] == (1, 1, 1) and not new.config.kv_kernels
    clip = jnp.ones((1, 4, 32, 32, 3))
    for result in (old, new):
        logits, _ = jax.eval_shape(functional(result.config).apply, result.params, clip)
        assert logits.shape == (1, foreign.CLASSES)


def test_overrides_take_precedence_over_the_file():
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


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_and_prefixes_are_removed(wrapping):
    tensors = foreign.slowfast(KIND)
    result = loaded(WRAPPINGS[wrapping](tensors))
    same(flat(result), by_hand(tensors))
    if "module" in wrapping:
        assert "'module." in result.report.summary()
    if "model_state" in wrapping:
        assert "'model_state'" in result.report.summary()


def test_files_load_like_mappings(tmp_path):
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
def test_other_dtypes_become_float32_and_are_reported(dtype):
    tensors = {name: v.astype(dtype) for name, v in foreign.slowfast(KIND).items()}
    result = loaded(tensors)
    same(flat(result), by_hand({name: v.astype(np.float32) for name, v in tensors.items()}))
    assert all(f"from {np.dtype(dtype)}" in line.done for line in result.report.lines)
    if dtype != np.float64:  # half precision is exported bit for bit
        back = export.state_dict(result.params, result.config, "slowfast", result.origin)
        assert back.keys() == tensors.keys()
        for name, values in tensors.items():
            assert back[name].dtype == dtype and back[name].tobytes() == values.tobytes(), name


@pytest.mark.slow
def test_the_model_computes_in_inference_mode_and_in_the_requested_dtype():
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


def test_another_number_of_classes_initialises_only_the_classifier():
    tensors = foreign.slowfast(KIND)
    result = loaded(tensors, num_classes=3)
    ours = flat(result)
    head = {"head/classifier/kernel": (32, 3), "head/classifier/bias": (3,)}
    assert {path: ours.pop(path).shape for path in head} == head
    same(ours, without(by_hand(tensors), *head))
    assert {line.path for line in result.report.lines if line.done == "new"} == set(head)
    unused = {line.source for line in result.report.lines if line.done == "unused"}
    assert unused == {"head.projection.weight", "head.projection.bias"}


def test_positions_are_resized_to_other_frames_and_sizes():
    """Uses embeddings that are linear along time, and constant ones."""
    tensors = foreign.slowfast("v2 video")
    tensors |= {name: np.full_like(v, 0.5) for name, v in tensors.items() if "rel_pos_h" in name}
    times = np.array([1.0, 2.0, 3.0], np.float32)[:, None] + np.zeros((1, 8), np.float32)
    tensors["blocks.0.attn.rel_pos_t"] = times
    result = loaded(tensors, "v2 video", frames=8, size=64)
    ours = flat(result)
    assert ours["blocks/0/attn/relative/height"].shape == (31, 8)
    np.testing.assert_allclose(ours["blocks/0/attn/relative/height"], 0.5, atol=1e-6)
    # Seven positions over three: centres at (i + 0.5) 3 / 7 - 0.5.
    positions = np.clip((np.arange(7) + 0.5) * 3 / 7 - 0.5, 0, 2)
    np.testing.assert_allclose(ours["blocks/0/attn/relative/time"][:, 0], 1 + positions, atol=1e-6)
    resized = {line.path for line in result.report.lines if "resized" in line.done}
    assert resized == {path for path in ours if "/relative/" in path}
    assert "those of the file are for frames=4 size=32" in result.report.summary()


@pytest.mark.parametrize("inflation", ["centre", "mean", "repeat"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_image_model_becomes_a_video_model(version, inflation):
    tensors = foreign.slowfast(f"{version} image")
    result = loaded(tensors, f"{version} video", inflate=inflation, num_classes=foreign.CLASSES)
    ours, image = flat(result), by_hand(tensors)
    assert {p: v.shape for p, v in ours.items()} == functional(result.config).shapes()
    assert ours["patch_embed/proj/kernel"].shape[0] == 3 == len(ours["blocks/0/attn/pool_k/kernel"])
    for path, values in image.items():
        if ("/pool_" in path and path.endswith("/kernel")) or path == "patch_embed/proj/kernel":
            zeros = np.zeros_like(values)
            frames = {"centre": [zeros, values, zeros], "mean": [values / 3] * 3,
                      "repeat": [values] * 3}[inflation]  # fmt: skip
            np.testing.assert_allclose(ours[path], np.concatenate(frames), atol=1e-7, err_msg=path)
        elif not path.startswith("positions/"):
            np.testing.assert_array_equal(ours[path], values, err_msg=path)
    assert not any(v.any() for path, v in ours.items() if path.endswith("/time"))  # section 4.3
    if version == "v1":
        np.testing.assert_array_equal(ours["positions/space"], image["positions/joint"][0])
    assert "inflated" in result.report.summary() and result.report.ok


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_video_model_becomes_an_image_model(version):
    tensors = foreign.slowfast(f"{version} video")
    result = loaded(tensors, f"{version} image", inflate="centre", num_classes=foreign.CLASSES)
    ours, video = flat(result), by_hand(tensors)
    assert {p: v.shape for p, v in ours.items()} == functional(result.config).shapes()
    for path in ("patch_embed/proj/kernel", "blocks/2/attn/pool_v/kernel"):
        np.testing.assert_array_equal(ours[path], video[path][1:2])
    assert not any(path.endswith("/time") for path in ours)


def test_inflation_of_an_image_model_requires_a_method():
    with pytest.raises(WeightsError, match=r"mvitv2_s_16x4.*inflate=centre, mean or repeat"):
        loaded(foreign.slowfast("v2 image"), "v2 video")


def test_second_names_are_accepted_for_equal_tensors_only():
    """Versions of PyTorchVideo after 0.1 write pools under two names."""
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
    message = f"{name} 8x1x3x3x3: differs from blocks.2.attn.pool_k.weight, its second name"
    with pytest.raises(WeightsError, match=re.escape(message)):
        load(tensors | second, variant, **fields)


# Problems of state dicts.


def problems(tensors, kind=KIND, **overrides) -> list[str]:
    with pytest.raises(WeightsError) as error:
        loaded(tensors, kind, **overrides)
    assert not error.value.report.ok
    assert str(error.value) == error.value.report.summary()
    lines = str(error.value).splitlines()
    return [line.removeprefix("problem: ") for line in lines if line.startswith("problem: ")]


def without(tensors, *names):
    return {name: values for name, values in tensors.items() if name not in names}


def test_every_missing_or_unexpected_tensor_is_listed():
    tensors = foreign.slowfast(KIND)
    missing = ["blocks.0.mlp.fc2.bias", "blocks.3.attn.proj.weight", "norm.weight",
            "head.projection.bias"]  # fmt: skip
    extra = {"blocks.0.attn.ls": np.zeros(3), "decoder.weight": np.zeros((2, 2))}
    lines = problems(without(tensors, *missing) | extra)
    assert len(lines) == 6
    for path in ("blocks/0/mlp/fc2/bias 16", "blocks/3/attn/proj/kernel 32x32", "norm/scale 32",
                 f"head/classifier/bias {foreign.CLASSES}"):  # fmt: skip
        assert sum(line.startswith(path) and "missing" in line for line in lines) == 1, path
    assert "blocks.0.attn.ls 3: has no counterpart in this model" in lines
    assert "decoder.weight 2x2: has no counterpart in this model" in lines


def sample_names(tensors) -> list[str]:
    """Returns the names of one complete block and those outside of blocks."""
    return [name for name in tensors if not re.match(r"blocks\.[023]\.", name)]


def refused_for(name: str):
    """Expects an error that names a tensor, our parameter, or the field that is read from it."""
    fields = {"patch_embed.proj.weight": "patch_kernel", "head.projection.weight": "num_classes",
            "pos_embed_spatial": "positions=", "pos_embed_temporal": "positions=",
            "cls_token": "class_token="}  # fmt: skip
    names = name, our_path(name).removesuffix("/weight"), fields.get(name, name)
    return pytest.raises(UserError, match="|".join(map(re.escape, names)))


@pytest.mark.parametrize("kind", ["v1 video", "v2 image"])
def test_any_missing_tensor_is_named(kind):
    """Includes tensors by which the format is detected or from which fields are read."""
    tensors = foreign.slowfast(kind)
    for name in [*sample_names(tensors), "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"]:
        with refused_for(name):
            loaded(without(tensors, name), kind)


CHANGES = {
    "0-d": lambda v: np.float32(1).reshape(()),
    "a row": lambda v: v.reshape(-1),
    "nothing in it": lambda v: v[:0],
    "six axes": lambda v: v.reshape(1, *([1] * (5 - v.ndim)), *v.shape),
    "one more": lambda v: np.concatenate([v, v[:1]]),
    "last axis longer": lambda v: np.concatenate([v, v[..., :1]], -1),
}
# Positional embeddings may have another size, some may have fewer axes, and a pool may have any
# kernel.
VALID = {
    "a row": r"(cls_token|pos_embed_class)$",
    "one more": r"(.*rel_pos_[hw]|pos_embed_temporal)$",
    "last axis longer": r".*pool_[qk].weight$",  # pool_k and pool_v may differ
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["v1 video", slow("v2 image")])
def test_any_tensor_of_a_wrong_shape_is_refused(kind, change):
    """Skips tensors of the second kind that the first has with as many axes."""
    tensors, first = foreign.slowfast(kind), foreign.slowfast(KIND)
    for name in sample_names(tensors):
        if kind != KIND and name in first and first[name].ndim == tensors[name].ndim:
            continue
        changed = CHANGES[change](tensors[name])
        if changed.shape == tensors[name].shape or re.match(VALID.get(change, "$"), name):
            continue
        with refused_for(name):
            loaded(tensors | {name: changed}, kind)


def test_a_classifier_is_loaded_or_initialised_as_a_whole():
    """With as many classes as the file has, both of its tensors are used."""
    tensors = foreign.slowfast(KIND)
    lines = problems(without(tensors, "head.projection.bias"), num_classes=foreign.CLASSES)
    assert len(lines) == 1 and lines[0].startswith("head/classifier/bias")
    headless = without(tensors, "head.projection.bias", "head.projection.weight")
    assert flat(loaded(headless, num_classes=7))["head/classifier/kernel"].shape == (32, 7)
    assert len(problems(headless)) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    tensors = foreign.slowfast(KIND)
    names = ["blocks.1.attn.qkv.weight", "pos_embed_spatial", "norm.bias"]
    for name in names:
        tensors[name].reshape(-1)[3] = bad
    lines = problems(tensors)
    assert sorted(line.split()[0] for line in lines) == sorted(names)
    assert all("has non-finite values" in line for line in lines)


def test_integers_are_accepted_as_weights_and_booleans_refused():
    tensors = foreign.slowfast(KIND)
    for dtype in (np.int64, np.uint8):
        result = loaded(tensors | {"norm.weight": np.ones(32, dtype)})
        assert (result.params["norm"]["scale"] == 1).all()
    assert problems(tensors | {"norm.weight": np.ones(32, bool)}) == [
        "norm.weight 32: has the dtype bool, which cannot be a weight"
    ]


def test_colliding_names_are_listed():
    tensors = foreign.slowfast(KIND)
    parts = {f"blocks.2.attn.{x}.weight": np.ones((16, 16), np.float32) for x in "qkv"}
    beside = {"module.norm.weight": tensors["norm.weight"]}
    lines = problems(tensors | parts | beside)
    assert "module.norm.weight 32: conflicts with norm.weight" in lines
    for name in parts:
        assert any(line.startswith(name) for line in lines), name
    timm, (name, fields) = foreign.original("timm"), CASES["timm"]
    also = {n.replace("_attn", "_mlp"): v for n, v in timm.items() if "shortcut_proj_attn" in n}
    with pytest.raises(WeightsError) as error:
        load(timm | also, name, **fields)
    for name in also:
        assert re.search(rf"problem: {re.escape(name)} .*conflicts with", str(error.value))


def test_prefixes_before_some_names_are_in_the_report():
    tensors = foreign.slowfast(KIND)
    mixed = {(f"module.{n}" if n.startswith("blocks.1.mlp") else n): v for n, v in tensors.items()}
    lines = problems(mixed)
    for leaf in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert any(line.startswith(f"module.blocks.1.mlp.{leaf}") for line in lines)
    assert sum("is missing" in line for line in lines) == 4


def test_every_name_of_a_prefixed_copy_collides():
    tensors = foreign.slowfast(KIND)
    lines = problems(tensors | {f"module.{name}": v for name, v in tensors.items()})
    assert len(lines) == len(tensors)
    assert all("conflicts with" in line for line in lines)


OTHER_MODELS = [  # one line for models that are no MViT
    ({"conv1.weight": (64, 3, 7, 7), "fc.bias": (10,)},
     r"^.* not a checkpoint of an MViT .*conv1\.weight.*$"),
    ({"rev_backbone.layers.0.F.norm.weight": (8,)}, "^.*reversible.*rev_backbone.*$"),
    ({"cls_token": (1, 1, 8), "pos_embed": (1, 5, 8), "patch_embed.proj.weight": (8, 3, 4, 4),
      "blocks.0.norm1.weight": (8,), "blocks.0.attn.qkv.weight": (24, 8), "head.weight": (5, 8)},
     "the file does not fit mvit_b_16x4 or any other variant"),
    (foreign.shapes("v2 image"), "the file has expand=attention, but mvit_b_16x4 has mlp"),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "message"), OTHER_MODELS)
def test_checkpoints_of_other_models_are_refused(shapes, message):
    with pytest.raises(UserError, match=message):
        loaded(foreign.filled(shapes))


@pytest.mark.parametrize(
    ("expected", "requested"),
    [
        ("mvitv2_s", "mvit_b_16x4"),
        slow("mvitv2_s", "mvitv2_t"),
        slow("mvitv2_s", "mvitv2_s_16x4"),
        ("mvitv2_t", "mvitv2_s"),
        slow("mvitv2_b", "mvitv2_s"),
        ("mvit_b16", "mvitv2_s"),
        slow("mvit_b_16x4", "mvitv2_s_16x4"),
        slow("mvit_b24_32x3", "mvit_b_16x4"),
    ],
)
def test_a_wrong_variant_ends_with_an_error_that_names_the_right_one(expected, requested):
    config = VARIANTS[expected]
    shapes = functional(config).shapes()
    ones = {path: np.broadcast_to(np.int8(1), shape) for path, shape in shapes.items()}
    tensors = export.state_dict(unflatten_dict(ones, sep="/"), config, "slowfast")
    with pytest.raises(WeightsError) as error:
        load(tensors, requested)
    hint = next(line for line in str(error.value).splitlines() if "the file fits" in line)
    names = re.split(r" or ", re.sub(r".*the file fits |, not .*", "", hint))
    assert expected in names and requested not in names
    assert f", not {requested}" in hint
    # Suggested variants are of one kind: images or video, depths, width.
    kinds = {(VARIANTS[n].patch_kernel[0], VARIANTS[n].depths, VARIANTS[n].width) for n in names}
    assert len(kinds) == 1
    assert ("inflate" in hint) == (kinds.pop()[0] != VARIANTS[requested].patch_kernel[0])


# Ambiguous and malicious state dicts.


def test_joint_embeddings_for_other_frames_are_refused():
    """128 positions are 8 x 4 x 4, and could be 2 x 8 x 8."""
    small = {"width": 16, "heads": 2, "depths": (2,), "size": 64}
    config = variant("vit_b_8x8", frames=8, **small)
    params = unflatten_dict(foreign.filled(functional(config).shapes()), sep="/")
    state = export.state_dict(params, config, "slowfast")
    back = load(state, "vit_b_8x8", frames=8, **small).params["positions"]
    np.testing.assert_array_equal(back["joint"], params["positions"]["joint"])
    with pytest.raises(WeightsError, match=r"128 positions .* give the frames and size"):
        load(state, "vit_b_8x8", frames=2, **small)


def test_a_prefix_before_most_names_is_removed_and_the_rest_listed():
    tensors = {f"model.{name}": values for name, values in foreign.slowfast(KIND).items()}
    tensors["criterion.weight"] = np.ones(3, np.float32)
    lines = problems({"state_dict": tensors})
    assert lines == ["criterion.weight 3: has no counterpart in this model"]


@pytest.mark.parametrize("source", [None, 3, object()])
def test_sources_other_than_files_and_state_dicts_are_refused(source):
    # In `load` the tests' check of signatures would raise first.
    with pytest.raises(UserError, match=rf"not from a {type(source).__name__}: .*state_dict\(\)"):
        loading._open(source)


def test_huge_stage_numbers_are_refused_early():
    names = [f"stages.{stage}.blocks.0.attn.proj.bias" for stage in ("0", "300000000", "9" * 5000)]
    with pytest.raises(WeightsError, match="depths"):
        load({name: np.ones(96, np.float32) for name in names}, "mvitv2_t")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["v1 video", "v2 image"])
def test_any_shape_of_any_tensor_is_loaded_or_refused(kind):
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
