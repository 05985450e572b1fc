"""Frame sampling against the formulas of the protocol, one frame at a time."""

import math

import numpy as np
import pytest

from mvit_jax.data import sampling


def indices_one_by_one(start, span, frames, num_frames):
    """The definition: T points spread evenly from start to start + span - 1, cut to integers."""
    last = start + span - 1
    indices = []
    for i in range(frames):
        position = start if frames == 1 else start + (last - start) * i / (frames - 1)
        indices.append(min(max(int(position), 0), num_frames - 1))
    return indices


def test_effective_stride_of_16x4_is_a_little_more_than_4():
    indices = sampling.view_indices(64, 30.0, frames=16, stride=4, clips=1)
    expected = [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]
    assert indices.tolist() == [expected]
    assert indices.dtype == np.int64


@pytest.mark.parametrize("fps", [15.0, 25.0, 30.0, 30000 / 1001, 60.0])
@pytest.mark.parametrize(("frames", "stride"), [(8, 4), (16, 4), (32, 3), (40, 3), (2, 1)])
@pytest.mark.parametrize("num_frames", [1, 5, 48, 300, 301])
def test_views_are_at_the_starts_of_the_protocol(num_frames, frames, stride, fps):
    span = stride * frames * fps / 30
    delta = max(num_frames - span, 0)
    for clips in (1, 2, 3, 5, 10):
        views = sampling.view_indices(num_frames, fps, frames=frames, stride=stride, clips=clips)
        assert views.shape == (clips, frames)
        for k in range(clips):
            start = math.floor(delta / 2) if clips == 1 else k * math.floor(delta / (clips - 1))
            assert views[k].tolist() == indices_one_by_one(start, span, frames, num_frames)


@pytest.mark.parametrize("num_frames", [1, 20, 300])
@pytest.mark.parametrize("fps", [25.0, 30.0])
def test_training_clips_start_anywhere_that_leaves_room(num_frames, fps):
    span = 4 * 16 * fps / 30
    last_start = max(num_frames - span, 0)
    first_frames = set()
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        indices = sampling.train_indices(num_frames, fps, frames=16, stride=4, rng=rng)
        start = np.random.default_rng(seed).uniform(0, last_start)
        assert indices.tolist() == indices_one_by_one(start, span, 16, num_frames)
        first_frames.add(int(indices[0]))
    # Starts are real and uniform: 2,000 draws reach each whole number up to the last start.
    assert first_frames == set(range(math.ceil(last_start) or 1))


def test_clips_span_the_same_time_at_any_frame_rate():
    for fps in (15.0, 30.0, 60.0):
        clip = sampling.view_indices(int(10 * fps), fps, frames=16, stride=4, clips=1)[0]
        seconds = (clip[-1] - clip[0] + 1) / fps
        assert seconds == pytest.approx(64 / 30, abs=1.5 / fps)


def test_a_short_video_repeats_its_last_frame():
    indices = sampling.train_indices(10, 30.0, frames=8, stride=4, rng=np.random.default_rng(0))
    # 31 / 7 = 4.43 frames apart from the first one on.
    assert indices.tolist() == [0, 4, 8, 9, 9, 9, 9, 9]


def test_a_single_frame_clip_is_its_start():
    assert sampling.view_indices(11, 30.0, frames=1, stride=1, clips=1).tolist() == [[5]]
    assert sampling.view_indices(11, 30.0, frames=1, stride=1, clips=3).tolist() == [[0], [5], [10]]
