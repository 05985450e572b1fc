"""Decoding of video files: frame numbers, seeking, and broken files."""

import gc
import pickle
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.frame import PictureType

from mvit_jax.data.making.transcoding import Encoding, encode
from mvit_jax.data.media.video import DecodeError, Video, decode_failure, opened
from tests.data.bar_codes import decode_all, number_of, numbers_of, packets_of, write


@pytest.fixture(scope="module")
def video_path(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("video") / "bars.mp4", 100)
    with av.open(path) as container:
        kinds = [frame.pict_type for frame in container.decode(video=0)]
    assert kinds.count(PictureType.B) > 50  # the difficult case for seeking and skipping
    assert kinds.count(PictureType.I) == 9
    return path


def panning(count):
    """Returns frames of a camera that pans over a smooth image, most of them inter-coded."""
    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8), (160, 96))
    return [picture[n // 2 : n // 2 + 48, n : n + 64] for n in range(count)]


OPEN = {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}
FORMATS = {
    "mp4 h264": ("x.mp4", {}),
    "mp4 h264 without B-frames": ("x.mp4", {"bf": "0"}),
    "mp4 h264 every frame a key frame": ("x.mp4", {"gop": 1}),
    "mp4 h264 open groups of pictures": ("x.mp4", OPEN),
    "mp4 h264 at 29.97": ("x.mp4", {"rate": Fraction(30000, 1001)}),
    "mkv h264": ("x.mkv", {}),  # the container does not state the number of frames
    "avi h264": ("x.avi", {}),
    "mpeg-ts h264": ("x.ts", {}),
    "mp4 hevc": ("x.mp4", {"codec": "libx265", "x265-params": "log-level=none"}),
    "avi mpeg4": ("x.avi", {"codec": "mpeg4"}),
    "mp4 av1": ("x.mp4", {"codec": "libsvtav1", "preset": "12"}),
    "webm vp9": ("x.webm", {"codec": "libvpx-vp9", "cpu-used": "8", "lag-in-frames": "16"}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_seeking_and_skipping_do_not_change_pixels(name, tmp_path):
    """Any clip equals the same frames of a plain decode from the start."""
    file, options = FORMATS[name]
    path = write(tmp_path / file, panning(60), **options)
    expected = decode_all(path)
    assert len(expected) == 60
    rng = np.random.default_rng(0)
    clips = [np.arange(start, 60, rng.integers(1, 6)) for start in range(0, 56, 3)]
    clips += [rng.integers(0, 60, 6) for _ in range(10)] + [np.array([3, 3, 3]), np.arange(60)]
    for indices in clips:  # each with a new decoder
        with Video(path) as video:
            assert np.array_equal(video.frames(indices), expected[indices])
    with Video(path) as video:
        assert video.num_frames == 60
        for indices in clips:
            assert np.array_equal(video.frames(indices), expected[indices])


def test_a_late_clip_does_not_decode_the_start_of_the_file(video_path, tmp_path):
    data = bytearray(Path(video_path).read_bytes())
    for position, size, _ in packets_of(video_path)[1:40]:
        data[position : position + size] = bytes(size)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    with Video(path) as video:
        assert numbers_of(video.frames([80, 84, 88])) == [80, 84, 88]
        with pytest.raises(DecodeError, match="damaged"):
            video.frames([5])
    assert "damaged" in str(decode_failure(opened(path, 1)))


def test_frames_of_a_variable_rate_are_ordered_by_presentation_time(tmp_path):
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.integers(5, 200, 40)).tolist()
    path = write(tmp_path / "variable.mkv", 40, times=times)
    with Video(path) as video:
        assert video.num_frames == 40
        for start in range(0, 40, 7):
            assert numbers_of(video.frames(range(start, 40))) == list(range(start, 40))


def truncated(source, target, packets, more=0):
    """Writes a faststart file truncated after `packets` compressed frames and `more` bytes."""
    ordered = sorted(packets_of(source))
    target.write_bytes(Path(source).read_bytes()[: ordered[packets][0] + more])
    with av.open(str(target)) as container:
        assert container.streams.video[0].frames == len(ordered)  # according to the header
    return target


@pytest.mark.parametrize("more", [0, 9])
def test_a_few_missing_frames_at_the_end_are_no_decode_failure(video_path, tmp_path, more):
    path = truncated(video_path, tmp_path / "short.mp4", 95, more)
    with Video(path) as video:
        assert video.num_frames == 95
        last = video.num_frames - 1
        images = video.frames([0, last - 4, last])
    assert numbers_of(images[:2]) == [0, last - 4]
    assert number_of(images[2]) in range(last, 100)  # B-frames shown late may come before it
    assert decode_failure(opened(path, 1)) is None


@pytest.mark.parametrize(("name", "missing"), [("late.mkv", 16), ("late.ts", 3)])
def test_a_file_that_starts_within_a_group_of_pictures_starts_at_its_first_key_frame(
    name, missing, tmp_path
):
    path = late_start(tmp_path / name, missing)
    assert len(decode_all(str(path))) == 40
    with Video(path) as video:
        assert video.num_frames == 40
        assert numbers_of(video.frames([0, 1, 39])) == [20, 21, 59]
        assert video.seconds[0] == 0


def late_start(path, missing):
    """Copies 60 frames with key frames at 0, 20 and 40, without the first `missing`."""
    source = write(path.parent / "whole.mp4", 60, bf="0", gop=20)
    with av.open(source) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(reader.demux(video=0)):
            if number >= missing and packet.size:
                packet.stream = stream
                writer.mux(packet)
    return path


def test_the_last_frame_is_repeated_when_the_decoder_ends_early(tmp_path, monkeypatch):
    path = write(tmp_path / "x.mp4", 50, bf="0")
    until = Video._until

    def ending_before(end):  # without B-frames, file positions are frame numbers
        def truncated_until(self, packets, last):
            complete = until(self, packets, last)
            return (packet for packet in complete if self._position(packet) < end)

        return truncated_until

    with Video(path) as video:
        monkeypatch.setattr(Video, "_until", ending_before(48))
        assert numbers_of(video.frames([40, 47, 48, 49])) == [40, 47, 47, 47]
        assert numbers_of(video.frames([49])) == [47]
        monkeypatch.setattr(Video, "_until", ending_before(30))
        assert numbers_of(video.frames([10, 29])) == [10, 29]
        with pytest.raises(DecodeError, match="ends after 30 of its 50 frames"):
            video.frames([10, 40])


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path):
    """Cutting without re-encoding leaves frames that are decoded but not shown."""
    source = write(tmp_path / "whole.mp4", 40)
    path = tmp_path / "edited.mp4"
    with av.open(source) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        hidden = 5 * 512  # frames times the duration of one
        for packet in reader.demux(video=0):
            if packet.size:
                packet.pts = (packet.pts or 0) - hidden
                packet.dts = (packet.dts or 0) - hidden
                packet.stream = stream
                writer.mux(packet)
    assert len(packets_of(str(path))) == 40
    with Video(path) as video:
        assert video.num_frames == 35
        assert numbers_of(video.frames(range(35))) == list(range(5, 40))
        assert numbers_of(video.frames([20, 3])) == [25, 8]


def empty(folder):
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def text(folder):
    (folder / "text.mp4").write_text("404 Not Found\n" * 100)
    return folder / "text.mp4"


def half_without_index(folder):
    """Writes half of a file without faststart, whose header was at its end."""
    path = Path(write(folder / "half.mov", 50))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def cut(folder):
    return truncated(write(folder / "whole.mp4", 100), folder / "cut.mp4", 50)


def audio_only(folder):
    path = folder / "audio.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def image(folder):
    (folder / "image.mp4").write_bytes(cv2.imencode(".jpg", quarters())[1].tobytes())
    return folder / "image.mp4"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (empty, "empty"),
        (image, "it is an image with the name of a video"),
        (text, "not a video"),
        (half_without_index, "it is not a video, or it is damaged or cut off"),
        (cut, "it is cut off, with 50 of its 100 frames"),
        (audio_only, "no video"),
        (lambda folder: folder / "missing.mp4", "no such file"),
        (lambda folder: folder, "it is a directory"),
    ],
)
def test_invalid_videos_raise_with_path_and_reason(make, reason, tmp_path):
    path = make(tmp_path)
    with pytest.raises(DecodeError) as caught:
        Video(path)
    error = caught.value
    assert error.path == str(path)
    assert reason in error.reason
    assert str(error) == f"{path} cannot be decoded: {error.reason}" and "\n" not in str(error)
    assert decode_failure(opened(path, 1)) == error.reason
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.reason, str(copy)) == (error.path, error.reason, str(error))


