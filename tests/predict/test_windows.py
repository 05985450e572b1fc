"""Windows over long videos and segments, against loops written from their definitions."""

import itertools

import numpy as np
import pytest

from mvit_jax.data import sampling
from mvit_jax.data.media.video import Video
from mvit_jax.data.pipeline import ClipSettings
from mvit_jax.predict.windows import Timeline, clock, interval, is_long, windows
from tests.data.bar_codes import write

SHAPES = [  # frames of the video, its rate, T, tau
    (900, 30.0, 16, 4), (901, 29.97, 8, 4), (333, 25.0, 8, 8),
    (5000, 59.94, 32, 3), (40, 3.0, 8, 4),
]  # fmt: skip


@pytest.mark.parametrize(("count", "fps", "frames", "stride"), SHAPES)
def test_windows_cover_a_video_and_match_the_clip_sampling(count, fps, frames, stride):
    result = windows(count, fps, frames=frames, stride=stride)
    span = frames * stride * fps / 30
    starts = [round(s * fps) for s in result.starts]
    assert result.starts == pytest.approx(np.asarray(starts) / fps)  # whole frames
    expected = []
    while (at := len(expected) * max(span / 2, 1)) < count - span:
        expected.append(int(at))
    assert starts == [*expected, int(max(count - span, 0))]
    for start, row in zip(starts, result.indices, strict=True):
        # The definition: T frames at even distances, the last one at the end of the span.
        for i, number in enumerate(row):
            position = start + i * (span - 1) / (frames - 1)
            assert number == min(int(position), count - 1) or abs(position - round(position)) < 1e-6
    assert result.ends[-1] == pytest.approx(count / fps)
    assert (result.ends[:-1] > result.starts[1:]).all()
    # A video of one window is the test protocol's clip.
    one = windows(int(span), fps, frames=frames, stride=stride)
    clip = sampling.view_indices(int(span), fps, frames=frames, stride=stride, clips=1)
    np.testing.assert_array_equal(one.indices[-1:], clip)


def test_windows_of_image_models_are_the_middle_frames_of_seconds():
    result = windows(95, 25.0, frames=1, stride=4)
    assert result.starts.tolist() == [0, 1, 2, 3]
    assert result.ends.tolist() == [1, 2, 3, 3.8]
    assert result.indices.tolist() == [[12], [37], [62], [87]]
    # Of a slow video every frame is seen once.
    slow = windows(5, 0.5, frames=1, stride=4)
    assert slow.indices.tolist() == [[0], [1], [2], [3], [4]]
    assert slow.ends.tolist() == [2, 4, 6, 8, 10]


def test_a_video_is_long_if_the_protocols_clips_do_not_cover_it():
    shape = {"frames": 16, "stride": 4}  # 64 frames at 30 a second
    assert not is_long(320, 30.0, clips=5, **shape) and is_long(321, 30.0, clips=5, **shape)
    assert not is_long(640, 30.0, clips=10, **shape) and is_long(641, 30.0, clips=10, **shape)
    assert not is_long(256, 30.0, clips=1, **shape) and is_long(257, 30.0, clips=1, **shape)
    assert not is_long(320, 60.0, clips=5, **shape)  # half as long
    assert not is_long(100, 25.0, frames=1, stride=4, clips=1)
    assert is_long(101, 25.0, frames=1, stride=4, clips=1)


def naive_segments(timeline, step):
    """Returns the top class every `step` seconds, by the mean over the windows around it."""
    tops = []
    for time in np.arange(step / 2, timeline.ends[-1], step):
        seen = (timeline.starts <= time) & (time < timeline.ends)
        mean = timeline.probabilities[seen].mean(0)
        tops.append((time, int(mean.argmax()), mean.max()))
    return tops


@pytest.mark.parametrize("seed", range(4))
def test_segments_have_the_most_probable_class_at_every_time(seed):
    rng = np.random.default_rng(seed)
    result = windows(600, 30.0, frames=8, stride=4)
    raw = rng.random((len(result.starts), 3)) ** 3
    timeline = Timeline(result.starts, result.ends, raw / raw.sum(1, keepdims=True))
    segments = timeline.segments()
    assert segments[0].start == 0 and segments[-1].end == 20
    for one, next_ in itertools.pairwise(segments):
        assert one.end == next_.start and one.label != next_.label
    tops = naive_segments(timeline, 0.01)
    for segment in segments:
        inside = [(label, p) for time, label, p in tops if segment.start < time < segment.end]
        assert {label for label, _ in inside} == {segment.label}
        assert np.mean([p for _, p in inside]) == pytest.approx(segment.probability, abs=0.02)


