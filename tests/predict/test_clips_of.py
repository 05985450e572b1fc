"""Clips decoded in one pass, against `Video.frames` and the pipeline of training and test."""

import itertools
from dataclasses import replace

import av
import numpy as np
import pytest

from mvit_jax.data import pipeline, sampling
from mvit_jax.data.media.images import DecodeError
from mvit_jax.data.media.video import Video
from mvit_jax.data.pipeline import ClipSettings
from mvit_jax.predict.windows import clips_of
from tests.predict.small import textured, write_video

SETTINGS = ClipSettings(frames=4, stride=4, size=32, short_side=32)


def crop(settings, crops):
    return lambda frames: pipeline.test_crops(frames, settings, crops)


@pytest.fixture(
    scope="module",
    params=[{"g": "1000", "bf": "0"}, {"g": "12", "bf": "2"}],
    ids=["one key frame", "many, and B-frames"],
)
def path(request, tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("v") / "a.mp4", textured(200), **request.param)


def test_in_order_returns_the_frames_of_plain_decoding(path):
    numbers = [3, 4, 50, 51, 120, 199]
    with Video(path) as video:
        got = dict(video.in_order(numbers))
    assert list(got) == numbers
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for number, frame in got.items():
        apart = [np.abs(frame.astype(int) - plain).mean() for plain in frames]
        assert apart[number] < min(0.5, apart[number - 1])  # frames repeat after 100


@pytest.mark.parametrize("crops", [1, 3])
def test_clips_are_the_views_of_the_test_protocol(path, crops):
    settings = replace(SETTINGS, short_side=40)
    with Video(path) as video:
        indices = sampling.view_indices(200, 30.0, frames=4, stride=4, clips=7)
        clips = list(clips_of(video, indices, crop(settings, crops)))
        expected = pipeline.views(video, settings, clips=7, crops=crops)
    np.testing.assert_array_equal(np.concatenate(clips), expected)


def test_overlapping_clips_decode_each_frame_once(path, monkeypatch):
    indices = np.arange(0, 184, 4)[:, None] + np.arange(0, 16, 4)
    converted, decoded = [], itertools.count()
    with Video(path) as video:
        original, rgb = video._decoded, video._rgb

        def counted(numbers, jumping):
            for item in original(numbers, jumping):
                next(decoded)
                yield item

        monkeypatch.setattr(video, "_decoded", counted)
        monkeypatch.setattr(video, "_rgb", lambda frame: converted.append(1) or rgb(frame))
        clips = list(clips_of(video, indices, crop(SETTINGS, 1)))
    assert len(clips) == 46 and len(converted) == len(np.unique(indices))
    assert next(decoded) <= 200


def test_a_damaged_file_raises_at_the_damaged_frames(path, tmp_path):
    data = bytearray(path.read_bytes())
    start = len(data) // 2
    data[start : start + len(data) // 3] = bytes(len(data) // 3)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    indices = np.arange(0, 180)[:, None] + np.arange(0, 16, 4)
    with pytest.raises(DecodeError), Video(broken) as video:
        list(clips_of(video, indices, crop(SETTINGS, 1)))


def test_missing_frames_at_the_end_repeat_the_last_frame(path, monkeypatch):
    with Video(path) as video:
        original, end = video._decoded, 195
        monkeypatch.setattr(
            video, "_decoded", lambda *args: (pair for pair in original(*args) if pair[0] < end)
        )
        got = dict(video.in_order([190, 194, 198]))
        end = 200
        np.testing.assert_array_equal(got[198], video.frames([194])[0])
        end = 99
        with pytest.raises(DecodeError, match=r"decoding ends after 9\d of its 200 frames"):
            list(video.in_order([90, 150]))
