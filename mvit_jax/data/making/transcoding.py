"""Re-encoding of videos at a small size, for fast decoding of random clips."""

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.error import FFmpegError
from av.video.frame import PictureType
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from mvit_jax.common.errors import UserError
from mvit_jax.data.media import orientation
from mvit_jax.data.media.images import DecodeError
from mvit_jax.data.media.orientation import Orientation
from mvit_jax.data.media.packets import Index
from mvit_jax.data.media.video import Video


@dataclass(frozen=True)
class Encoding:
    """Settings of the video encoder.

    Attributes:
      short_side: short side in pixels, even. Larger frames are scaled down to this short side;
        smaller frames keep their size, rounded to even numbers.
      gop: number of frames from one key frame to the next; decoding any single frame decodes at
        most this many.
      crf: x264's constant rate factor, 0 (exact) to 51; lower means better and larger.

    Raises:
      UserError: a value is out of range.
    """

    short_side: int = 256
    gop: int = 16
    crf: int = 20

    def __post_init__(self) -> None:
        if self.short_side < 2 or self.short_side % 2:
            raise UserError(
                f"short_side={self.short_side} must be an even number of pixels, at least 2"
            )
        if self.gop < 1:
            raise UserError(f"gop={self.gop} must be at least 1 frame")
        if not 0 <= self.crf <= 51:
            raise UserError(f"crf={self.crf} must be from 0 to 51")


@dataclass(frozen=True)
class Encoded:
    """An encoded video.

    Attributes:
      file: content of an mp4 file, H.264, without sound.
      index: packet index of `file`, with the frame rate of the original.
    """

    file: bytes
    index: Index


def encode(file: str | bytes, encoding: Encoding, name: str | None = None) -> Encoded:
    """Re-encodes a video upright, with smaller frames, frequent key frames and no sound.

    All frames and their presentation times are preserved; the times start at 0. If the times in the
    file are unreliable, frames are evenly spaced at the average rate. The result is decoded once to
    check that all frames are present.

    Args:
      file: path or content of any file that `Video` reads.
      name: name of the file in messages; its path by default.

    Raises:
      DecodeError: the file is broken or cannot be encoded.
    """
    with Video(file, name) as video:
        try:
            encoded = _encode(video, encoding)
        except FFmpegError as error:
            raise DecodeError(video.path, f"it cannot be encoded ({error.strerror})") from error
        frames = _count(encoded)
        if frames != video.num_frames:
            reason = f"only {frames} of its {video.num_frames} frames are left after encoding"
            raise DecodeError(video.path, reason)
    return encoded


def _encode(video: Video, encoding: Encoding) -> Encoded:
    time_base, times = video.times()
    reformatter, orientations = VideoReformatter(), orientation.Reader()
    memory = io.BytesIO()
    size = (0, 0)
    with av.open(memory, "w", format="mp4") as container:
        stream = None
        for number, picture in video.pictures(range(video.num_frames)):
            size = size if stream else _size(picture.width, picture.height, encoding.short_side)
            stored = orientations.of_frame(picture)
            picture = reformatter.reformat(
                picture,
                width=size[0],
                height=size[1],
                format="yuv420p",
                # Conversion matrix for RGB pictures; YUV pictures keep theirs.
                dst_colorspace=Colorspace.ITU601 if picture.format.is_rgb else None,
                interpolation=Interpolation.BICUBIC,
                threads=1,
            )
            picture = _upright(picture, stored)
            picture.pts, picture.time_base = times[number], time_base
            picture.pict_type = PictureType.NONE  # otherwise x264 keeps the original frame's type
            if stream is None:
                stream = _stream(container, picture, encoding, video.fps)
                stream.codec_context.time_base = time_base
            container.mux(stream.encode(picture))
        assert stream
        container.mux(stream.encode(None))
    return Encoded(memory.getvalue(), _index(memory.getvalue(), video.fps))


def _index(file: bytes, fps: float) -> Index:
    with av.open(io.BytesIO(file), "r") as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        base = stream.time_base or Fraction(1)
        return Index(
            offsets=[packet.pos or 0 for packet in packets],
            sizes=[packet.size for packet in packets],
            times=[packet.pts or 0 for packet in packets],
            keys=[number for number, packet in enumerate(packets) if packet.is_keyframe],
            extradata=stream.codec_context.extradata or b"",
            time_base=(base.numerator, base.denominator),
            fps=fps,
        )


def _stream(container, picture: av.VideoFrame, encoding: Encoding, fps: float):
    """Adds a video stream with the size and the colours of `picture`."""
    rate = Fraction(fps).limit_denominator(1001)
    options = {
        "preset": "veryfast",  # medium takes three times as long and saves no bytes
        # No arithmetic coding and no loop filter: 8 % larger, decoded in half of the time.
        "tune": "fastdecode",
        "crf": str(encoding.crf),
        "g": str(encoding.gop),
        "keyint_min": str(encoding.gop),
        "sc_threshold": "0",  # no key frames at scene cuts: more bytes, no gain for clips
        # Three of four frames are B-frames that no other frame refers to. They are not decoded
        # unless a clip contains them. (With gop=1 there are none.)
        "bf": "3",
        "b_strategy": "0",
        # x264's AVX-512 code for mbtree sometimes gives different bytes for equal frames.
        "x264-params": "b-pyramid=none:mbtree=0",
    }
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
    codec = stream.codec_context
    # One thread: many videos are encoded in parallel, and more threads would change the bytes.
    codec.thread_count = 1
    # Readers convert YUV to RGB by these properties, so the colours stay those of the original.
    codec.colorspace, codec.color_range = picture.colorspace, picture.color_range
    codec.color_primaries, codec.color_trc = picture.color_primaries, picture.color_trc
    return stream


def _size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Returns width and height scaled down if larger, and rounded to even for yuv420p."""
    scale = min(1.0, short_side / min(width, height))
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def _upright(picture: av.VideoFrame, stored: Orientation) -> av.VideoFrame:
    """Turns a yuv420p picture upright."""
    if stored == orientation.UPRIGHT:
        return picture
    height, width = picture.height, picture.width
    planes = picture.to_ndarray().astype(np.uint8)
    luma, chroma = planes[:height], planes[height:].reshape(2, height // 2, width // 2)
    parts = [stored.apply(part) for part in (luma, *chroma)]
    height, width = parts[0].shape
    joined = np.concatenate([part.reshape(-1) for part in parts]).reshape(height * 3 // 2, width)
    turned = av.VideoFrame.from_ndarray(joined, format="yuv420p")
    turned.colorspace, turned.color_range = picture.colorspace, picture.color_range
    turned.color_primaries, turned.color_trc = picture.color_primaries, picture.color_trc
    return turned


def _count(encoded: Encoded) -> int:
    """Counts the decoded frames with distinct presentation times."""
    with Video(encoded.file, index=encoded.index) as video:
        pictures = video.pictures(range(video.num_frames))
        times = {picture.pts for _, picture in pictures}
    return len(times)
