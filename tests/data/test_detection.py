"""Clips with boxes: pixels and boxes move together, and batches depend on (seed, step) alone."""

import numpy as np
import pytest

from mvit_jax.data import detection, pipeline
from mvit_jax.data.augmentation import Augmentation
from mvit_jax.data.formats.ava import read_ava
from mvit_jax.data.loader import LoaderOptions
from mvit_jax.data.sampling import ClipSettings
from tests.data.bar_codes import BAR, BITS, HEIGHT, numbers_of, write
from tests.support.ava_folder import COLOURS, write_ava

JITTER = Augmentation(crop_area=None, jitter=(34, 60))
SETTINGS = ClipSettings(4, 2, 32, 32, sampling="key_frame", augmentation=JITTER)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = write_ava(tmp_path_factory.mktemp("ava"))
    return read_ava(folder, "train.csv", boxes="boxes.csv", class_list="classes.pbtxt", train=True)


def check_colours(clip, boxes, labels):
    """Checks that the middle of each box has the colour of its class; returns their number."""
    checked = 0
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        if min(x2 - x1, y2 - y1) < 4 or not label.any():
            continue
        colour = clip[:, round((y1 + y2) / 2), round((x1 + x2) / 2)].astype(int)
        assert np.abs(colour - COLOURS[int(label.argmax()) + 1]).max() < 40
        checked += 1
    return checked


@pytest.mark.parametrize(
    "augmentation", [JITTER, Augmentation(crop_area=(0.4, 1.0)), Augmentation(crop_area=None)]
)
def test_training_boxes_surround_their_persons(clips, augmentation):
    settings = ClipSettings(4, 2, 32, 32, sampling="key_frame", augmentation=augmentation)
    checked = 0
    for index in range(len(clips)):
        rng = np.random.default_rng(index)
        loaded = detection.load_train_clips(clips, index, settings, rng, repeats=2)
        assert loaded["clip"].shape == (2, 4, 32, 32, 3)
        assert loaded["boxes"].shape == (2, 3, 4) and loaded["label"].shape == (2, 3, 4)
        assert loaded["box_mask"].sum(1).tolist() == [2 + index % 2] * 2
        assert (loaded["boxes"] >= 0).all() and (loaded["boxes"] <= 31).all()
        for clip, boxes, labels in zip(*map(loaded.get, ("clip", "boxes", "label")), strict=True):
            checked += check_colours(clip, boxes, labels)
    assert checked > 15


def test_whole_frames_have_all_persons(clips):
    whole = ClipSettings(4, 2, 32, 32, sampling="key_frame", full_frame=True)
    for index, shape in ((0, (32, 42)), (2, (42, 32))):
        loaded = detection.load_test_clip(clips, index, whole)
        assert loaded["clip"].shape == (1, 4, *shape, 3)
        assert check_colours(loaded["clip"][0], loaded["boxes"], loaded["label"]) == 2
    # By hand: of 64x48, the short side is 32, and both axes are scaled by 42 / 64.
    [x1, y1, x2, y2] = clips.boxes(0).box[0] * [64, 48, 64, 48]
    expected = np.array([x1, y1, x2, y2]) * 42 / 64
    np.testing.assert_allclose(
        detection.load_test_clip(clips, 0, whole)["boxes"][0], expected, rtol=1e-5
    )


def test_shuffled_frames_are_those_of_the_clip_in_another_order(tmp_path):
    (tmp_path / "videos").mkdir()
    write(tmp_path / "videos/v.mp4", 120)
    (tmp_path / "test.csv").write_text("v,902,0,0,1,1,1,0\n")
    (tmp_path / "classes.pbtxt").write_text('x { name: "a" id: 1 }')
    clips = read_ava(tmp_path, "test.csv", boxes=None, class_list="classes.pbtxt", train=False)
    size = min(HEIGHT, BAR * BITS)
    whole = ClipSettings(8, 4, size, size, sampling="key_frame", full_frame=True)
    orders = [
        numbers_of(detection.load_test_clip(clips, 0, whole, shuffle)["clip"][0])
        for shuffle in (None, np.random.default_rng(0))
    ]
    assert orders[0] == list(range(44, 76, 4)) == sorted(orders[1]) != orders[1]


def batches(clips, rows, start=0, threads=0):
    return [
        *pipeline.train_batches(
            clips, SETTINGS, seed=3, batch=4, steps=4, start=start, rows=rows,
            loader=LoaderOptions(threads),
        )
    ]  # fmt: skip


def test_batches_are_a_function_of_seed_and_step(clips):
    whole = batches(clips, None)
    first, second = batches(clips, range(2), threads=2), batches(clips, range(2, 4))
    later = batches(clips, None, start=2)
    for step, batch in enumerate(whole):
        for name, values in batch.items():
            halves = np.concatenate([first[step][name], second[step][name]])
            np.testing.assert_array_equal(values, halves)
            if step >= 2:
                np.testing.assert_array_equal(values, later[step - 2][name])
    # An epoch of 8 key frames in two batches of 4.
    seen = np.concatenate([batch["boxes"][:, 0] for batch in whole])
    assert len(np.unique(seen, axis=0)) > 8  # cut differently in the second epoch


def test_a_video_that_cannot_be_decoded_is_replaced_or_black(clips, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    files = (str(tmp_path / "empty.mp4"), *clips.files[1:])
    broken = type(clips)(**{**vars(clips), "files": files})
    loaded = batches(broken, None)
    assert sum((batch["broken"] >= 0).sum() for batch in loaded) >= 4
    assert all(batch["box_mask"].any(1).all() for batch in loaded)
    [tested, *_] = pipeline.test_batches(
        broken, SETTINGS, clips=1, crops=1, batch=4, loader=LoaderOptions(0)
    )
    assert tested["valid"].tolist() == [False, False, True, True]
    assert not tested["clip"][:2].any() and not tested["box_mask"][:2].any()
