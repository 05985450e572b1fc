"""Presentation times of video files: variable, broken and truncated."""

import inspect
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mvit_jax.data.media.packets import Packets, demux
from mvit_jax.data.media.video import DecodeError, Video, decode_failure, opened
from mvit_jax.data.pipeline import ClipSettings
from tests.data.bar_codes import decode_all, numbers_of, write

ORDINARY = {"gop": 12}
REFRESH = {"bf": "0", "x264-params": "intra-refresh=1:keyint=40"}


def copied(source, path, change=lambda number, packet: None, options=None):
    """Copies packets without re-encoding; `change` may alter their times."""
    with av.open(str(source)) as reader, av.open(str(path), "w", options=options or {}) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(reader.demux(video=0)):
            if packet.size:
                change(number, packet)
                packet.stream = stream
                writer.mux(packet)
    return str(path)


def assert_exact(path):
    """Compares all frames, in order and one by one, with those of a plain decoder."""
    expected = decode_all(path)
    with Video(path) as video:
        assert video.num_frames == len(expected)
        assert np.array_equal(video.frames(range(len(expected))), expected)
        seconds = video.seconds
    assert (np.diff(seconds) > 0).all()
    for number in range(0, len(expected), 7):
        with Video(path) as video:
            assert np.array_equal(video.frames([number])[0], expected[number]), number


def uneven_times(count):
    """Returns times in milliseconds with distances of 20 to 47, as browsers record."""
    return np.cumsum(np.random.default_rng(1).integers(20, 48, count)).tolist()


def without_rate(path):
    """Removes the frame rate of a Matroska file (DefaultDuration), as browsers leave it out."""
    without_element(path, b"\x23\xe3\x83")
    return path


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_a_browsers_recording_has_the_rate_of_its_times(codec, tmp_path):
    times = uneven_times(96)
    path = write(tmp_path / "x.webm", 96, codec=codec, rate=1000, times=times)
    without_rate(path)
    with av.open(path) as container:
        assert (container.streams.video[0].guessed_rate or 0) > 900
    with Video(path) as video:
        assert video.fps == pytest.approx(95_000 / (times[-1] - times[0]))
        assert np.allclose(video.seconds, (np.array(times) - times[0]) / 1000)
        clip = ClipSettings(8, 4, 16, 16).view_indices(video, 1)[0]
    span = np.ptp((np.array(times) / 1000)[clip])
    # From the first to the last frame, each at most half a distance off.
    assert span == pytest.approx(8 * 4 / 30 - 1 / video.fps, abs=0.047)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "flv", "wmv"])
def test_a_clip_lasts_equally_long_in_all_parts_of_a_variable_rate(suffix, tmp_path):
    """Frames at 30, then at 5 frames per second; at the average rate, spans would differ by 6."""
    times = [round(n * 1000 / 30) for n in range(90)]
    times += [3000 + 200 * n for n in range(15)]
    codec = {"wmv": "wmv2", "flv": "flv"}.get(suffix, "libx264")
    path = write(tmp_path / f"x.{suffix}", 105, codec=codec, times=times, bf="0")
    seconds = np.array(times) / 1000
    with Video(path) as video:
        assert video.seconds == pytest.approx(seconds, abs=0.002)
        clips = ClipSettings(8, 4, 16, 16).view_indices(video, 5)
    spans = np.ptp(seconds[clips], axis=1)
    assert spans == pytest.approx(8 * 4 / 30, abs=0.2)  # the distance of the slow frames
    starts = seconds[clips[:, 0]]
    assert np.diff(starts) == pytest.approx(np.diff(starts).mean(), abs=0.2)


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), 24, Fraction(24000, 1001), 59.94])
@pytest.mark.parametrize("unit", [Fraction(1, 1000), Fraction(1, 90000)])
def test_a_stated_rate_that_the_times_confirm_is_exact(rate, unit):
    times = [round(n / rate / unit) for n in range(3000)]
    packets = Packets(3000, float(rate), unit, times, {}, [], [], True, True)
    assert packets.fps == float(rate)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_decoding_times_in_the_place_of_presentation_times_are_noticed(suffix, tmp_path):
    """Files that were copied from AVI or raw H.264 show frames out of order to other readers."""
    source = write(tmp_path / "whole.mp4", 60)

    def forget_order(number, packet):
        packet.pts = packet.dts = number * 512

    copy = copied(source, tmp_path / "copy.mp4", forget_order)
    path = copied(copy, tmp_path / f"again.{suffix}") if suffix != "mp4" else copy
    assert np.array_equal(decode_all(path), decode_all(source))
    assert_exact(path)
    with Video(path) as video:
        assert video.fps == pytest.approx(30, abs=0.1)


