"""Frames of video files, decoded by PyAV, and the opening of video and image files."""

import contextlib
import copy
import io
import itertools
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Float64, Int, UInt8

from mvit_jax.common.media import open_media
from mvit_jax.data.media import orientation, packets
from mvit_jax.data.media.images import (
    MAX_PIXELS,
    DecodeError,
    Footage,
    Frames,
    check_still,
    distinct,
    is_image,
    read_image,
)
from mvit_jax.data.media.packets import Index, KeyFrame

# Codecs whose decoders can skip single frames that no other frame refers to. Skipping those that
# are not requested saves a fifth to a half of the time at stride 4 with B-frames. The pixels of
# the other frames stay the same. (The AV1 decoder drops requested frames too.)
_SKIPPING_CODECS = ("h264", "hevc")

_Item = TypeVar("_Item")


class _Run(NamedTuple):
    """Packets that are decoded without a gap, from position `start` to position `end`.

    `first` is the index of the run's first frame in the list of requested frame numbers. `last` is
    the number of the run's last requested frame.
    """

    start: int
    end: int
    first: int
    last: int


class _LateStart(Exception):
    """The first picture after a seek is later than the requested one."""


class _UnsoundSeek(Exception):
    """The packets after a seek differ from those of the file read from its start."""


class _BrokenTimes(Exception):
    """Presentation times descend in the order of presentation."""


