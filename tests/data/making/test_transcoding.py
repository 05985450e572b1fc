"""Transcoding: frames, presentation times, rotation and colours of the encoded video."""

import io
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.data.making.transcoding import Encoding, encode
from mvit_jax.data.media.video import DecodeError, Video
from tests.data.bar_codes import numbers_of, packets_of, write
from tests.data.media.test_video import (
    FORMATS,
    audio_only,
    empty,
    half_without_index,
    panning,
    text,
)


def all_frames(file, index=None):
    with Video(file, index=index) as video:
        return video.frames(range(video.num_frames)).astype(int)


@pytest.mark.parametrize("name", FORMATS)
def test_encoding_preserves_the_frames(name, tmp_path):
    file, options = FORMATS[name]
    path = write(tmp_path / file, panning(40), **options)
    encoded = encode(path, Encoding(crf=12))
    original, result = all_frames(path), all_frames(encoded.file)
    assert result.shape == original.shape
    difference = np.abs(result[:, None] - original[None]).mean(axis=(2, 3, 4))
    assert difference.diagonal().max() < 3
    assert (difference.argmin(axis=1) == np.arange(40)).all()  # in order


def test_key_frames_are_at_multiples_of_the_gop(tmp_path):
    encoded = encode(write(tmp_path / "x.mp4", 70), Encoding(gop=8))
    assert list(encoded.index.keys) == list(range(0, 70, 8))


def test_sound_is_dropped(tmp_path):
    video, sound = write(tmp_path / "x.mp4", 30), audio_only(tmp_path)
    both = tmp_path / "both.mkv"
    with av.open(video) as one, av.open(str(sound)) as two, av.open(str(both), "w") as writer:
        readers = (one, two)
        streams = [writer.add_stream_from_template(reader.streams[0]) for reader in readers]
        for reader, stream in zip(readers, streams, strict=True):
            for packet in reader.demux():
                if packet.size:
                    packet.stream = stream
                    writer.mux(packet)
    with av.open(str(both)) as container:
        assert len(container.streams) == 2
    with av.open(io.BytesIO(encode(str(both), Encoding()).file)) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize("gop", [1, 4, 16])
def test_the_index_gives_the_frames_of_the_container(gop, tmp_path):
    encoded = encode(write(tmp_path / "x.mp4", panning(70)), Encoding(gop=gop))
    expected = all_frames(encoded.file)
    rng = np.random.default_rng(0)
    clips = [np.arange(start, 70, 4) for start in range(0, 60, 7)]
    clips += [rng.integers(0, 70, 5) for _ in range(10)]
    with Video(encoded.file, "it", encoded.index) as video, Video(encoded.file) as plain:
        assert video.times() == plain.times()
        assert video.fps == plain.fps == 30
        for clip in clips:
            assert np.array_equal(video.frames(clip), expected[clip])
            assert np.array_equal(plain.frames(clip), expected[clip])


def test_a_clip_of_intra_coded_frames_reads_only_its_packets(tmp_path, monkeypatch):
    """A clip of 16 frames at stride 4 decodes 16 packets, not the 64 that it spans."""
    encoded = encode(write(tmp_path / "x.mp4", panning(100)), Encoding(gop=1))
    until, timestamps = Video._until, []

    def counted(self, packets, end):
        for packet in until(self, packets, end):
            timestamps.append(packet.pts)
            yield packet

    monkeypatch.setattr(Video, "_until", counted)
    for index in (None, encoded.index):
        timestamps.clear()
        with Video(encoded.file, index=index) as video:
            video.frames(range(30, 94, 4))
        assert len(timestamps) == 16


