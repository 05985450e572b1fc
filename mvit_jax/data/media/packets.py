"""The packets of a video file: presentation times, key frames, and their reliability.

Presentation times are the truth about a video. Frame rates and frame counts of headers are checked
against them. Times that are missing, doubled, or jump are repaired, and frames are then counted in
the decoder's order.
"""

import re
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from jaxtyping import Float64

from mvit_jax.data.media.images import DecodeError

MIN_SHARE = 0.9
"""Smallest share of the stated frames or seconds of an intact file.

Headers often state a frame or two too many; PySlowFast then repeats the last frame. A file that was
truncated by a broken download lacks far more.
"""

# Fragments of MPEG program streams carry wrong times after a seek.
_FORWARD_ONLY = ("mpeg",)

# No codec displays a frame more than 16 frames before or after its place in the stream.
_MOST_REORDERED = 16

# Broadcast formats: recordings start and end anywhere.
_BROADCAST = ("mpegts", "mpeg")

# In these formats, joined recordings and restarted streams have jumps of the clock.
_JUMPING = (*_BROADCAST, "flv")

# FFmpeg's threshold for a jump in seconds (`-dts_delta_threshold`).
_CLOCK_JUMP = 10

# Unit of repaired times in seconds.
_REPAIRED = Fraction(1, 1_000_000)

# Headers of the formats that state a duration: "Duration" of Matroska's segment, as a float of 4 or
# 8 bytes, and FLV's number above 0. FFmpeg makes durations up where headers have none.
_DURATION = {
    "matroska,webm": rb"\x15\x49\xa9\x66.{1,500}?\x44\x89[\x84\x88]",
    "flv": rb"duration\0(?!\0{8})",
}
# The start of ASF's file properties, with the size of the file 40 bytes later, and flags after 88.
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
HEAD = 1 << 16
"""Number of first bytes of a file that contain its header."""


class KeyFrame(NamedTuple):
    """A packet at which decoding can start; `position` is its index in decoding order."""

    pts: int
    dts: int | None
    position: int


@dataclass(frozen=True)
class Index:
    """Packet index of an H.264 mp4 file, from which it is opened without reading its container.

    Attributes:
      offsets: byte offset of each packet in the file, in decoding order.
      sizes: size of each packet in bytes.
      times: presentation time of each packet, in units of `time_base`, all distinct.
      keys: positions of the key frames in `offsets`.
      extradata: codec parameters, which the decoder requires before the first packet.
      time_base: numerator and denominator of the time unit, in seconds.
      fps: average frames per second.
    """

    offsets: Sequence[int]
    sizes: Sequence[int]
    times: Sequence[int]
    keys: Sequence[int]
    extradata: bytes
    time_base: Sequence[int]
    fps: float


@dataclass
class Packets:
    """Packets of one video stream.

    Attributes:
      num_frames: number of presented frames.
      rate: average frames per second, as the file states it.
      time_base: unit of the presentation times in seconds.
      times: presentation times in ascending order, one per frame, repaired where single ones are
        broken; empty if the file states none.
      positions: position of the packet of each presentation time, in decoding order.
      sizes: size of each packet in bytes.
      key_frames: key frames, by presentation time.
      by_time: True if a picture's presentation time determines its frame number. Otherwise pictures
        are counted from the start of the file.
      seekable: True if decoding may start at any key frame.
      invisible: presentation time and size of packets of which no picture is shown.
    """

    num_frames: int
    rate: float
    time_base: Fraction
    times: list[int]
    positions: dict[int | None, int]
    sizes: Sequence[int]
    key_frames: list[KeyFrame]
    by_time: bool
    seekable: bool
    invisible: frozenset[tuple[int | None, int]] = frozenset()
    _key_times: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.key_frames.sort()
        self._key_times = [key.pts for key in self.key_frames]

    @cached_property
    def fps(self) -> float:
        """Average frames per second: the stated rate if the presentation times confirm it."""
        if len(self.times) < 2:
            return self.rate
        span = float((self.times[-1] - self.times[0]) * self.time_base)
        intervals = len(self.times) - 1
        # Recorders of uneven frames state the resolution of their clock, or nothing.
        return self.rate if abs(self.rate * span - intervals) < 0.25 else intervals / span

    @cached_property
    def seconds(self) -> Float64[np.ndarray, " frames"]:
        """Presentation time of each frame, from 0 on."""
        if not self.times:
            return np.arange(self.num_frames) / self.fps
        ticks = np.asarray(self.times, np.int64) - self.times[0]
        return ticks * self.time_base.numerator / self.time_base.denominator

    def key_frame(self, time: int, back: int = 0) -> KeyFrame:
        """Returns the last key frame presented at or before `time`, or else the file's first.

        Args:
          time: a presentation time.
          back: number of key frames to go back further.
        """
        index = bisect_right(self._key_times, time) - 1 - back
        if index < 0:
            return min(self.key_frames, key=lambda key: key.position)
        return self.key_frames[index]