def test_times_that_descend_in_the_order_of_presentation_are_noticed(tmp_path):
    """Two neighbouring frames of each group have each other's time."""
    source = write(tmp_path / "whole.mp4", 60, bf="0")

    def swap(number, packet):
        packet.pts += {5: 512, 6: -512}.get(number % 12, 0)
        packet.dts -= 512

    path = copied(source, tmp_path / "swapped.mkv", swap)
    with Video(path) as video:
        assert numbers_of(video.frames(range(60))) == list(range(60))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_seeking_in_a_stream_with_intra_refresh_is_exact(suffix, tmp_path):
    """After a seek, the decoder has no picture until all parts of it were refreshed."""
    assert_exact(write(tmp_path / f"x.{suffix}", 150, **REFRESH))


@pytest.mark.parametrize(("name", "codec"), [("x.mpg", "mpeg1video"), ("x.vob", "mpeg2video")])
def test_seeking_in_program_streams_is_exact(name, codec, tmp_path):
    assert_exact(write(tmp_path / name, 100, codec=codec))


def test_seeking_in_a_damaged_avi_is_exact(tmp_path):
    path = Path(write(tmp_path / "x.avi", 150, codec="mpeg4", bf="0"))
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    for at in rng.integers(6000, len(data) - 4000, 6):
        data[at : at + 40] = rng.bytes(40)
    path.write_bytes(data)
    with Video(str(path)) as video:
        expected = video.frames(range(video.num_frames))
    for number in range(0, len(expected), 7):
        with Video(str(path)) as video:
            assert np.array_equal(video.frames([number])[0], expected[number])


@pytest.mark.parametrize("suffix", ["mkv", "webm", "flv"])
def test_a_truncated_file_states_what_is_missing(suffix, tmp_path):
    codec = {"mkv": "libx264", "webm": "libvpx", "flv": "flv"}[suffix]
    path = Path(write(tmp_path / f"x.{suffix}", 150, codec=codec, bf="0"))
    assert decode_failure(opened(path, 1)) is None
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(DecodeError, match=r"cut off, with \d\.\d of its 5\.\d seconds"):
        Video(str(path))


@pytest.mark.parametrize(
    ("suffix", "codec", "words"),
    [
        ("mxf", "mpeg2video", r"\d+ of its 150 frames"),
        ("wmv", "wmv2", r"[\d,]+ of its [\d,]+ bytes"),
    ],
)
def test_a_truncated_file_without_times_states_what_is_missing(suffix, codec, words, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (150, 96, 128, 3), np.uint8)
    path = Path(write(tmp_path / f"x.{suffix}", frames, codec=codec, bf="0"))
    assert decode_failure(opened(path, 1)) is None
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(DecodeError, match=f"cut off, with {words}"):
        Video(str(path))


