"""The input pipeline: its batches depend on the seed and the step alone."""

import dataclasses
import itertools
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline
from mvit_jax.data.augmentation import Augmentation
from mvit_jax.data.formats.video_list import read_video_list

# Imported as a module: pytest would collect pipeline.test_batches as a test of this file.
from mvit_jax.data.media import parts
from mvit_jax.data.media import video as decoding
from mvit_jax.data.randaugment import parse
from tests.data.bar_codes import BAR, BITS, HEIGHT, bar_code, decode_all, write
from tests.data.loading import loading
from tests.support.refusals import refused
from tests.support.stand_ins import until

SETTINGS = pipeline.ClipSettings(
    frames=4, stride=2, size=16, short_side=20, augmentation=Augmentation(crop_area=(0.3, 1.0))
)
CENTRED = Augmentation(crop_area=None)
FRAMES = 40


def write_video(path, seed):
    """Writes a video with the bar code of each frame's number above noise drawn from `seed`."""
    shape = (HEIGHT // 2, BITS * BAR // 4, 3)
    noise = np.random.default_rng(seed).integers(0, 256, shape, np.uint8).repeat(4, axis=1)
    bars = [bar_code(number)[: HEIGHT // 2] for number in range(FRAMES)]
    write(path, [np.concatenate([above, noise]) for above in bars])


def write_list(folder, count):
    lines = [f"{index}.mp4 {index}" for index in range(count)]
    (folder / "list.csv").write_text("\n".join(lines))
    return read_video_list(folder, "list.csv")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Seven videos; the label of each is its index and identifies it in a batch."""
    folder = tmp_path_factory.mktemp("good")
    for index in range(7):
        write_video(folder / f"{index}.mp4", seed=index)
    return write_list(folder, 7)


BROKEN = {1: "empty", 4: "cut off", 6: "not a video"}


@pytest.fixture(scope="module")
def mixed(good, tmp_path_factory):
    """Ten videos, three of which fail to decode for different reasons."""
    folder = tmp_path_factory.mktemp("mixed")
    whole = Path(good.paths[0]).read_bytes()
    for index in range(10):
        if index not in BROKEN:
            write_video(folder / f"{index}.mp4", seed=index)
    (folder / "1.mp4").touch()
    (folder / "4.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "6.mp4").write_text("not a video at all " * 50)
    return write_list(folder, 10)


def train(videos, **kwargs):
    arguments: dict[str, Any] = {"seed": 0, "batch": 8, "steps": 4, "threads": 2} | kwargs
    return list(pipeline.train_batches(videos, SETTINGS, **loading(arguments)))


def join(hosts):
    """Returns the batches of all hosts, concatenated along the rows."""
    return [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            assert batch[key].dtype == other[key].dtype
            assert np.array_equal(batch[key], other[key]), key


def split(batch, hosts):
    return [range(host * batch // hosts, (host + 1) * batch // hosts) for host in range(hosts)]


def test_train_batches_have_the_promised_shapes(good):
    (batch,) = train(good, steps=1)
    assert batch.keys() == {"clip", "label", "broken"}
    assert batch["clip"].shape == (8, 4, 16, 16, 3) and batch["clip"].dtype == np.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    assert batch["broken"].shape == (8,) and batch["broken"].dtype == np.int32
    assert (batch["broken"] == -1).all()


@pytest.mark.parametrize(
    ("hosts", "options"),
    [
        *((1, {"threads": threads}) for threads in (0, 3)),
        *((hosts, {"threads": 1}) for hosts in (2, 4)),
        (2, {"repeats": 2}),
        *((1, {"start": start}) for start in (3, 4, 9)),  # of 4 steps
        pytest.param(2, {"repeats": 2, "processes": 2, "start": 1}, marks=pytest.mark.slow),
    ],
)
def test_training_batches_do_not_depend_on_hosts_threads_or_resuming(mixed, hosts, options):
    expected = train(mixed, repeats=options.get("repeats", 1))
    assert any((batch["broken"] >= 0).any() for batch in expected)
    parts = [train(mixed, rows=rows, **options) for rows in split(8, hosts)]
    assert all(len(batch["label"]) == 8 // hosts for part in parts for batch in part)
    assert_equal(join(parts), expected[options.get("start", 0) :])


def test_repeats_share_one_decoded_clip_and_differ_in_augmentation(good):
    """A batch of two repeats holds each clip of a batch of half its size twice."""
    settings = dataclasses.replace(SETTINGS, size=HEIGHT, short_side=HEIGHT, augmentation=CENTRED)

    def batches(settings, **kwargs):
        options = loading({"seed": 0, "steps": 3, "threads": 0} | kwargs)
        return list(pipeline.train_batches(good, settings, **options))

    single = batches(settings, batch=4)
    for one, two in zip(single, batches(settings, batch=8, repeats=2), strict=True):
        assert np.array_equal(two["label"], np.repeat(one["label"], 2))
        assert np.array_equal(two["broken"], np.repeat(one["broken"], 2))
        # Without random augmentation, both repeats equal the clip.
        assert np.array_equal(two["clip"], np.repeat(one["clip"], 2, axis=0))
    for batch in batches(SETTINGS, batch=8, repeats=2):
        pairs = batch["clip"].reshape(4, 2, *batch["clip"].shape[1:])
        assert all(not np.array_equal(*pair) for pair in pairs)


def test_repeats_must_divide_the_rows_of_a_host(good):
    for kwargs in (
        {"repeats": 3},
        {"repeats": 2, "rows": range(3)},
        {"repeats": 4, "rows": range(2, 6)},
    ):
        with pytest.raises(UserError, match=r"must be a multiple of data\.repeats="):
            train(good, **kwargs)


def test_every_epoch_visits_each_video_once_in_a_new_order(good):
    # 4 does not divide 7: epochs begin and end within batches.
    orders = set()
    for seed in (0, 2):
        batches = train(good, batch=4, steps=14, seed=seed)
        epochs = np.concatenate([batch["label"] for batch in batches]).reshape(8, 7)
        assert all(sorted(order) == list(range(7)) for order in epochs)
        orders |= {tuple(order) for order in epochs}
    assert len(orders) == 16  # of 5,040 orders


def test_augmentation_differs_each_time_a_video_is_loaded(good):
    batches = train(good, batch=7, steps=12)
    clips = {label: [] for label in range(7)}
    for batch in batches:
        for label, clip in zip(batch["label"], batch["clip"], strict=True):
            clips[int(label)].append(clip)
    for versions in clips.values():
        assert len(versions) == 12
        assert all(not np.array_equal(a, b) for a, b in itertools.combinations(versions, 2))


def test_decode_failures_are_replaced_and_reported(mixed):
    batches = train(mixed, batch=10, steps=3)  # a step is an epoch
    for batch in batches:
        reported = batch["broken"][batch["broken"] >= 0]
        assert sorted(reported) == sorted(BROKEN)
        # Replacements carry their own labels; the other rows are the videos of the epoch.
        assert not set(batch["label"]) & set(BROKEN)
        decoded = batch["label"][batch["broken"] == -1]
        assert sorted(decoded) == sorted(set(range(10)) - set(BROKEN))
        for clip in batch["clip"]:
            assert clip.std() > 10  # none is blank
    for index, reason in BROKEN.items():
        assert reason in str(decoding.decode_failure(mixed.opened(index, 4)))
    # Different rows get different replacements: 9 draws from 7 videos.
    assert len({int(n) for batch in batches for n in batch["label"][batch["broken"] >= 0]}) > 2


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 2}, {"processes": 1}])
def test_decode_failures_of_all_videos_end_with_a_one_sentence_error(tmp_path, options):
    for index in range(3):
        (tmp_path / f"{index}.mp4").write_text("hello")
    listed = f"10 videos drawn from {tmp_path}/list.csv in a row"
    failure = f"last failure: {tmp_path}/"
    with refused(listed, failure, ".mp4 cannot be decoded: it is not a video"):
        train(write_list(tmp_path, 3), **options)


def test_a_training_clip_has_the_sampled_frames(good):
    """The decoded frame numbers follow the sampling formula with an equal generator."""
    settings = pipeline.ClipSettings(
        frames=4, stride=4, size=HEIGHT, short_side=HEIGHT, augmentation=CENTRED
    )
    for seed in range(5):
        (clip,), label = pipeline.load_train_clips(good, 0, settings, np.random.default_rng(seed))
        assert label == 0
        start = np.random.default_rng(seed).uniform(0, FRAMES - 16)
        expected = [int(start + 15 * i / 3) for i in range(4)]
        with decoding.Video(good.paths[0]) as video:
            assert np.array_equal(clip, video.frames(expected)[:, :, 16:48])


def evaluate(videos, **kwargs):
    arguments: dict[str, Any] = {"clips": 2, "crops": 1, "batch": 4, "threads": 2} | kwargs
    return list(pipeline.test_batches(videos, SETTINGS, **loading(arguments)))


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("batch", [2, 4, 10, 16])
def test_each_video_is_tested_once(mixed, batch, hosts):
    batches = join([evaluate(mixed, batch=batch, rows=rows) for rows in split(batch, hosts)])
    assert len(batches) == -(-10 // batch)
    for part in batches:
        assert part["clip"].shape == (batch, 2, 4, 16, 16, 3)
        assert (part["label"].dtype, part["video"].dtype) == (np.int32, np.int32)
        assert part["valid"].dtype == np.bool_
    video, label, valid = (
        np.concatenate([part[key] for part in batches]) for key in ("video", "label", "valid")
    )
    assert video.tolist() == list(range(10)) + [-1] * (len(video) - 10)
    assert label[:10].tolist() == list(range(10))
    assert set(video[~valid]) - {-1} == set(BROKEN)
    clips = np.concatenate([part["clip"] for part in batches])
    assert (clips[~valid] == 0).all()
    assert all(clip.std() > 10 for clip in clips[valid])


@pytest.mark.parametrize("shuffle", [{}, {"shuffle_seed": 3}])
def test_testing_does_not_depend_on_hosts_or_threads(mixed, shuffle):
    expected = evaluate(mixed, threads=0, **shuffle)
    options = [(1, {"threads": 1}), (2, {"threads": 3}), (4, {"threads": 2})]
    for hosts, option in options if shuffle else [*options, (1, {"processes": 2})]:
        parts = [evaluate(mixed, rows=rows, **option, **shuffle) for rows in split(4, hosts)]
        assert_equal(join(parts), expected)


def bits_of(image):
    """Returns the bits of the bars in a crop of full height, from the left."""
    return (image[HEIGHT // 4, BAR // 2 :: BAR].mean(axis=-1) > 120).astype(int).tolist()


def test_views_are_ordered_by_clip_and_then_by_crop(good):
    # Crops as high as the frames: the left one shows bits 0 to 3, the middle one 2 to 5, the
    # right one 4 to 7.
    settings = pipeline.ClipSettings(frames=4, stride=2, size=HEIGHT, short_side=40)
    views = pipeline.load_views(good, 0, settings, clips=3, crops=3)
    assert views.shape == (9, 4, HEIGHT, HEIGHT, 3)
    for clip in range(3):
        start = clip * ((FRAMES - 8) // 2)
        for crop in range(3):
            for i in range(4):
                number = int(start + i * 7 / 3)
                expected = [(number >> (2 * crop + bit)) & 1 for bit in range(4)]
                assert bits_of(views[3 * clip + crop][i]) == expected


def test_a_single_crop_uses_the_configured_short_side(good):
    views = pipeline.load_views(good, 2, SETTINGS, clips=1, crops=1)
    frames = decode_all(good.paths[2])
    start = (FRAMES - 8) // 2
    for i in range(4):
        resized = cv2.resize(frames[int(start + i * 7 / 3)], (40, 20))  # short side 20 of 32
        assert np.array_equal(views[0, i], resized[2:18, 12:28])


def test_several_clip_counts_give_the_views_of_each_count(good):
    together = evaluate(good, clips=(1, 3), crops=3, batch=7)[0]["clip"]
    apart = [evaluate(good, clips=k, crops=3, batch=7)[0]["clip"] for k in (1, 3)]
    assert np.array_equal(together, np.concatenate(apart, axis=1))


def test_whole_images_are_resized_to_the_square_without_cropping(good):
    settings = dataclasses.replace(SETTINGS, frames=1, whole=True, interpolation="bicubic")
    view = pipeline.load_views(good, 3, settings, clips=1, crops=1)
    middle = decode_all(good.paths[3])[int((FRAMES - 2 / 30 * 30) // 2)]
    expected = Image.fromarray(middle).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(view[0, 0], np.asarray(expected))


def test_shuffling_permutes_the_frames_of_every_clip(good):
    plain = evaluate(good, clips=2, crops=3, batch=7)[0]["clip"]
    shuffled = evaluate(good, clips=2, crops=3, batch=7, shuffle_seed=0)[0]["clip"]
    orders = {}
    for video, clip in itertools.product(range(7), range(2)):
        left = 3 * clip  # the left crop shows the low bits, by which frames differ
        matches = [
            [np.array_equal(frame, other) for other in plain[video, left]]
            for frame in shuffled[video, left]
        ]
        order = [match.index(True) for match in matches]
        assert sorted(order) == [0, 1, 2, 3]
        for view in range(left, left + 3):  # the crops of a clip stay together
            assert np.array_equal(shuffled[video, view], plain[video, view, order])
        orders[video, clip] = tuple(order)
    # The orders of videos and clips are drawn independently from 24.
    assert len({orders[video, 0] for video in range(7)}) > 3
    assert sum(orders[video, 0] != orders[video, 1] for video in range(7)) > 3
    other = evaluate(good, clips=2, crops=3, batch=7, shuffle_seed=1)[0]["clip"]
    assert not np.array_equal(shuffled, other)


def test_the_data_set_is_not_printed(good, monkeypatch):
    """Grain prints mapped objects; printing a large set took longer than loading an epoch."""
    monkeypatch.setattr(type(good), "__repr__", None)
    with pytest.raises(TypeError):
        repr(good)
    assert len(train(good, steps=1)) == 1 and len(evaluate(good)) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_loading_ends_with_the_iterator(good, monkeypatch, fails):
    loaded = []
    first = pipeline.epoch_order(7, 0, 0)[0]

    def load(videos, index, settings, rng, repeats):
        loaded.append(index)
        time.sleep(0.005)
        if fails and index != first:
            raise UserError("enough")
        return np.zeros((1, 4, 16, 16, 3), np.uint8), 0

    def prefetching():
        return any(thread.name.startswith("grain-prefetch") for thread in threading.enumerate())

    until(lambda: not prefetching())  # threads of earlier tests
    monkeypatch.setattr(pipeline, "load_train_clips", load)
    batches = pipeline.train_batches(good, SETTINGS, seed=0, batch=1, steps=1000, prefetch=1000)
    next(batches)
    assert prefetching()
    if fails:
        with pytest.raises(UserError) as caught:
            list(batches)
        assert str(caught.value) == "enough"
        assert caught.tb is not None  # keeps the iterator alive
    else:
        batches.close()
    until(lambda: not prefetching())
    assert len(loaded) < 500  # of 1,000 requested


def test_impossible_settings_raise_before_loading(good):
    with pytest.raises(UserError, match=r"224 pixels .* short side is 200"):
        pipeline.ClipSettings(frames=16, stride=4, size=224, short_side=200)
    for rows in (range(4, 9), range(0, 8, 2), range(3, 3), range(-1, 4)):
        with pytest.raises(ValueError, match="contiguous"):
            pipeline.train_batches(good, SETTINGS, seed=0, batch=8, steps=1, rows=rows)


@pytest.mark.parametrize("randaugment", [None, "rand-m7-n4-inc1"])
@pytest.mark.parametrize("crop", [{}, {"crop_area": None, "jitter": (36, 60)}])
def test_large_frames_are_processed_in_parts_with_the_same_result(
    randaugment, crop, good, monkeypatch
):
    augmentation = Augmentation(randaugment=randaugment and parse(randaugment), **crop)
    settings = dataclasses.replace(SETTINGS, augmentation=augmentation)

    def load():
        clips, _ = pipeline.load_train_clips(good, 1, settings, np.random.default_rng(3), repeats=3)
        return clips, pipeline.load_views(good, 1, settings, clips=3, crops=3)

    whole = load()
    monkeypatch.setattr(parts, "_BYTES_IN_PARTS", 1)
    for part, expected in zip(load(), whole, strict=True):
        np.testing.assert_array_equal(part, expected)


def test_memory_for_views_of_large_frames_does_not_grow_with_their_number(tmp_path):
    """Forty frames of 1600x1200 have 230 MB."""
    frame = cv2.resize(bar_code(5), (1600, 1200))
    path = write(tmp_path / "large.mp4", [frame] * 40, preset="ultrafast")
    settings = dataclasses.replace(SETTINGS, frames=8, stride=4)
    tracemalloc.start()
    with decoding.Video(path) as video:
        pipeline.views(video, settings, clips=5, crops=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 140 << 20


def test_the_middle_of_a_very_long_image_is_scaled():
    line = np.zeros((1, 2, 20_000, 3), np.uint8)
    line[:, :, 9_990:10_010] = 255
    settings = dataclasses.replace(SETTINGS, frames=1, size=32, short_side=32)
    square = pipeline.test_crops(line, settings, 1)
    assert square.shape == (1, 1, 32, 32, 3) and square.min() == 255


def test_balanced_epochs_draw_classes_and_their_videos_evenly():
    labels = np.array([0] * 50 + [2] * 9 + [5] * 2 + [-1], np.int32)  # the last cannot be read
    members = pipeline.ClassMembers.of(labels)
    orders = [pipeline.balanced_order(members, 3, epoch) for epoch in range(30)]
    seen = np.zeros(62, int)
    for order in orders:
        assert len(order) == 62
        counts = np.bincount(order, minlength=62)
        seen += counts
        by_class = {label: counts[labels == label] for label in (0, 2, 5)}
        assert sorted(sum(n) for n in by_class.values()) == [20, 21, 21]
        assert all(n.max() - n.min() <= 1 for n in by_class.values())
        assert counts[61] == 0
    assert seen[:50].min() > 0  # all videos of the large class are drawn in the end
    assert len({tuple(order) for order in orders}) == 30
    again = pipeline.ClassMembers.of(labels.copy())
    np.testing.assert_array_equal(pipeline.balanced_order(again, 3, 7), orders[7])
    assert not np.array_equal(pipeline.balanced_order(again, 4, 7), orders[7])


def test_balanced_batches_depend_on_seed_and_step_alone(good):
    """Three classes of 4, 2 and 1 videos; a step of 7 clips is an epoch."""
    unbalanced = dataclasses.replace(good, labels=np.array([0, 0, 0, 0, 1, 1, 2], np.int32))
    options = {"balanced": True, "batch": 7, "steps": 12}
    batches = train(unbalanced, **options)
    for batch in batches:
        assert sorted(np.bincount(batch["label"], minlength=3)) == [2, 2, 3]
    assert_equal(train(unbalanced, **options, start=9, threads=0), batches[9:])
    hosts = [train(unbalanced, **options, rows=rows) for rows in (range(4), range(4, 7))]
    assert_equal(join(hosts), batches)