def test_a_relative_name_with_a_colon_is_a_file(video_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("12:30 party.mp4").write_bytes(Path(video_path).read_bytes())
    with Video("12:30 party.mp4") as video:
        assert video.num_frames == 100


def test_frame_numbers_out_of_range_raise(video_path):
    with Video(video_path) as video:
        for indices in ([100], [-1], [5, 200]):
            with pytest.raises(IndexError, match="100 frames"):
                video.frames(indices)


def test_files_are_closed(video_path, tmp_path):
    broken = cut(tmp_path)
    avi = write(tmp_path / "x.avi", 30)  # is reopened for every clip
    before = len(list(Path("/dev/fd").iterdir()))
    errors = []
    for _ in range(5):
        with Video(video_path) as video:
            video.frames([50])
        with Video(avi) as video:
            video.frames([20])
            video.frames([3])
        for path in (broken, audio_only(tmp_path), text(tmp_path)):
            with pytest.raises(DecodeError) as caught:
                Video(path)
            errors.append(caught)  # keeps the frames of the traceback alive
    assert len(list(Path("/dev/fd").iterdir())) == before


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), 12])
def test_the_average_frame_rate_is_read(rate, tmp_path):
    with Video(write(tmp_path / "x.mp4", 5, rate=rate)) as video:
        assert video.fps == float(rate)