def test_encoding_preserves_presentation_times(tmp_path):
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.integers(5, 200, 40)).tolist()
    path = write(tmp_path / "variable.mkv", 40, times=times)
    encoded = encode(path, Encoding())
    assert numbers_of(all_frames(encoded.file)) == list(range(40))
    with Video(encoded.file) as video:
        base, stamps = video.times()
        assert [base * stamp for stamp in stamps] == [
            Fraction(time - times[0], 1000) for time in times
        ]
    with Video(path) as video, Video(encoded.file, index=encoded.index) as result:
        assert result.fps == video.fps


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotated_videos_become_upright(rotation, tmp_path):
    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 256, (4, 8, 3), dtype=np.uint8), (64, 32))
    path = write(tmp_path / "turned.mp4", [picture] * 3, rotation=rotation)
    encoded = encode(path, Encoding(crf=10))
    original, result = all_frames(path), all_frames(encoded.file)
    assert result.shape == original.shape
    assert np.abs(result - original).mean() < 4
    with av.open(path) as container:
        assert next(container.decode(video=0)).rotation != 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [((60, 100), (48, 80)), ((100, 60), (80, 48)), ((64, 96), (48, 72)), ((40, 90), (40, 90))],
)
def test_only_frames_above_the_short_side_are_scaled_down(size, expected, tmp_path):
    rng = np.random.default_rng(0)
    # Grey, because colours are stored and scaled at half of the resolution.
    grey = cv2.resize(rng.integers(30, 220, (6, 6), dtype=np.uint8), size[::-1])
    picture = np.repeat(grey[..., None], 3, axis=-1)
    path = write(tmp_path / "x.mp4", [picture] * 4)
    result = all_frames(encode(path, Encoding(short_side=48, crf=10)).file)
    assert result.shape[1:3] == expected
    area = cv2.resize(
        all_frames(path)[2].astype(np.uint8), expected[::-1], interpolation=cv2.INTER_AREA
    )
    assert np.abs(result[2] - area).mean() < 2


def test_odd_sizes_become_even(tmp_path):
    picture = np.full((33, 65, 3), (200, 90, 40), np.uint8)
    path = write(tmp_path / "odd.mkv", [picture], codec="ffv1", pix_fmt="bgr0", bf="0")
    result = all_frames(encode(path, Encoding()).file)
    assert result.shape == (1, 32, 64, 3)
    assert np.abs(result - picture[0, 0]).max() <= 4  # RGB input, so there is one colour matrix


@pytest.mark.parametrize("colours", [{"colorspace": 1}, {"color_range": 2}, {}])
def test_encoding_preserves_the_colours(colours, tmp_path):
    """BT.709 and full range change the colours that equal samples are decoded to."""
    path = tmp_path / "x.mp4"
    planes = np.concatenate([np.full((32, 64), 90), np.full((8, 64), 100), np.full((8, 64), 170)])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(planes.astype(np.uint8), format="yuv420p")
            for name, value in colours.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    encoded = encode(str(path), Encoding(crf=5))
    assert np.abs(all_frames(encoded.file) - all_frames(str(path))).max() <= 3
    assert np.abs(all_frames(encoded.file, encoded.index) - all_frames(str(path))).max() <= 3


def test_encoding_is_deterministic(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (68, 100, 3), dtype=np.uint8) for _ in range(40)]
    path = write(tmp_path / "noise.mp4", frames)
    assert len({encode(path, Encoding()).file for _ in range(6)}) == 1


@pytest.mark.parametrize("make", [empty, text, half_without_index, audio_only])
def test_invalid_videos_raise_the_same_reason_as_path_and_as_bytes(make, tmp_path):
    path = make(tmp_path)
    with pytest.raises(DecodeError) as from_file:
        encode(str(path), Encoding())
    with pytest.raises(DecodeError) as from_bytes:
        encode(path.read_bytes(), Encoding(), "name")
    assert from_bytes.value.path == "name"
    assert from_bytes.value.reason == from_file.value.reason


def test_a_video_damaged_in_the_middle_is_an_error(tmp_path):
    path = write(tmp_path / "x.mp4", 60, gop=60)
    with Path(path).open("rb+") as file:
        for position, size, _ in packets_of(path)[20:]:
            file.seek(position)
            file.write(bytes(size))
    with pytest.raises(DecodeError, match=r"x\.mp4"):
        encode(path, Encoding())


@pytest.mark.parametrize(
    ("values", "message"),
    [({"short_side": 255}, "even"), ({"gop": 0}, "gop=0"), ({"crf": 52}, "crf=52")],
)
def test_settings_out_of_range_are_rejected(values, message):
    with pytest.raises(UserError, match=message):
        Encoding(**values)
