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

from mvit_jax.data.images import DecodeError, Frames, is_image, read_image

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
        try:
            images = self._decode(wanted.tolist())
        except FFmpegError as error:
            raise self._broken(error) from error
        return images if len(places) == len(images) and _is_range(places) else images[places]

    def _open(self) -> None:
        try:
            # Titles in unknown encodings must not make a video unreadable.
            self._container = av.open(self.path, metadata_errors="replace")
        except (FFmpegError, OSError) as error:
            raise self._broken(error) from error
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

    def _decode(self, wanted: list[int]) -> np.ndarray:
        """Gives the images of frame numbers in rising order."""
        images, done = None, 0
        number, frame = -1, None
        for number, frame in self._decoded(wanted):
            if number < wanted[done]:
                continue
            image = self._rgb(frame)
            if images is None:
                images = np.empty((len(wanted), *image.shape), np.uint8)
            ready = bisect_right(wanted, number)
            images[done:ready] = image
            done = ready
            if done == len(wanted):
                return images
        if frame is None and wanted[0] > 0:
            # The frame to repeat may be one before the last key frame.
            return self._decode([0, *wanted])[1:]
        if frame is None or number + 1 < _LEAST_SHARE_OF_STATED_FRAMES * self.num_frames:
            raise DecodeError(
                self.path, f"decoding ends after {number + 1} of its {self.num_frames} frames"
            )
        image = self._rgb(frame)
        if images is None:
            images = np.empty((len(wanted), *image.shape), np.uint8)
        images[done:] = image
        return images

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
    if not is_image(path):
        with Video(path) as video:
            yield video
    elif clip_frames == 1:
        yield Frames(read_image(path))
    else:
        reason = f"it is an image, and the model takes clips of {clip_frames} frames"
        raise DecodeError(os.fspath(path), reason)


def why_broken(path: str | os.PathLike[str], clip_frames: int = 1) -> str | None:
    """Decodes a whole file; gives the reason if that fails, None if all is well.

    Like `opened`, says that an image does not do for clips of several frames.
    """
    step = 64
    try:
        with opened(path, clip_frames) as video:
            for start in range(0, video.num_frames, step):
                video.frames(range(start, min(start + step, video.num_frames)))
    except DecodeError as error:
        return error.reason
    return None


def _is_range(places: np.ndarray) -> bool:
    return bool((places == np.arange(len(places))).all())