def from_index(index: Index) -> Packets:
    """Returns the packets of an indexed file."""
    return Packets(
        num_frames=len(index.times),
        rate=index.fps,
        time_base=Fraction(*index.time_base),
        times=sorted(index.times),
        positions={time: position for position, time in enumerate(index.times)},
        sizes=index.sizes,
        key_frames=[KeyFrame(index.times[key], None, key) for key in index.keys],
        by_time=True,
        seekable=True,
    )


def read_packets(container: InputContainer, stream: VideoStream, path: str, head: bytes) -> Packets:
    """Reads all packets of a stream once.

    Frames that no decoder can present do not count: those that an edit list hides, and those before
    the first key frame.

    Args:
      container: the opened file.
      stream: its video.
      path: name of the file in errors.
      head: the first `HEAD` bytes of the file.

    Raises:
      DecodeError: the file is truncated, or has no frames.
    """
    indexed = len(stream.index_entries)
    read = _read(container, stream)
    _check_frames(container, stream, path, read, indexed)
    _check_bytes(container, path, head)
    _check_duration(container, stream, path, read, head)
    keys = [position for position, packet in enumerate(read) if packet.is_key]
    # Streams in which the encoder marks no key frame are decoded from the first packet.
    start = keys[0] if keys else 0
    if start > (1 - MIN_SHARE) * len(read) and container.format.name not in _BROADCAST:
        reason = f"the first {start} of its {len(read)} frames lack a key frame"
        raise DecodeError(path, f"it is damaged: {reason}")
    presented = [packet.pts for packet in read[start:] if not packet.is_hidden]
    if not presented:
        raise DecodeError(path, "it holds no frames")
    base = Fraction(stream.time_base or 1)
    longest = _CLOCK_JUMP / base if container.format.name in _JUMPING else None
    times = [time for time in presented if time is not None]
    segments = _between_jumps(times, longest)
    exact = len(set(times)) == len(presented) and len(segments) == 1
    by_time = exact and _in_plausible_order(times, stream, len(keys))
    visible = {p.pts: i for i, p in enumerate(read) if not p.is_hidden}
    return Packets(
        num_frames=len(presented),
        rate=float(stream.average_rate or stream.guessed_rate or 30),
        time_base=base if exact else _REPAIRED,
        times=sorted(times) if exact else _repaired(presented, longest, base),
        positions={packet.pts: position for position, packet in enumerate(read)} | visible,
        sizes=[packet.size for packet in read],
        key_frames=[
            KeyFrame(packet.pts, packet.dts, position)
            for position, packet in enumerate(read)
            if packet.pts is not None and (packet.is_key or position == start)
        ],
        by_time=by_time,
        seekable=by_time and container.format.name not in _FORWARD_ONLY,
        invisible=frozenset((packet.pts, packet.size) for packet in read if packet.is_invisible),
    )


def demux(container: InputContainer, *streams: VideoStream) -> Iterator[Packet]:
    """Yields the packets of streams, or of all streams, up to the end of the file."""
    for packet in container.demux(*streams):
        # PyAV then ends each stream by a packet without content, and fails if streams were found
        # while it read.
        if packet.size == 0 and packet.dts is None:
            return
        yield packet


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    size: int
    is_key: bool
    is_hidden: bool  # by an edit list, or invisible
    is_corrupt: bool
    is_invisible: bool = False

    @property
    def time(self) -> int:
        return self.pts or self.dts or 0


def _read(container: InputContainer, stream: VideoStream) -> list[_Packet]:
    """Reads all packets, except an incomplete one at the end of a truncated file.

    Other packets that are marked as corrupt follow a fault of transmission. Most are intact.
    """
    read = []
    for packet in demux(container, stream):
        if packet.size == 0:
            continue
        # VP8's alternate reference frames serve for prediction alone (RFC 6386, section 9.1).
        invisible = stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10
        hidden = packet.is_discard or invisible
        read.append(
            _Packet(
                packet.pts, packet.dts, packet.size, packet.is_keyframe, hidden, packet.is_corrupt,
                invisible,
            )
        )  # fmt: skip
    return read[:-1] if read and read[-1].is_corrupt else read


