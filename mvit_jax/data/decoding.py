"""Frames of video files, by PyAV, and of any file."""

import contextlib
import itertools
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.error import FFmpegError, InvalidDataError
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Int, UInt8

from mvit_jax.data.images import (
    DecodeError,
    Footage,
    Frames,
    check_still,
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


class Video:
    """An open video file; a context manager.

    Opening reads all compressed frames once (3 % of the time of decoding them), for the number
    of frames that a container states may be missing or wrong, and the time stamps make every
    frame's number exact, whatever the frame rate does and wherever decoding starts.

    Attributes:
      path: the file.
      num_frames: number of frames; frames are numbered by time of presentation.
      fps: average frames a second; 30 where the file does not say.

    Raises:
      DecodeError: no such file, no video, a broken or a cut off one.
    """

    path: str
    num_frames: int
    fps: float

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._starts: list[_Start] = []
        self._position: dict[int | None, int] = {}
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
        wanted, places = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if wanted[0] < 0 or wanted[-1] >= self.num_frames:
            raise IndexError(
                f"frames {wanted[0]} to {wanted[-1]} of a video of {self.num_frames} frames"
            )
        images = np.empty(0, np.uint8)
        for row, (_, image) in enumerate(self.in_order(wanted.tolist())):
            if row == 0:
                images = np.empty((len(wanted), *image.shape), np.uint8)
            images[row] = image
        return images if len(places) == len(images) and _is_range(places) else images[places]

    def _open(self) -> None:
        try:
            # Titles in unknown encodings must not make a video unreadable.
            self._container = av.open(self.path, metadata_errors="replace")
        except (FFmpegError, OSError) as error:
            raise self._broken(error) from error
        if self._container.format.name == "tty":  # which draws any text as a film of letters
            self._container.close()
            raise DecodeError(self.path, "it is text, not a video")
        stream = self._container.streams.best("video")
        if not isinstance(stream, VideoStream):
            self._container.close()
            raise DecodeError(self.path, "it holds no video, only other streams")
        # Clips are loaded in many threads at a time; a decoder's own threads would slow down the
        # others (single thread 1.6 ms, automatic 2.8 ms for 48 frames of 64x64).
        stream.thread_type = "NONE"
        stream.thread_count = 1
        self._stream = stream

    def _read_times(self) -> None:
        """Sets num_frames and fps, times of presentation, and where decoding can start."""
        times: list[int | None] = []
        found = 0
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

    def _usable(self, times: list[int | None]) -> list[int]:
        """Gives the sorted times of presentation; none at all where they cannot be trusted."""
        # AVI stores no times of presentation, and what FFmpeg makes up for B-frames is wrong.
        # Without times, frames are counted from the first one on.
        if self._container.format.name == "avi" and self._stream.codec_context.has_b_frames:
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
        wanted = list(wanted)
        try:
            yield from self._in_order(wanted)
        except FFmpegError as error:
            raise self._broken(error) from error

    def _in_order(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        done, number, frame = 0, -1, None
        for number, frame in self._decoded(wanted):
            if number < wanted[done]:
                continue
            image = self._rgb(frame)
            ready = bisect_right(wanted, number)
            yield from ((name, image) for name in wanted[done:ready])
            done = ready
            if done == len(wanted):
                return
        if frame is None and wanted[0] > 0:
            # The frame to repeat may be one before the last key frame.
            yield from itertools.islice(self._in_order([0, *wanted]), 1, None)
            return
        if frame is None or number + 1 < _LEAST_SHARE_OF_STATED_FRAMES * self.num_frames:
            raise DecodeError(
                self.path, f"decoding ends after {number + 1} of its {self.num_frames} frames"
            )
        image = self._rgb(frame)
        yield from ((name, image) for name in wanted[done:])

    def _decoded(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decodes from the key frame before the first wanted frame on; gives numbered frames."""
        packets = self._packets(wanted[0])
        codec = self._stream.codec_context
        shown = {self._times[number] for number in wanted} if self._times else set()
        skipping = bool(shown) and codec.name in _CODECS_THAT_SKIP
        number = -1
        for packet in packets:
            if packet.is_corrupt:  # the piece of a frame at which a file was cut off
                continue
            if skipping:
                skip = packet.size > 0 and packet.pts not in shown
                codec.skip_frame = "NONREF" if skip else "DEFAULT"
            for frame in packet.decode():
                if self._times and frame.pts is not None:
                    number = bisect_right(self._times, frame.pts) - 1
                else:
                    number += 1
                yield number, frame

    def _packets(self, first: int) -> Iterator[av.Packet]:
        """Gives compressed frames in order of decoding, all that frame `first` needs."""
        if self._times:
            time = self._times[first]
            start = max((start for start in self._starts if start.pts <= time), default=None)
            start = self._starts[0] if start is None else start
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

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        # One size for all frames, as a stream may change its resolution on the way. One thread,
        # as for decoding: by default the conversion takes as many as there are cores.
        self._size = width, height = self._size or (frame.width, frame.height)
        image = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", threads=1
        ).to_ndarray()
        return np.rot90(image, round(frame.rotation / 90)) if frame.rotation else image

    def _broken(self, error: Exception) -> DecodeError:
        file = Path(self.path)
        if not file.exists():
            reason = "there is no such file"
        elif file.is_file() and file.stat().st_size == 0:
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


def _is_range(places: np.ndarray) -> bool:
    return bool((places == np.arange(len(places))).all())