def matrices():
    """Returns the rows a, b and c, d of the display matrices of the eight orientations."""
    signs = [(a, d) for a in (1, -1) for d in (1, -1)]
    return [((a, 0), (0, d)) for a, d in signs] + [((0, b), (c, 0)) for b, c in signs]


def displayed(image, rows):
    """Moves each pixel (x, y) to (ax + cy, bx + dy), shifted into the picture."""
    (a, b), (c, d) = rows
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    out = np.empty((down.max() + 1, across.max() + 1, 3), image.dtype)
    out[down, across] = image
    return out


def quarters():
    frame = np.full((32, 64, 3), 20, np.uint8)
    frame[:16, :32], frame[16:, :32], frame[:16, 32:] = 230, 160, 90
    return frame


@pytest.mark.parametrize("rows", matrices())
def test_videos_are_displayed_by_their_matrix(rows, tmp_path):
    (a, b), (c, d) = rows
    one = 1 << 16
    matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
    path = write(tmp_path / "x.mp4", [quarters()] * 3, matrix=matrix)
    expected = displayed(quarters(), rows)
    for stored in (opened(path, 8), packed(path)):
        with stored as video:
            image = video.frames([0])[0]
        assert image.shape == expected.shape
        assert np.abs(image.astype(int) - expected).mean() < 5


def packed(path):
    """Opens the video as `prepare videos` stores it in a shard."""
    encoded = encode(path, Encoding(short_side=32))
    return Video(encoded.file, index=encoded.index)


def test_frames_after_a_resolution_change_have_the_first_size(tmp_path):
    small = [np.full((32, 64, 3), 60, np.uint8)] * 5
    large = [np.full((64, 128, 3), 180, np.uint8)] * 5
    parts = [write(tmp_path / "1.ts", small), write(tmp_path / "2.ts", large)]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    with Video(path) as video:
        images = video.frames(range(video.num_frames))
    assert images.shape[1:] == (32, 64, 3)
    assert images[0].mean() == pytest.approx(60, abs=4)
    assert images[-1].mean() == pytest.approx(180, abs=4)


def test_decoded_frames_are_freed_at_once(tmp_path):
    """Without the garbage collector: large frames would fill the memory before it runs."""

    def count():
        return sum(isinstance(x, av.VideoFrame) for x in gc.get_objects())

    with Video(write(tmp_path / "x.mp4", 30, rotation=90)) as video:
        gc.collect()
        gc.disable()
        before = count()
        try:
            for _ in video.in_order(range(30)):
                pass
            assert count() - before <= 3
        finally:
            gc.enable()