class Video:
    """An open video file, or the bytes of one; a context manager.

    Opening reads all packets once (3 % of the time of decoding them), as the frame count of a
    container may be missing or wrong. The packets' presentation times make frame numbers exact,
    even at variable frame rates and after a seek to any key frame. Where presentation times are
    broken or a seek is unsound, the file is read from its start. With an index, the container is
    not read: opening takes 0.1 ms instead of 2 for 300 frames of 340x256.

    Args:
      file: path of a video file, or its bytes.
      name: name of the video in messages; the path by default.
      index: packet index of `file`, which is then bytes; None to read the container.
      packet_list: `packet_list` of an earlier object of the same file, which is then not read
        whole; None to read all packets.

    Attributes:
      path: path of the file, or its name in messages.
      num_frames: number of frames, which are numbered by presentation time.
      fps: average frames per second, by the presentation times; 30 if the file states neither
        times nor a rate.
      frame_size: stored width and height of a frame in pixels; 0 if opened by an index.
      seconds: presentation time of each frame, float64 `[num_frames]`, from 0 on.

    Raises:
      DecodeError: the file is missing, is not a video, is broken or is truncated.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | bytes,
        name: str | None = None,
        index: Index | None = None,
        packet_list: packets.Packets | None = None,
    ):
        self._bytes = file if isinstance(file, bytes) else None
        self._file = "a video" if isinstance(file, bytes) else os.fspath(file)
        self.path = name or self._file
        self._reformatter = VideoReformatter()
        self._orientations = orientation.Reader()
        self._size: tuple[int, int] | None = None
        self._index = index
        self._container: InputContainer | None = None
        # Key frames to go back further than the times suggest, as one may not restore the picture.
        self._back = 0
        if index is not None:
            self._open_index(index)
            return
        self._open()
        if packet_list is not None:
            self._packets = copy.copy(packet_list)  # which a failed seek changes
            return
        try:
            assert self._container
            self._packets = packets.read_packets(
                self._container, self._stream, self.path, self._head()
            )
        except BaseException as error:
            self.close()
            if isinstance(error, FFmpegError):
                raise self._decode_error(error) from error
            raise

    @property
    def packet_list(self) -> packets.Packets:
        """The packets, 5 MB for 27,000 frames (15 minutes)."""
        return self._packets

    @property
    def num_frames(self) -> int:
        return self._packets.num_frames

    @property
    def fps(self) -> float:
        return self._packets.fps

    @property
    def frame_size(self) -> tuple[int, int]:
        return self._codec.width, self._codec.height

    @property
    def seconds(self) -> Float64[np.ndarray, " frames"]:
        return self._packets.seconds

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._container is not None:
            self._container.close()

    def frames(
        self, indices: Sequence[int] | Int[np.ndarray, " frames"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """Returns frames by number; each distinct frame is decoded and converted once.

        The decoder may drop frames at a damaged start or end. Such a frame is replaced by the next
        decoded frame, or at the end by the last one.

        Args:
          indices: frame numbers in `range(num_frames)`, at least one, in any order.

        Returns:
          RGB frames, turned upright if the file states a rotation of the camera.

        Raises:
          DecodeError: the file is broken at these frames.
          IndexError: a frame number is out of range.
        """
        numbers, inverse = distinct(indices, self.num_frames)
        images = np.empty(0, np.uint8)
        for row, (_, image) in enumerate(self.in_order(numbers.tolist())):
            if row == 0:
                images = np.empty((len(numbers), *image.shape), np.uint8)
            images[row] = image
        return images if np.array_equal(inverse, np.arange(len(images))) else images[inverse]

    def _open_index(self, index: Index) -> None:
        """Sets up the decoder without the container."""
        codec = av.CodecContext.create("h264", "r")
        codec.extradata = index.extradata
        codec.thread_type, codec.thread_count = "NONE", 1
        self._codec, self._packets = codec, packets.from_index(index)

    def _open(self) -> None:
        try:
            # FFmpeg would take a relative name with a colon for an address.
            path = str(Path(self._file).absolute())
            container = open_media(path if self._bytes is None else io.BytesIO(self._bytes))
        except (FFmpegError, OSError) as error:
            raise self._decode_error(error) from error
        if container.format.name == "tty":  # FFmpeg renders any text as a video
            container.close()
            raise DecodeError(self.path, "it is text, not a video")
        if container.format.name == "image2" or container.format.name.endswith("_pipe"):
            container.close()
            reason = "it is an image with the name of a video: correct its suffix"
            raise DecodeError(self.path, reason)
        try:
            stream = self._video_stream(container)
        except DecodeError:
            container.close()
            raise
        # Clips are loaded in many threads at once, which a decoder's own threads would slow down
        # (1.6 ms with one thread, 2.8 ms with automatic threads, for 48 frames of 64x64).
        stream.thread_type = "NONE"
        stream.thread_count = 1
        self._container, self._stream = container, stream
        self._codec = stream.codec_context

    def _head(self) -> bytes:
        if self._bytes is not None:
            return self._bytes[: packets.HEAD]
        with Path(self._file).open("rb") as file:
            return file.read(packets.HEAD)

    def _video_stream(self, container: InputContainer) -> VideoStream:
        """Returns the container's main video; raises `DecodeError` if it has none."""
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            other = ", only other streams" if len(container.streams) else ""
            raise DecodeError(self.path, f"it holds no video{other}")
        if stream.disposition & Disposition.attached_pic:
            raise DecodeError(self.path, "it holds no video, only sound and a cover picture")
        if stream.width * stream.height > MAX_PIXELS:
            raise DecodeError(
                self.path,
                f"its frames of {stream.width}x{stream.height} have more than {MAX_PIXELS:,} "
                "pixels: scale it down first",
            )
        return stream

    def in_order(
        self, numbers: Sequence[int]
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "height width 3"]]]:
        """Yields pairs of frame number and RGB frame, for ascending numbers.

        The frames equal those of `frames`, but only one is in memory at a time. Calling `frames`
        for one part of a video after the other would decode each part from the key frame before
        the part. In a file with a single key frame, this takes quadratic time.

        Raises:
          DecodeError: while iterating, the file is broken.
        """
        last, image = None, np.empty(0)
        for number, picture in self.pictures(numbers):
            if picture is not last:
                last, image = picture, self._rgb(picture)
            yield number, image

    def times(self) -> tuple[Fraction, list[int]]:
        """Returns a time base in seconds, and the presentation times in its units, from 0 on.

        Frames are evenly spaced at the average rate if the file has no reliable presentation times.
        """
        times = self._packets.times
        if not times:
            return 1 / Fraction(self.fps).limit_denominator(1001), list(range(self.num_frames))
        return self._packets.time_base, [time - times[0] for time in times]

    def pictures(self, numbers: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields frames like `in_order`, but as decoded: neither RGB nor turned upright."""
        numbers, done = list(numbers), 0
        while done < len(numbers):
            try:
                for item in self._pictures(numbers[done:]):
                    yield item
                    done += 1
            except _LateStart:
                self._back = max(1, 2 * self._back)
            except _UnsoundSeek:
                self._packets.seekable = False
            except _BrokenTimes:
                self._packets.seekable = self._packets.by_time = False
            except FFmpegError as error:
                raise self._decode_error(error) from error

    def _pictures(
        self, numbers: list[int], jumping: bool = True
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        done, number, frame = 0, -1, None
        for number, frame in _one_later(self._decoded(numbers, jumping)):
            if number < numbers[done]:
                continue
            ready = bisect_right(numbers, number)
            yield from ((requested, frame) for requested in numbers[done:ready])
            done = ready
            if done == len(numbers):
                return
        if frame is None and numbers[0] > 0:
            # The last decodable frame may lie before the last key frame.
            yield from itertools.islice(self._pictures([0, *numbers], jumping=False), 1, None)
            return
        if frame is None or number + 1 < packets.MIN_SHARE * self.num_frames:
            raise DecodeError(
                self.path, f"decoding ends after {number + 1} of its {self.num_frames} frames"
            )
        yield from ((requested, frame) for requested in numbers[done:])

    def _decoded(self, numbers: list[int], jumping: bool) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decodes the requested frames, starting at the key frame before the first one.

        Yields pairs of frame number and frame in ascending order, including frames that were not
        requested. With `jumping`, packets that no requested frame depends on are skipped: from a
        requested frame to the key frame before the next requested frame.

        Raises:
          _LateStart, _UnsoundSeek, _BrokenTimes: see the classes.
        """
        codec, times = self._codec, self._packets.times
        by_time = self._packets.by_time
        stream = self._from_key_frame(numbers[0])
        requested = {times[number] for number in numbers} if by_time else set()
        skipping = by_time and codec.name in _SKIPPING_CODECS
        everything = [_Run(0, sys.maxsize, 0, numbers[-1])]
        runs = self._runs(numbers) if self._packets.seekable and jumping else everything
        number = -1
        for run in runs:
            if run is not runs[0]:
                codec.flush_buffers()
                stream = itertools.dropwhile(
                    lambda packet, run=run: self._position(packet) != run.start, stream
                )
            first = True
            for packet in itertools.chain(self._until(stream, run.end), [None]):
                if packet is not None and skipping:
                    codec.skip_frame = "DEFAULT" if packet.pts in requested else "NONREF"
                for frame in self._frames_of(packet):
                    before = number
                    if by_time and frame.pts is not None:
                        number = bisect_right(times, frame.pts) - 1
                    else:
                        number += 1
                    if first and self._packets.seekable:
                        self._check_start(frame, number, numbers[run.first])
                    if not first and number < before:
                        raise _BrokenTimes
                    first = False
                    yield number, frame
            if number < run.last and run.end < sys.maxsize:
                # The decoder dropped frames; their replacements may lie in the skipped packets.
                yield from self._decoded(numbers[max(run.first - 1, 0) :], jumping=False)
                return

    def _frames_of(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        try:
            return self._codec.decode(packet)
        except InvalidDataError:
            if packet is not None and packet.is_corrupt:
                return []
            raise

    def _check_start(self, frame: av.VideoFrame, number: int, requested: int) -> None:
        """Raises `_LateStart` if a run's first picture is none to start from, or too late.

        Streams with intra refresh have key frames from which the picture recovers gradually.
        """
        if frame.key_frame and number <= requested:
            return
        time = self._packets.times[requested]
        if self._packets.key_frame(time, self._back) != self._packets.key_frame(time, sys.maxsize):
            raise _LateStart

    def _position(self, packet: av.Packet) -> int | None:
        """Returns the position of a packet in the file.

        Raises:
          _UnsoundSeek: the file read from its start has another packet there.
        """
        position = self._packets.positions.get(packet.pts)
        if (packet.pts, packet.size) in self._packets.invisible:
            return None
        if position is None or packet.size == self._packets.sizes[position]:
            return position
        raise _UnsoundSeek

    def _until(self, stream: Iterator[av.Packet], end: int) -> Iterator[av.Packet]:
        """Yields the packets up to position `end`, except an incomplete one at the end."""
        for packet in stream:
            if packet.size == 0:  # PyAV's end of stream
                return
            if not packet.is_corrupt or packet.pts in self._packets.positions:
                yield packet
            if self._packets.seekable and self._position(packet) == end:
                return

    def _runs(self, numbers: list[int]) -> list[_Run]:
        """Returns the runs of packets to decode for these frames, in order."""
        runs: list[_Run] = []
        for index, number in enumerate(numbers):
            time = self._packets.times[number]
            start, position = self._key_frame(number).position, self._packets.positions[time]
            if runs and start <= runs[-1].end + 1:  # no packets to skip
                last = runs[-1]
                runs[-1] = last._replace(end=max(last.end, position), last=number)
            else:
                runs.append(_Run(start, position, index, number))
        return runs

    def _key_frame(self, number: int) -> KeyFrame:
        return self._packets.key_frame(self._packets.times[number], self._back)

    def _from_key_frame(self, first: int) -> Iterator[av.Packet]:
        """Returns packets in decoding order, starting at or before the key frame of `first`."""
        if self._index is not None:
            self._codec.flush_buffers()
            return self._indexed(self._index, self._key_frame(first).position)
        assert self._container
        if self._packets.seekable:
            start = self._key_frame(first)
            # The index of mp4 files is in decoding times, that of Matroska in presentation times,
            # and some indexes are wrong. So the position after seeking is checked.
            for stamp in (start.pts, start.dts):
                if stamp is None:
                    continue
                with contextlib.suppress(FFmpegError):
                    self._container.seek(stamp, stream=self._stream)
                    stream = packets.demux(self._container, self._stream)
                    packet = next(stream)
                    position = self._position(packet)
                    if position is not None and position <= start.position:
                        return itertools.chain([packet], stream)
        self._container.close()
        self._open()
        return packets.demux(self._container, self._stream)

    def _indexed(self, index: Index, start: int) -> Iterator[av.Packet]:
        data = self._bytes or b""
        for position in range(start, len(index.offsets)):
            offset = index.offsets[position]
            packet = av.Packet(data[offset : offset + index.sizes[position]])
            packet.pts = index.times[position]
            yield packet

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        # One size for all frames, as a stream may change its resolution. One thread, as for
        # decoding: by default the conversion uses one thread per core.
        self._size = width, height = self._size or (frame.width, frame.height)
        image = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", threads=1
        ).to_ndarray()
        return self._orientations.of_frame(frame).apply(image)

    def _decode_error(self, error: Exception) -> DecodeError:
        file = None if self._bytes is not None else Path(self._file)
        if file and not file.exists():
            reason = "there is no such file"
        elif self._bytes == b"" or (file and file.is_file() and file.stat().st_size == 0):
            reason = "the file is empty"
        elif isinstance(error, InvalidDataError | EOFError):
            reason = "it is not a video, or it is damaged or cut off"
        else:
            reason = str(getattr(error, "strerror", None) or error).lower()
            reason = f"it {reason}" if reason.startswith("is ") else reason
        return DecodeError(self.path, reason)


def _one_later(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yields each item after the next one was drawn, which may raise."""
    previous = list(itertools.islice(items, 1))
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], clip_frames: int) -> Iterator[Video | Frames]:
    """Opens a video or image file for clips of `clip_frames` frames.

    Raises:
      DecodeError: the file cannot be decoded, or is an image although `clip_frames` is above 1.
    """
    if is_image(path):
        check_still(os.fspath(path), clip_frames)
        yield Frames(read_image(path))
    else:
        with Video(path) as video:
            yield video


def decode_failure(opened: contextlib.AbstractContextManager[Footage]) -> str | None:
    """Decodes all frames of a video or image and returns the reason of a failure.

    Args:
      opened: context of `opened` or of `Source.opened`, not yet entered.

    Returns:
      The reason of a decode failure, or None if all frames can be decoded.
    """
    step = 64
    try:
        with opened as video:
            for start in range(0, video.num_frames, step):
                video.frames(range(start, min(start + step, video.num_frames)))
    except DecodeError as error:
        return error.reason
    return None