def noise(path, sound, seconds=2, **options):
    """Writes noisy pictures and PCM sound, from whose bit rates FFmpeg estimates a duration."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mjpeg" if sound == "pcm_s16le" else "flv", rate=30)
        stream.width, stream.height = 64, 32
        stream.pix_fmt = "yuvj420p" if sound == "pcm_s16le" else "yuv420p"
        stream.bit_rate = 50_000
        audio = container.add_stream("pcm_s16le", rate=44100)
        audio.layout = "mono"
        for _ in range(30 * seconds):
            pixels = rng.integers(0, 256, (32, 64, 3), np.uint8)
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        silence = np.zeros((1, 44100 * seconds), np.int16)
        frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
        frame.rate = 44100
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


def without_element(path, identifier):
    """Replaces a Matroska element by a void one of the same length."""
    data = Path(path).read_bytes()
    at = data.index(identifier)
    size = data[at + len(identifier)] & 0x7F
    length = len(identifier) + 1 + size
    void = b"\xec" + bytes([0x80 | (length - 2)]) + bytes(length - 2)
    Path(path).write_bytes(data[:at] + void + data[at + length :])


def test_a_duration_that_ffmpeg_estimates_is_not_a_stated_one(tmp_path):
    """Browsers and live encoders state none; FFmpeg then divides the size by the bit rates."""
    recorded = noise(tmp_path / "x.mkv", "pcm_s16le")
    without_element(recorded, b"\x44\x89")
    live = noise(tmp_path / "x.flv", "flv", flvflags="no_duration_filesize")
    data = live.read_bytes()
    live.write_bytes(data[:-4] + bytes(4))  # the size of the last tag, from which FFmpeg seeks
    for path in (recorded, live):
        with av.open(str(path)) as container:
            assert (container.duration or 0) > 2.2e6
        with Video(str(path)) as video:  # the last tag of FLV counts as incomplete
            assert video.num_frames == (60 if path is recorded else 59)


@pytest.mark.parametrize("count", [1, 3])
def test_slides_may_end_long_after_their_last_picture(count, tmp_path):
    path = write(tmp_path / "x.mkv", count, times=[5000 * n for n in range(count)], bf="0")
    data = Path(path).read_bytes()
    at = data.index(b"\x44\x89\x88") + 3
    Path(path).write_bytes(data[:at] + struct.pack(">d", 5000.0 * count) + data[at + 8 :])
    with av.open(path) as container:
        assert container.duration == 5_000_000 * count
    with Video(path) as video:
        assert video.num_frames == count


def test_a_video_may_be_shorter_than_its_sound(tmp_path):
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        sound = container.add_stream("aac", rate=16000)
        sound.layout = "mono"
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(30):
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        silence = np.zeros((1, 3 * 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with Video(str(path)) as video:
        assert video.num_frames == 30


@pytest.mark.parametrize("hidden", [24, 36])
def test_an_edit_list_may_hide_whole_groups_of_pictures(hidden, tmp_path):
    source = write(tmp_path / "whole.mp4", 60, bf="0")

    def earlier(_, packet):
        packet.pts -= hidden * 512
        packet.dts -= hidden * 512

    options = {"use_editlist": "1", "avoid_negative_ts": "disabled"}
    path = copied(source, tmp_path / "edited.mp4", earlier, options)
    assert len(decode_all(path)) == 60 - hidden
    assert_exact(path)
    with Video(path) as video:
        assert numbers_of(video.frames([0, 20])) == [hidden, hidden + 20]


def test_an_avi_may_repeat_frames_by_empty_chunks(tmp_path):
    """Two of three frames were dropped while recording; 50 pictures of 148 frames' time."""
    times = [round(n * 100) for n in range(50)]
    path = write(tmp_path / "x.avi", 50, codec="mjpeg", pix_fmt="yuvj420p", times=times, bf="0")
    with av.open(path) as container:
        assert container.streams.video[0].frames > 100
    assert_exact(path)
    with Video(path) as video:
        assert video.fps == pytest.approx(10)


def test_joined_recordings_are_read_in_their_order(tmp_path):
    """The clock of the second starts an hour earlier than that of the first ends."""
    first = write(tmp_path / "1.ts", 30, bf="0")
    second = write(tmp_path / "2.ts", 60, bf="0")

    def later(_, packet):
        packet.pts += 3600 * 90000
        packet.dts += 3600 * 90000

    first = copied(first, tmp_path / "late.ts", later, {"muxdelay": "0"})
    path = tmp_path / "both.ts"
    path.write_bytes(Path(first).read_bytes() + Path(second).read_bytes())
    expected = decode_all(str(path))
    with Video(str(path)) as video:
        images = video.frames(range(video.num_frames))
        assert numbers_of(images) == numbers_of(expected)
        assert video.fps == pytest.approx(30, abs=0.1)


