"""Frames of video files, by PyAV, and of any file."""

import contextlib
import io
import itertools
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Int, UInt8

from mvit_jax.data.images import (
    DecodeError,
    Footage,
    Frames,
    check_still,
    distinct,
    is_image,
    read_image,
)

# Headers often count a frame or two more than there are, which PySlowFast bridges by repeating
# the last frame. A file that was cut off by a broken download lacks far more.
_LEAST_SHARE_OF_STATED_FRAMES = 0.9

# Decoders that can be told for each frame not to decode it if no other refers to it. Doing so
# for frames that are not wanted saves a fifth to a half of the time at stride 4 with B-frames
# and leaves the pixels of the others as they are. (The AV1 decoder drops wanted ones too.)
_CODECS_THAT_SKIP = ("h264", "hevc")


class _Start(NamedTuple):
    """A compressed frame from which on decoding can start."""

    pts: int
    dts: int | None
    position: int


class _Run(NamedTuple):
    """Compressed frames that are decoded without a gap, by their places in the file.

    `first` is the place of the first wanted frame among all that are wanted, `last` the number of
    the last one.
    """

    start: int
    end: int
    first: int
    last: int


@dataclass(frozen=True)
class Index:
    """What opening an mp4 file of H.264 finds out, for files of which it is known already.

    Attributes:
      offsets: where each compressed frame begins in the file, in order of decoding, bytes.
      sizes: bytes of each.
      times: time of presentation of each, in units of `time_base`, no two the same.
      keys: places of those from which on decoding can start.
      extradata: what the decoder must know before the first.
      time_base: numerator and denominator of seconds.
      fps: average frames a second.
    """

    offsets: Sequence[int]
    sizes: Sequence[int]
    times: Sequence[int]
    keys: Sequence[int]
    extradata: bytes
    time_base: Sequence[int]
    fps: float