@pytest.mark.parametrize(("count", "fps", "frames", "stride"), SHAPES[:4])
@pytest.mark.parametrize("seed", range(5))
def test_no_segment_is_shorter_than_half_a_hop(count, fps, frames, stride, seed):
    rng = np.random.default_rng(seed)
    result = windows(count, fps, frames=frames, stride=stride)
    raw = rng.random((len(result.starts), 3)) ** 3
    timeline = Timeline(result.starts, result.ends, raw / raw.sum(1, keepdims=True))
    segments = timeline.segments()
    shortest = frames * stride / 30 / 4
    assert segments[0].start == 0 and segments[-1].end == result.ends[-1]
    for one, next_ in itertools.pairwise(segments):
        assert one.end == next_.start and one.label != next_.label
    # Starts are whole frames, so a hop may be a frame shorter than half a window.
    assert min(s.end - s.start for s in segments) >= shortest - 0.5 / fps
    # Where one class is the most probable for longer, the timeline has this class.
    tops = naive_segments(timeline, step := 0.2 / fps)
    times, labels, _ = map(np.asarray, zip(*tops, strict=True))
    for label, run in itertools.groupby(range(len(labels)), key=lambda i: labels[i]):
        run = list(run)
        if len(run) * step > shortest + 1 / fps:
            middle = times[run[len(run) // 2]]
            assert next(s.label for s in segments if s.end > middle) == label
    for segment in segments:
        seen = [timeline.starts, timeline.ends]
        inside = times[(times > segment.start) & (times < segment.end)]
        means = [
            timeline.probabilities[(seen[0] <= t) & (t < seen[1])].mean(0)[segment.label]
            for t in inside[:: max(len(inside) // 500, 1)]
        ]
        assert np.mean(means) == pytest.approx(segment.probability, abs=0.02)


def test_a_short_segment_joins_the_neighbour_that_is_more_probable_in_it():
    """A second window of 29.97 frames per second ends 1 ms after the fourth begins."""
    starts, ends = np.asarray([0.0, 1, 2, 3]), np.asarray([2.0, 3.001, 4, 5])
    tops = np.asarray([[0.9, 0, 0.1], [0.8, 0, 0.2], [0.1, 0.5, 0.4], [0, 0.51, 0.49]])
    segments = Timeline(starts, ends, tops).segments()
    # From 3 s to 3.001 s three windows overlap, and class 2 is the most probable on their mean.
    assert [(s.start, s.end, s.label) for s in segments] == [(0, 3.0, 0), (3.0, 5, 1)]


def test_one_window_between_two_scenes_makes_no_segment():
    result = windows(320, 30.0, frames=8, stride=4)
    tops = np.eye(3)[[0] * 9 + [2] + [1] * 9] * 0.7 + 0.1
    segments = Timeline(result.starts, result.ends, tops).segments()
    assert [segment.label for segment in segments] == [0, 2, 1]  # as sure as its neighbours
    tops[9] = [0.3, 0.3, 0.4]
    segments = Timeline(result.starts, result.ends, tops).segments()
    assert [segment.label for segment in segments] == [0, 1]
    assert abs(segments[0].end - result.starts[10]) < 0.6


def test_clock_formats_minutes_and_hours():
    assert [clock(s) for s in (0.0, 7.4, 59.6, 750.0, 3723.0)] == [
        "0:00", "0:07", "1:00", "12:30", "1:02:03",
    ]  # fmt: skip
    assert [clock(s, 1) for s in (0.04, 7.46, 59.96, 3723.21)] == [
        "0:00.0", "0:07.5", "1:00.0", "1:02:03.2",
    ]  # fmt: skip
    assert interval(0.53, 12.0) == "0:00.5 - 0:12.0"


def test_windows_of_a_variable_rate_have_the_frames_of_their_time(tmp_path):
    """60 frames at 30 per second, then 30 at 5: the change is at 2 s, not at 5.3."""
    times = [round(n * 1000 / 30) for n in range(60)] + [2000 + 200 * n for n in range(30)]
    path = write(tmp_path / "x.mkv", 90, times=times)
    settings = ClipSettings(frames=4, stride=8, size=16, short_side=16)
    with Video(path) as video:
        result = windows(video.num_frames, video.fps, frames=4, stride=8)
        seconds = video.seconds[settings.by_time(video, result.indices)]
    assert result.ends[-1] == pytest.approx(8, abs=0.2)
    assert (seconds >= result.starts[:, None] - 0.1).all()
    assert (seconds <= result.ends[:, None] + 0.1).all()
    assert np.ptp(seconds, axis=1) == pytest.approx(32 / 30 - 1 / video.fps, abs=0.2)