@pytest.mark.parametrize(("first", "more"), [("flv", 3600), ("ts", -1)])
def test_jumps_of_the_clock_are_no_pauses(first, more, tmp_path):
    """A stream that was started again after an hour, or at the clock's start."""

    def jumping(number, packet):
        if number >= 30:
            ticks = int(more / packet.time_base) if more > 0 else int(-0.9 / packet.time_base)
            packet.pts += ticks
            packet.dts += ticks

    source = write(tmp_path / "x.mkv", 60, bf="0", gop=30)
    if first == "ts":
        half = copied(write(tmp_path / "1.ts", 30, bf="0"), tmp_path / "2.ts")
        path = tmp_path / "both.ts"
        path.write_bytes(Path(half).read_bytes() * 2)
    else:
        path = copied(source, tmp_path / "x.flv", jumping)
    with Video(str(path)) as video:
        assert video.num_frames == 60 and video.fps == pytest.approx(30, abs=0.2)
        assert video.seconds[-1] == pytest.approx(59 / 30, abs=0.02)
        assert (np.diff(video.seconds) > 0).all()
        expected = [*range(30)] * 2 if first == "ts" else [*range(60)]
        assert numbers_of(video.frames(range(60))) == expected
        assert numbers_of(video.frames([45])) == [expected[45]]


@pytest.mark.parametrize("suffix", ["webm", "mkv", "flv"])
def test_one_doubled_time_leaves_the_others_in_force(suffix, tmp_path):
    times = uneven_times(96)
    path = tmp_path / f"x.{suffix}"
    codec = "libvpx" if suffix == "webm" else "libx264"
    double = [*times[:20], times[19], *times[21:]]
    content = write(tmp_path / "even.mkv", 96, codec=codec, bf="0")

    def doubled(number, packet):
        packet.time_base, packet.pts, packet.dts = Fraction(1, 1000), double[number], None
        packet.dts = double[number]

    path = copied(content, path, doubled)
    if suffix == "mkv":
        without_rate(path)
    with Video(path) as video:
        assert video.num_frames == 96
        assert video.fps == pytest.approx(95 / (times[-1] - times[0]) * 1000, rel=1e-3)
        repaired = [*times]
        repaired[20] = times[19] + (times[21] - times[19]) / 2
        seconds = (np.array(repaired) - times[0]) / 1000
        np.testing.assert_allclose(video.seconds, seconds, atol=2e-3)
        assert numbers_of(video.frames([19, 20, 21, 95])) == [19, 20, 21, 95]


def test_vp8_packets_without_a_picture_do_not_count(tmp_path):
    """Encoders with two passes add alternate reference frames, which share a time with another."""
    source, path = write(tmp_path / "1.mkv", 60, codec="libvpx", gop=20), tmp_path / "x.webm"
    with av.open(source) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(reader.demux(video=0)):
            if packet.size and number % 7 == 5:
                content = bytes(packet)
                hidden = av.Packet(bytes([content[0] & ~0x10]) + content[1:])
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                hidden.stream = stream
                writer.mux(hidden)
            if packet.size:
                packet.stream = stream
                writer.mux(packet)
    assert len(decode_all(str(path))) == 60
    assert_exact(str(path))
    with Video(path) as video:
        assert video.fps == pytest.approx(30) and video._packets.seekable


def test_packets_end_with_the_file():
    """PyAV's packets after the end fail where FFmpeg found streams while it read."""

    class Container:
        def demux(self, *streams):
            yield packet
            yield av.Packet()
            raise IndexError("list index out of range")

    packet = av.Packet(b"content")
    unchecked = inspect.unwrap(demux)  # without the types that the tests check
    assert list(unchecked(Container())) == [packet]


def test_frames_of_too_many_pixels_are_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "x.mp4", 3)
    monkeypatch.setattr("mvit_jax.data.media.video.MAX_PIXELS", 64 * 32 - 1)
    with pytest.raises(DecodeError, match="frames of 64x32 have more than 2,047 pixels: scale"):
        Video(path)


def test_a_cover_picture_is_no_video(tmp_path):
    """Sound with a picture of the album, as music files have it."""
    from tests.data.media.test_video import audio_only

    sound, path = audio_only(tmp_path), tmp_path / "song.m4a"
    with av.open(str(sound)) as reader, av.open(str(path), "w", format="mp4") as writer:
        stream = writer.add_stream_from_template(reader.streams.audio[0])
        cover = writer.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")
        writer.mux(cover.encode(picture))
        writer.mux(cover.encode(None))
        for packet in reader.demux(audio=0):
            if packet.size:
                packet.stream = stream
                writer.mux(packet)
    with pytest.raises(DecodeError, match="only sound and a cover picture"):
        Video(str(path))