class Video:
    """An open video file, or the bytes of one; a context manager.

    Opening reads all compressed frames once (3 % of the time of decoding them), for the number
    of frames that a container states may be missing or wrong, and the time stamps make every
    frame's number exact, whatever the frame rate does and wherever decoding starts. With an index
    the container is left alone: 0.1 ms instead of 2 for 300 frames of 340x256.

    Attributes:
      path: the file, or what messages call the bytes of one.
      num_frames: number of frames; frames are numbered by time of presentation.
      fps: average frames a second; 30 where the file does not say.

    Raises:
      DecodeError: no such file, no video, a broken or a cut off one.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | bytes,
        name: str | None = None,
        index: Index | None = None,
    ):
        self._bytes = file if isinstance(file, bytes) else None
        given = "a video" if isinstance(file, bytes) else os.fspath(file)
        self.path = name or given
        self._file = given
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._starts: list[_Start] = []
        self._start_times: list[int] = []
        self._position: dict[int | None, int] = {}
        self._index = index
        self._container: InputContainer | None = None
        if index is not None:
            self._use(index)
            return
        self._open()
        try:
            self._read_times()
        except BaseException as error:
            self.close()
            if isinstance(error, FFmpegError):
                raise self._broken(error) from error
            raise

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
        """Decodes frames; each distinct one is decoded and converted once.

        A frame that the decoder leaves out (a few do at a damaged end or start) is replaced by
        the nearest one that comes out.

        Args:
          indices: frame numbers in `range(num_frames)`, at least one, in any order.

        Returns:
          RGB frames, upright if the file says that it was filmed with the camera turned.

        Raises:
          DecodeError: the file is broken where these frames are.
          IndexError: a frame number out of range.
        """
        wanted, places = distinct(indices, self.num_frames)
        images = np.empty(0, np.uint8)
        for row, (_, image) in enumerate(self.in_order(wanted.tolist())):
            if row == 0:
                images = np.empty((len(wanted), *image.shape), np.uint8)
            images[row] = image
        return images if np.array_equal(places, np.arange(len(images))) else images[places]

    def _use(self, index: Index) -> None:
        """Sets up decoding without the container."""
        codec = av.CodecContext.create("h264", "r")
        codec.extradata = index.extradata
        codec.thread_type, codec.thread_count = "NONE", 1
        self._codec, self._time_base = codec, Fraction(*index.time_base)
        self._times = sorted(index.times)
        self._position = {time: place for place, time in enumerate(index.times)}
        self._starts = sorted(_Start(index.times[key], None, key) for key in index.keys)
        self._start_times = [start.pts for start in self._starts]
        self.num_frames, self.fps = len(self._times), index.fps

    def _open(self) -> None:
        try:
            # Titles in unknown encodings must not make a video unreadable.
            file = self._file if self._bytes is None else io.BytesIO(self._bytes)
            container = av.open(file, "r", metadata_errors="replace")
        except (FFmpegError, OSError) as error:
            raise self._broken(error) from error
        if container.format.name == "tty":  # which draws any text as a film of letters
            container.close()
            raise DecodeError(self.path, "it is text, not a video")
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            container.close()
            raise DecodeError(self.path, "it holds no video, only other streams")
        # Clips are loaded in many threads at a time; a decoder's own threads would slow down the
        # others (single thread 1.6 ms, automatic 2.8 ms for 48 frames of 64x64).
        stream.thread_type = "NONE"
        stream.thread_count = 1
        self._container, self._stream = container, stream
        self._codec, self._time_base = stream.codec_context, stream.time_base

    def _read_times(self) -> None:
        """Sets num_frames and fps, times of presentation, and where decoding can start."""
        times: list[int | None] = []
        found = 0
        assert self._container
        for packet in self._container.demux(self._stream):
            if packet.size == 0 or packet.is_corrupt:
                continue
            self._position[packet.pts] = found
            if packet.pts is not None and (packet.is_keyframe or not self._starts):
                self._starts.append(_Start(packet.pts, packet.dts, found))
            # What an edit list hides is decoded but not shown.
            if not packet.is_discard:
                times.append(packet.pts)
            found += 1
        stated = self._stream.frames
        if found < _LEAST_SHARE_OF_STATED_FRAMES * stated:
            raise DecodeError(self.path, f"it is cut off, with {found} of its {stated} frames")
        if not times:
            raise DecodeError(self.path, "it holds no frames")
        self.num_frames = len(times)
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 30)
        self._times = self._usable(times)
        if self._times:
            self._starts.sort(key=lambda start: start.pts)
            self._start_times = [start.pts for start in self._starts]

    def _usable(self, times: list[int | None]) -> list[int]:
        """Gives the sorted times of presentation; none at all where they cannot be trusted."""
        # AVI stores no times of presentation, and what FFmpeg makes up for B-frames is wrong.
        # Without times, frames are counted from the first one on.
        assert self._container
        if self._container.format.name == "avi" and self._codec.has_b_frames:
            return []
        known = [time for time in times if time is not None]
        return sorted(known) if len(set(known)) == len(times) else []

    def in_order(
        self, wanted: Sequence[int]
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "height width 3"]]]:
        """Gives frames by their numbers, which rise, as `frames` does, but one at a time.

        For long stretches: `frames` holds all of them, and called for one stretch after the other
        begins each at the key frame before it, which takes the square of the length of a file that
        has but one.

        Raises:
          DecodeError: while iterating, the file is broken.
        """
        shown, image = None, np.empty(0)
        for number, picture in self.pictures(wanted):
            if picture is not shown:
                shown, image = picture, self._rgb(picture)
            yield number, image

    def times(self) -> tuple[Fraction, list[int]]:
        """Gives a time base in seconds, and the time of each frame in it, the first one's zero.

        Frames follow each other at the average rate where the file has no times to be trusted.
        """
        if not self._times or self._time_base is None:
            return 1 / Fraction(self.fps).limit_denominator(1001), list(range(self.num_frames))
        return self._time_base, [time - self._times[0] for time in self._times]

    def pictures(self, wanted: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Gives frames as `in_order` does, as they come from the decoder: not RGB, not upright."""
        wanted = list(wanted)
        try:
            yield from self._pictures(wanted)
        except FFmpegError as error:
            raise self._broken(error) from error

    def _pictures(
        self, wanted: list[int], jumping: bool = True
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        done, number, frame = 0, -1, None
        for number, frame in self._decoded(wanted, jumping):
            if number < wanted[done]:
                continue
            ready = bisect_right(wanted, number)
            yield from ((name, frame) for name in wanted[done:ready])
            done = ready
            if done == len(wanted):
                return
        if frame is None and wanted[0] > 0:
            # The frame to repeat may be one before the last key frame.
            yield from itertools.islice(self._pictures([0, *wanted], jumping=False), 1, None)
            return
        if frame is None or number + 1 < _LEAST_SHARE_OF_STATED_FRAMES * self.num_frames:
            raise DecodeError(
                self.path, f"decoding ends after {number + 1} of its {self.num_frames} frames"
            )
        yield from ((name, frame) for name in wanted[done:])

    def _decoded(self, wanted: list[int], jumping: bool) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decodes what the wanted frames need, from the key frame before the first of them on.

        Frames come with their numbers, rising, and others may be among them. Where `jumping`, what
        lies between the last wanted frame before a key frame and the first one after it is left
        out.
        """
        codec = self._codec
        packets = self._packets(wanted[0])
        shown = {self._times[number] for number in wanted} if self._times else set()
        skipping = bool(shown) and codec.name in _CODECS_THAT_SKIP
        everything = [_Run(0, sys.maxsize, 0, wanted[-1])]
        runs = self._runs(wanted) if self._times and jumping else everything
        number = -1
        for run in runs:
            if run is not runs[0]:
                codec.flush_buffers()
                packets = itertools.dropwhile(
                    lambda packet, run=run: self._position.get(packet.pts) != run.start, packets
                )
            for packet in itertools.chain(self._until(packets, run.end), [None]):
                if packet is not None and skipping:
                    codec.skip_frame = "DEFAULT" if packet.pts in shown else "NONREF"
                for frame in codec.decode(packet):
                    if self._times and frame.pts is not None:
                        number = bisect_right(self._times, frame.pts) - 1
                    else:
                        number += 1
                    yield number, frame
            if number < run.last and run.end < sys.maxsize:
                # The decoder leaves frames out: those that replace them may lie in the gaps.
                yield from self._decoded(wanted[max(run.first - 1, 0) :], jumping=False)
                return

    def _until(self, packets: Iterator[av.Packet], end: int) -> Iterator[av.Packet]:
        """Gives compressed frames up to that at place `end`, without what a cut left of one."""
        for packet in packets:
            if packet.size == 0:  # what PyAV ends with
                return
            if not packet.is_corrupt:
                yield packet
            if self._position.get(packet.pts) == end:
                return

    def _runs(self, wanted: list[int]) -> list[_Run]:
        """What must be decoded for these frames, in order."""
        runs: list[_Run] = []
        for index, number in enumerate(wanted):
            time = self._times[number]
            start, place = self._start(time).position, self._position[time]
            if runs and start <= runs[-1].end + 1:  # nothing lies between
                last = runs[-1]
                runs[-1] = last._replace(end=max(last.end, place), last=number)
            else:
                runs.append(_Run(start, place, index, number))
        return runs

    def _start(self, time: int) -> _Start:
        """The last key frame that is shown at this time or before."""
        found = bisect_right(self._start_times, time) - 1
        if found < 0:
            return min(self._starts, key=lambda start: start.position)
        return self._starts[found]

    def _packets(self, first: int) -> Iterator[av.Packet]:
        """Gives compressed frames in order of decoding, all that frame `first` needs."""
        if self._index is not None:
            self._codec.flush_buffers()
            return self._indexed(self._index, self._start(self._times[first]).position)
        assert self._container
        if self._times:
            start = self._start(self._times[first])
            # The index of mp4 files has times of decoding, that of Matroska times of
            # presentation, and some lie: so see where one lands.
            for stamp in (start.pts, start.dts):
                if stamp is None:
                    continue
                with contextlib.suppress(FFmpegError):
                    self._container.seek(stamp, stream=self._stream)
                    packets = self._container.demux(self._stream)
                    packet = next(packets)
                    if self._position.get(packet.pts, len(self._position)) <= start.position:
                        return itertools.chain([packet], packets)
        self._container.close()
        self._open()
        return self._container.demux(self._stream)

    def _indexed(self, index: Index, start: int) -> Iterator[av.Packet]:
        whole = self._bytes or b""
        for place in range(start, len(index.offsets)):
            offset = index.offsets[place]
            packet = av.Packet(whole[offset : offset + index.sizes[place]])
            packet.pts = index.times[place]
            yield packet

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        # One size for all frames, as a stream may change its resolution on the way. One thread,
        # as for decoding: by default the conversion takes as many as there are cores.
        self._size = width, height = self._size or (frame.width, frame.height)
        image = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", threads=1
        ).to_ndarray()
        return np.rot90(image, round(frame.rotation / 90)) if frame.rotation else image

    def _broken(self, error: Exception) -> DecodeError:
        file = None if self._bytes is not None else Path(self._file)
        if file and not file.exists():
            reason = "there is no such file"
        elif self._bytes == b"" or (file and file.is_file() and file.stat().st_size == 0):
            reason = "the file is empty"
        elif isinstance(error, InvalidDataError | EOFError):
            reason = "it is not a video, or it is damaged or cut off"
        else:
            reason = str(getattr(error, "strerror", None) or error).lower()
        return DecodeError(self.path, reason)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], clip_frames: int) -> Iterator[Video | Frames]:
    """Opens a video or image file for clips of `clip_frames` frames.

    Raises:
      DecodeError: as `Video` and `read_image`; and an image where a clip has several frames.
    """
    if is_image(path):
        check_still(os.fspath(path), clip_frames)
        yield Frames(read_image(path))
    else:
        with Video(path) as video:
            yield video


def why_broken(opened: contextlib.AbstractContextManager[Footage]) -> str | None:
    """Decodes all of what `opened(path, clip_frames)`, or that of a `sources.Source`, gives.

    Returns:
      The reason if that fails, None if all is well.
    """
    step = 64
    try:
        with opened as video:
            for start in range(0, video.num_frames, step):
                video.frames(range(start, min(start + step, video.num_frames)))
    except DecodeError as error:
        return error.reason
    return None
