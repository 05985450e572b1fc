"""Sources of initial weights: the workdir, `resume`, `init.checkpoint`, random initialisation."""

import dataclasses
import signal
from contextlib import closing
from typing import ClassVar

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mvit_jax import convert, train
from mvit_jax.common.errors import UserError
from mvit_jax.data.formats.video_list import VideoList
from mvit_jax.data.source import fingerprint
from mvit_jax.models.functional import functional
from mvit_jax.training import build, run_folder
from mvit_jax.training.run import history, workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.training.run.metrics import Logbook
from mvit_jax.training.state import init_state
from mvit_jax.weights.report import WeightsError
from mvit_jax.weights.tensor_files import write_torch
from tests.support import group, tiny
from tests.support.ava_folder import FLAGS
from tests.weights import foreign

KIND = "v1 video"
# The architecture of `foreign`, for the training program.
ARCHITECTURE = {f"model.{k}": v for k, v in foreign.fields(KIND).items()} | {
    "model.patch_kernel": (3, 7, 7),
    "model.patch_stride": (2, 4, 4),
    "model.patch_padding": (1, 3, 3),
}
IMAGE = {
    "model.variant": "mvitv2_s",
    "model.frames": 1,
    "model.patch_kernel": (1, 7, 7),
    "model.patch_stride": (1, 4, 4),
    "model.patch_padding": (0, 3, 3),
}


def settings(digits, **changes):
    return tiny.config(digits, **(ARCHITECTURE | changes))


def shapes_of(config, classes=8):
    return functional(build.model_config(config, classes)).shapes()


def state_of(config, digits, params):
    optimizer = build.make_optimizer(config)
    return init_state(jax.tree.map(jax.numpy.asarray, params), optimizer, config.optim.ema)


def drawn(config, salt, classes=8):
    tree = unflatten_dict(foreign.filled(shapes_of(config, classes)), sep="/")
    return jax.tree.map(lambda values: np.float32(0.1) * values + np.float32(salt), tree)


