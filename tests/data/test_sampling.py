"""Frame sampling against the formulas of the protocol, one frame at a time."""

import math
from collections import Counter

import numpy as np
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.data import sampling


def indices_one_by_one(start, span, frames, num_frames):
    """Returns T evenly spaced points from start to start + span - 1, truncated to integers."""
    last = start + span - 1
    indices = []
    for i in range(frames):
        position = start if frames == 1 else start + (last - start) * i / (frames - 1)
        indices.append(min(max(int(position), 0), num_frames - 1))
    return indices


@pytest.mark.parametrize("fps", [15.0, 25.0, 30.0, 30000 / 1001, 60.0])
@pytest.mark.parametrize(("frames", "stride"), [(8, 4), (16, 4), (32, 3), (40, 3), (2, 1), (1, 1)])
@pytest.mark.parametrize("num_frames", [1, 5, 48, 300, 301])
def test_views_start_at_the_positions_of_the_test_protocol(num_frames, frames, stride, fps):
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
def test_training_clips_start_uniformly_within_the_video(num_frames, fps):
    span = 4 * 16 * fps / 30
    last_start = max(num_frames - span, 0)
    first_frames = set()
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        indices = sampling.train_indices(num_frames, fps, frames=16, stride=4, rng=rng)
        start = np.random.default_rng(seed).uniform(0, last_start)
        assert indices.tolist() == indices_one_by_one(start, span, 16, num_frames)
        first_frames.add(int(indices[0]))
    # Starts are uniform reals: 2,000 draws reach each whole number up to the last start.
    assert first_frames == set(range(math.ceil(last_start) or 1))


def bounds_one_by_one(num_frames, frames):
    """Returns the rounded bounds of T segments of (n - 1) / T frames."""
    size = (num_frames - 1) / frames
    return [(round(size * i), round(size * (i + 1))) for i in range(frames)]


@pytest.mark.parametrize("frames", [1, 2, 16, 32, 40])
@pytest.mark.parametrize("num_frames", [1, 2, 5, 9, 16, 17, 45, 117, 1000])
def test_segment_views_are_the_middle_frames_of_the_segments(num_frames, frames):
    bounds = bounds_one_by_one(num_frames, frames)
    assert bounds[0][0] == 0 and bounds[-1][1] == num_frames - 1
    (clip,) = sampling.view_indices(
        num_frames, 12.0, frames=frames, stride=4, clips=1, sampling="segments"
    )
    assert clip.dtype == np.int64
    assert clip.tolist() == [(start + end) // 2 for start, end in bounds]


@pytest.mark.parametrize(("num_frames", "frames"), [(50, 8), (9, 4), (5, 16), (1, 3), (20, 1)])
def test_training_draws_uniformly_from_each_segment(num_frames, frames):
    draws = 4000
    rng = np.random.default_rng(0)
    options = {"frames": frames, "stride": 4, "sampling": "segments", "rng": rng}
    clips = np.stack([sampling.train_indices(num_frames, 12.0, **options) for _ in range(draws)])
    assert clips.shape == (draws, frames)
    assert (np.diff(clips, axis=1) >= 0).all()
    for index, (start, end) in enumerate(bounds_one_by_one(num_frames, frames)):
        counts = np.bincount(clips[:, index] - start, minlength=end - start + 1)
        expected = draws / (end - start + 1)
        assert len(counts) == end - start + 1  # includes both ends
        assert np.abs(counts - expected).max() <= 5 * math.sqrt(expected)
    if frames > 1 and num_frames > 2 * frames:  # segments are drawn independently
        assert abs(np.corrcoef(clips[:, 0], clips[:, 1])[0, 1]) < 0.1


def strided_one_by_one(start, frames, stride, num_frames):
    return [min(max(start + i * stride, 0), num_frames - 1) for i in range(frames)]


@pytest.mark.parametrize(("frames", "stride"), [(16, 4), (32, 3), (8, 1), (1, 4)])
@pytest.mark.parametrize("num_frames", [1, 7, 60, 61, 62, 300, 731])
def test_strided_views_are_spread_evenly(num_frames, frames, stride):
    room = max(num_frames - ((frames - 1) * stride + 1), 0)
    for clips in (1, 2, 3, 10):
        views = sampling.view_indices(
            num_frames, 24.0, frames=frames, stride=stride, clips=clips, sampling="stride"
        )
        assert views.shape == (clips, frames) and views.dtype == np.int64
        for k in range(clips):
            start = room // 2 if clips == 1 else round(room / (clips - 1) * k)
            assert views[k].tolist() == strided_one_by_one(start, frames, stride, num_frames)
        # The clips cover the whole video.
        if clips > 1 and room > 0:
            assert views[0, 0] == 0 and views[-1, -1] == num_frames - 1


@pytest.mark.parametrize("num_frames", [1, 20, 61, 62, 90])
def test_strided_training_clips_start_at_any_frame(num_frames):
    room = num_frames - 61
    first, last = min(room, 0), max(room, 0)
    expected = {tuple(strided_one_by_one(s, 16, 4, num_frames)) for s in range(first, last + 1)}
    rng = np.random.default_rng(0)
    draws = 200 * (last - first + 1)
    options = {"frames": 16, "stride": 4, "sampling": "stride", "rng": rng}
    clips = (sampling.train_indices(num_frames, 24.0, **options) for _ in range(draws))
    starts = Counter(tuple(clip.tolist()) for clip in clips)
    assert set(starts) == expected
    if len(expected) == last - first + 1:  # else several starts give the same frames
        assert max(abs(count - 200) for count in starts.values()) < 5 * math.sqrt(200)


def test_several_clips_of_segments_are_rejected():
    with pytest.raises(UserError, match=r"5 clips .*: set eval\.clips=1"):
        sampling.view_indices(50, 12.0, frames=8, stride=1, clips=5, sampling="segments")


@pytest.mark.parametrize("jitter", [0.0, 0.45])
def test_the_nearest_frames_of_a_constant_rate_are_its_own(jitter):
    rng = np.random.default_rng(0)
    seconds = (np.arange(300) + rng.uniform(-jitter, jitter, 300)) / 29.97
    indices = rng.integers(0, 300, (5, 16))
    nearest = sampling.nearest_frames(indices, 29.97, seconds)
    assert np.array_equal(nearest, indices)


def test_nearest_frames_are_those_of_the_times():
    rng = np.random.default_rng(0)
    seconds = np.cumsum(rng.uniform(0.01, 0.3, 200))
    indices, fps = rng.integers(0, 200, 50), 199 / (seconds[-1] - seconds[0])
    seconds -= seconds[0]
    expected = [np.abs(seconds - index / fps).argmin() for index in indices]
    assert sampling.nearest_frames(indices, fps, seconds).tolist() == expected


def test_spans_at_a_very_low_frame_rate_do_not_run_backwards():
    indices = sampling.view_indices(6, 0.1, frames=16, stride=4, clips=3)
    assert (np.diff(indices, axis=1) == 0).all()