def _check_frames(
    container: InputContainer, stream: VideoStream, path: str, read: list[_Packet], indexed: int
) -> None:
    """Raises `DecodeError` if far fewer frames can be read than the file states.

    `indexed` is the number of frames in the container's index, before the packets were read.
    """
    name, frames, stated = container.format.name, len(read), stream.frames
    if name == "avi":
        # Chunks without content repeat the frame before; they have a time, but no packet.
        frames = max([frames, *(packet.time + 1 for packet in read)])
    elif name == "mxf":
        stated = stream.duration or 0  # in frames
    elif stated and indexed:
        # Edit lists hide whole groups of pictures, which the index leaves out.
        stated = min(stated, indexed)
    if frames < MIN_SHARE * stated:
        raise DecodeError(path, f"it is cut off, with {frames} of its {stated} frames")


def _check_duration(
    container: InputContainer, stream: VideoStream, path: str, read: list[_Packet], head: bytes
) -> None:
    """Raises `DecodeError` if far less time can be read than the file states."""
    pattern = _DURATION.get(container.format.name)
    if not pattern or not re.search(pattern, head, re.DOTALL) or len(read) < 2:
        return
    seconds = np.sort([packet.time for packet in read]) * float(Fraction(stream.time_base or 1))
    duration = (container.duration or 0) / 1e6
    # The last picture of slides may be shown for as long as others.
    required = min(MIN_SHARE * duration, duration - 2 * np.diff(seconds).max())
    # The sound may be longer than the pictures.
    if seconds[-1] < required and (end := _end_of_all_streams(container)) < required:
        raise DecodeError(path, f"it is cut off, with {end:.1f} of its {duration:.1f} seconds")


def _check_bytes(container: InputContainer, path: str, head: bytes) -> None:
    """Raises `DecodeError` if an ASF or WMV file is far shorter than it states."""
    start = head.find(_ASF_PROPERTIES) if container.format.name == "asf" else -1
    if start < 0 or len(head) < start + 92:
        return
    (stated,), (flags,) = (
        struct.unpack_from(f, head, start + n) for f, n in (("<Q", 40), ("<I", 88))
    )
    is_broadcast = flags & 1  # its size was not known at the start
    if not is_broadcast and 0 < container.size < MIN_SHARE * stated:
        raise DecodeError(path, f"it is cut off, with {container.size:,} of its {stated:,} bytes")


def _end_of_all_streams(container: InputContainer) -> float:
    """Returns the largest end time of any packet of any stream, in seconds."""
    container.seek(0)
    ends = [
        float(
            ((packet.pts or packet.dts or 0) + (packet.duration or 0)) * Fraction(packet.time_base)
        )
        for packet in demux(container)
        if packet.size and packet.time_base
    ]
    return max(ends, default=0.0)


def _between_jumps(times: Sequence[int], longest: Fraction | None) -> list[Sequence[int]]:
    """Returns times, in the order of packets, cut where the clock jumps.

    It jumps back by more than codecs reorder frames, or forward by more than `longest`, if any.
    """
    if len(set(times)) < 2:
        return [times]
    back = _MOST_REORDERED * max(1, int(np.median(np.diff(np.unique(times)))))
    cuts, latest = [0], times[0]
    for i, time in enumerate(times):
        if time < latest - back or (longest is not None and time > latest + longest):
            cuts.append(i)
            latest = time
        latest = max(latest, time)
    return [times[start:stop] for start, stop in pairwise([*cuts, len(times)])]


def _repaired(
    presented: Sequence[int | None], longest: Fraction | None, base: Fraction
) -> list[int]:
    """Returns ascending times in units of `_REPAIRED`, or [] if no two times differ.

    Frames that share a time, or follow one without, are spread evenly up to the next time. After a
    jump of the clock, times continue at the typical interval.
    """
    stated = [time for time in presented if time is not None]
    if len(set(stated)) < 2:
        return []
    step = max(1, int(np.median(np.diff(np.unique(stated)))))
    filled: list[int] = []
    for time in presented:
        filled.append(time if time is not None else filled[-1] if filled else stated[0])
    joined: list[int] = []
    for segment in _between_jumps(filled, longest):
        shift = max(joined) + step - min(segment) if joined else 0
        joined += [time + shift for time in segment]
    values, counts = np.unique(joined, return_counts=True)
    gaps = np.append(np.diff(values), step)
    return [
        round((int(value) + Fraction(i * int(gap), int(count))) * base / _REPAIRED)
        for value, gap, count in zip(values, gaps, counts, strict=True)
        for i in range(count)
    ]


def _in_plausible_order(times: list[int], stream: VideoStream, keys: int) -> bool:
    """Returns False if presentation times contradict the order of the packets.

    Files that were copied from AVI or raw H.264 have decoding times in the place of presentation
    times: the times ascend, although the codec reorders frames.
    """
    order = np.argsort(np.asarray(times, np.int64), kind="stable")
    moved = np.abs(order - np.arange(len(order))).max()
    if moved == 0:
        return not stream.codec_context.has_b_frames or keys == len(times)
    return bool(moved <= 2 * _MOST_REORDERED)