def make_run(folder, config, digits, salt, step=3):
    """Saves a run after some steps; averaged parameters are twice the parameters."""
    workdir.record_config(config, folder)
    state = state_of(config, digits, drawn(config, salt))
    state = dataclasses.replace(state, step=jax.numpy.asarray(step, jax.numpy.int32))
    if state.ema is not None:
        state = dataclasses.replace(state, ema=jax.tree.map(lambda x: 2 * x, state.params))
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(state, step)
    return flatten_dict(state.params if state.ema is None else state.ema, sep="/")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder written by `convert`, and its parameters."""
    here = tmp_path_factory.mktemp("converted")
    write_torch(here / "in.pyth", foreign.slowfast(KIND), wrapper="model_state")
    folder = here / "out"
    convert.import_checkpoint(
        str(here / "in.pyth"), "mvit_b_16x4", folder, None, None, **foreign.fields(KIND)
    )
    params, _ = run_folder.read_params(folder)
    return folder, flatten_dict(params, sep="/")


def initial(config, classes=8, names=None):
    params, words = train.initial_weights(config, build.settings(config, classes).model, names)
    flat = flatten_dict(params, sep="/")
    assert {path: values.shape for path, values in flat.items()} == shapes_of(config, classes)
    return flat, words


def assert_same_except(ours, theirs, *new) -> None:
    """Asserts that tensors are equal, except those whose paths begin with `new`."""
    assert ours.keys() == theirs.keys()
    for path, values in theirs.items():
        if not path.startswith(new):
            np.testing.assert_array_equal(ours[path], values, err_msg=path)


# Weights.


def test_a_converted_folder_initialises_all_weights_but_the_head(converted, digits):
    folder, source = converted
    config = settings(digits, **{"init.checkpoint": str(folder)})
    ours, words = initial(config)
    assert_same_except(ours, source, "head/")
    assert ours["head/classifier/kernel"].shape == (32, 8)
    assert 0.01 < ours["head/classifier/kernel"].std() < 0.03
    assert not ours["head/classifier/bias"].any()
    assert str(folder) in words and "2 new" in words and "head/classifier/kernel" in words
    ours, words = initial(config, classes=foreign.CLASSES)
    assert_same_except(ours, source)
    assert "new" not in words


def test_a_run_initialises_from_its_averaged_parameters(digits, tmp_path):
    for ema in (0.0, 0.5):
        config = settings(digits, **{"optim.ema": ema})
        theirs = make_run(tmp_path / str(ema), config, digits, 0)
        ours, words = initial(settings(digits, **{"init.checkpoint": str(tmp_path / str(ema))}))
        assert_same_except(ours, theirs)
        assert "new" not in words


NAMES = tuple("abcdefgh")


def with_names(folder, digits, names=NAMES):
    """Saves a run; returns the config of a run that starts from it, and the saved weights."""
    theirs = make_run(folder, settings(digits), digits, 0)
    if names is not None:
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names))
    return settings(digits, **{"init.checkpoint": str(folder)}), theirs


@pytest.mark.parametrize("changed", ["all", "one"])
def test_other_classes_of_the_same_number_get_a_new_classifier(changed, digits, tmp_path):
    config, theirs = with_names(tmp_path, digits)
    names = tuple("ABCDEFGH") if changed == "all" else (*NAMES[:7], "i")
    ours, words = initial(config, names=names)
    assert_same_except(ours, theirs, "head/")
    assert 0.01 < ours["head/classifier/kernel"].std() < 0.03
    assert not ours["head/classifier/bias"].any()
    assert "new: head/classifier/bias, head/classifier/kernel" in words
    old = NAMES[0] if changed == "all" else "h"
    assert f"the data have other classes: {names[NAMES.index(old)]!r} instead of {old!r}" in words


def test_the_same_classes_in_another_order_reorder_the_classifier(digits, tmp_path):
    config, theirs = with_names(tmp_path, digits)
    names = ("c", "a", "b", *NAMES[3:])
    ours, words = initial(config, names=names)
    assert_same_except(ours, theirs, "head/")
    for label, name in enumerate(names):
        old = NAMES.index(name)
        for path in ("head/classifier/kernel", "head/classifier/bias"):
            np.testing.assert_array_equal(ours[path][..., label], theirs[path][..., old])
    assert "reordered" in words and "new" not in words


@pytest.mark.parametrize(
    ("trained", "names", "note"),
    [(NAMES, NAMES, ""), (None, NAMES, "the weights have no labels.txt"),
     (NAMES, tuple("01234567"), "the data have no labels.txt"),
     (tuple("01234567"), NAMES, "the weights have no labels.txt")],
)  # fmt: skip
def test_equal_or_unknown_classes_keep_the_classifier(trained, names, note, digits, tmp_path):
    config, theirs = with_names(tmp_path, digits, trained)
    ours, words = initial(config, names=names)
    assert_same_except(ours, theirs)
    assert "new" not in words and note in words and ("not compared" in words) == bool(note)


def test_init_weights_chooses_plain_or_averaged_weights(digits, tmp_path):
    averaged = make_run(tmp_path / "ema", settings(digits, **{"optim.ema": 0.5}), digits, 0)
    plain = make_run(tmp_path / "none", settings(digits), digits, 0)  # half of the averaged ones
    folder = {"init.checkpoint": str(tmp_path / "ema")}
    for chosen, expected, word in (
        (None, averaged, "averaged weights from"), ("ema", averaged, "averaged weights from"),
        ("plain", plain, "plain weights from"),
    ):  # fmt: skip
        ours, words = initial(settings(digits, **folder, **{"init.weights": chosen}))
        assert_same_except(ours, expected)
        assert words.startswith(word)
    folder = {"init.checkpoint": str(tmp_path / "none")}
    _, words = initial(settings(digits, **folder, **{"init.weights": "plain"}))
    assert words.startswith("weights from")
    with pytest.raises(UserError, match="has no averaged weights: leave out weights=ema"):
        initial(settings(digits, **folder, **{"init.weights": "ema"}))


def test_a_run_resumes_only_on_the_classes_of_its_classifier(digits, tmp_path):
    with_names(tmp_path, digits)
    config = settings(digits, resume=str(tmp_path))
    model = build.settings(config, 8).model
    for names in (NAMES, tuple("01234567")):
        assert train.initial_weights(config, model, names) is None
    for names in (NAMES[::-1], (*NAMES[:7], "i")):
        with pytest.raises(UserError, match=r"^resume=.* was trained on other classes"):
            train.initial_weights(config, model, names)


@pytest.mark.parametrize("classes", [8, foreign.CLASSES])
def test_a_classifier_initialises_a_detector_with_a_new_head(classes, converted, digits):
    """Even for as many classes; larger clips have more positions."""
    folder, source = converted
    larger = {"model.size": 48, "data.short_side": 48, "augment.jitter": (50, 60)}
    config = settings(digits, **FLAGS | larger | {"init.checkpoint": str(folder)})
    ours, words = initial(config, classes)
    assert_same_except(ours, source, "head/", "positions/space")
    assert 0.01 < ours["head/classifier/kernel"].std() < 0.03
    assert ours["positions/space"].shape > source["positions/space"].shape
    assert "1 resized" in words and words.endswith("because the task is detection")


def test_other_clip_sizes_resize_positional_embeddings_alone(converted, digits):
    folder, source = converted
    larger = {"model.frames": 8, "model.size": 48, "data.short_side": 48}
    config = settings(digits, **{"init.checkpoint": str(folder)}, **larger)
    ours, words = initial(config, classes=foreign.CLASSES)
    assert_same_except(ours, source, "positions/space", "positions/time")
    assert ours["positions/space"].shape == (12, 12, 8) and ours["positions/time"].shape == (4, 8)
    assert "2 resized" in words


@pytest.mark.parametrize("inflation", ["centre", "mean", "repeat"])
def test_an_image_models_weights_are_inflated(inflation, digits, tmp_path):
    image = settings(digits, **IMAGE)
    theirs = make_run(tmp_path, image, digits, 0)
    video = {"model.variant": "mvitv2_s_16x4", "init.checkpoint": str(tmp_path)}
    ours, words = initial(settings(digits, **video, **{"init.inflate": inflation}))
    kernel, one = ours["patch_embed/proj/kernel"], theirs["patch_embed/proj/kernel"][0]
    frames = {"centre": [0 * one, one, 0 * one], "mean": [one / 3] * 3, "repeat": [one] * 3}
    np.testing.assert_allclose(kernel, frames[inflation], rtol=1e-6)
    assert "inflated" in words
    for path in ("blocks/1/attn/qkv/kernel", "norm/scale", "head/classifier/kernel"):
        np.testing.assert_array_equal(ours[path], theirs[path])
    assert not ours["blocks/0/attn/relative/time"].any()
    assert ours["positions/class_token"].any()  # the image model has none


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"model.width": 16}, "blocks/0/attn"), ({"model.depths": (1, 1, 1)}, "blocks/3/"),
     ({"model.mlp_ratio": 2}, "mlp/fc1")],
)  # fmt: skip
def test_weights_of_another_architecture_raise_an_error(converted, digits, changes, word):
    with pytest.raises(WeightsError) as error:
        initial(settings(digits, **{"init.checkpoint": str(converted[0])}, **changes))
    assert word in str(error.value) and "problem: " in str(error.value)


# Order of the sources.


def first(config, digits, folder):
    """Returns the parameters and the step that a run starts from, and its message."""
    fresh = state_of(config, digits, drawn(config, salt=0.5))
    model = build.settings(config, 8).model
    started = workdir.has_checkpoint(folder)
    initial = None if started else train.initial_weights(config, model)
    with closing(Checkpoints(folder)) as checkpoints:
        state, words = train.initial_state(config, fresh, checkpoints, initial)
    return flatten_dict(state.params, sep="/"), int(state.step), words


@pytest.fixture
def sources(digits, tmp_path):
    """Three runs: of this workdir, of `resume`, of `init.checkpoint`; and their weights."""
    here, other, source = (tmp_path / name for name in ("here", "other", "source"))
    config = settings(digits)
    weights = {
        path: make_run(path, config, digits, salt, step)
        for path, salt, step in ((here, 1, 3), (other, 2, 4), (source, 4, 5))
    }
    return here, other, source, weights


def test_the_workdir_overrides_resume_which_overrides_init_checkpoint(sources, digits, tmp_path):
    here, other, source, weights = sources
    new, fresh = tmp_path / "new", flatten_dict(drawn(settings(digits), 0.5), sep="/")
    both = {"resume": str(other), "init.checkpoint": str(source)}
    for changes, folder, expected, number, message in (
        (both, here, weights[here], 3, "this workdir's last checkpoint"),
        (both, new, weights[other], 4, str(other)),
        ({"init.checkpoint": str(source)}, new, weights[source], 0, str(source)),
        ({}, new, fresh, 0, "starts from fresh weights"),
    ):
        params, step, words = first(settings(digits, **changes), digits, folder)
        assert_same_except(params, expected)
        assert step == number and message in words


def test_averaged_parameters_start_as_a_copy_of_the_parameters(converted, digits, tmp_path):
    changes = {"init.checkpoint": str(converted[0]), "optim.ema": 0.9}
    config = settings(digits, **changes)
    fresh = state_of(config, digits, drawn(config, 0.5))
    initial = train.initial_weights(config, build.settings(config, 8).model)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        state, _ = train.initial_state(config, fresh, checkpoints, initial)
    assert state.ema is not None and int(state.step) == 0
    assert_same_except(flatten_dict(state.params, sep="/"), converted[1], "head/")
    assert_same_except(flatten_dict(state.ema, sep="/"), flatten_dict(state.params, sep="/"))
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True)
    # The training step donates the buffers of both.
    assert all(a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() for a, b in pairs)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"resume": "{gone}"}, "resume={gone} holds no checkpoint"),
        ({"resume": "{empty}"}, "resume={empty} holds no checkpoint"),
        ({"resume": "{narrow}"}, "is for another architecture"),
        ({"resume": "{folder}"}, "{folder}"),  # converted: no state to resume from
        ({"init.checkpoint": "{gone}"}, "{gone} holds no run"),
        ({"init.checkpoint": "{empty}"}, "there is no checkpoint in {empty}"),
    ],
)  # fmt: skip
def test_unusable_source_folders_raise_a_one_sentence_error(
    changes, sentence, converted, digits, tmp_path
):
    folders = {name: tmp_path / name for name in ("gone", "empty", "narrow")}
    workdir.record_config(settings(digits), folders["empty"])
    make_run(folders["narrow"], settings(digits, **{"model.mlp_ratio": 2}), digits, 0)
    folders["folder"] = converted[0]
    config = settings(digits, **{key: value.format(**folders) for key, value in changes.items()})
    before = {p for p in tmp_path.rglob("*") if folders["empty"] not in p.parents}
    with pytest.raises(UserError) as error:
        first(config, digits, tmp_path / "run")
    assert sentence.format(**folders) in str(error.value)
    assert "\n" not in str(error.value)
    # No folder that is only read from is created.
    after = {p for p in tmp_path.rglob("*") if folders["empty"] not in p.parents}
    created = {p for p in after - before if tmp_path / "run" not in (p, *p.parents)}
    assert created == set()


# The program.


@pytest.mark.slow
def test_resuming_in_another_workdir_equals_an_uninterrupted_run(
    reference, digits, tmp_path, capsys
):
    stopped, resumed = tmp_path / "stopped", tmp_path / "resumed"
    with group.at_step(5, group.stop):
        assert train.train(tiny.config(digits, **tiny.RECIPE), str(stopped)) == 128 + signal.SIGTERM
    before = group.final_state(stopped)
    capsys.readouterr()
    assert train.train(tiny.config(digits, **tiny.RECIPE, resume=str(stopped)), str(resumed)) == 0
    assert f"resumes from the last checkpoint of {stopped}" in capsys.readouterr().out
    group.assert_same_state(resumed, reference)
    again = group.final_state(stopped)  # only read from
    assert all((again[name] == values).all() for name, values in before.items())


def test_another_training_list_is_logged_on_resume(tmp_path):
    class Log(Logbook):
        lines: ClassVar[list[str]] = []

        def __init__(self):
            self.first = True

        def print(self, text):
            self.lines.append(text)

    def videos(*paths):
        return VideoList(paths, np.zeros(len(paths), np.int32), ("a",), "train.csv")

    def logged(listed, steps):
        Log.lines.clear()
        train.log_list_changes(Log(), str(tmp_path), listed, steps)
        return Log.lines

    before = videos("/x/a", "/x/b")
    assert logged(before, 12) == []  # there is no history
    writer = history.Writer(tmp_path)
    checksum = fingerprint(before)["names in order"]
    writer.line("start", 0, {"videos": 2, "steps": 12, "list_checksum": checksum})
    writer.close()
    assert logged(videos("/elsewhere/a", "/elsewhere/b"), 12) == []
    assert logged(videos(*before.paths * 2), 24) == [
        "note: train.csv has 4 videos, and had 2 at the last start of this run: it ends after step "
        "24 instead of 12"
    ]
    [line] = logged(videos("/x/a", "/x/c"), 12)
    assert line.startswith("note: train.csv names other videos")
