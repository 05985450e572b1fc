"""Pictures and videos of detected actions: key frames, and the video around them, with boxes."""

from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from mvit_jax.analysis import render
from mvit_jax.analysis.box_drawing import COLOURS, Label, draw_boxes
from mvit_jax.data.media.video import Video
from mvit_jax.predict import tracks
from mvit_jax.predict.boxes import BoxPrediction, Progress, ScoredFrame, Shown, frame_at
from mvit_jax.predict.windows import clock

Image = UInt8[np.ndarray, "_ _ 3"]

AROUND = 0.5  # seconds before and after a key frame that the video shows
TILES = 12  # key frames of a picture at most
_TILE = 640  # width of a key frame in a picture
_SMALLEST, _LARGEST = 360, 1080  # short side of a drawn frame


def write(
    path: Path,
    prediction: BoxPrediction,
    names: Sequence[str],
    shown: Shown,
    start: Path,
    progress: Progress = lambda done, of: None,
) -> list[Path]:
    """Writes START_boxes.png and, if there are persons, START_boxes.mp4; returns their paths."""
    written = [Path(f"{start}_boxes.png")]
    render.save_png(written[0], picture(path, prediction, names, shown))
    if any(len(frame.boxes) for frame in prediction.frames):
        written.append(Path(f"{start}_boxes.mp4"))
        frames, fps = moving(path, prediction, names, shown, progress)
        render.save_mp4(written[1], frames, fps)
    return written


def picture(
    path: Path,
    prediction: BoxPrediction,
    names: Sequence[str],
    shown: Shown,
    columns: int = 3,
) -> Image:
    """Returns a contact sheet of key frames with boxes, evenly spaced over those with persons."""
    frames = [frame for frame in prediction.frames if len(frame.boxes)]
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(TILES, len(frames))).round().astype(int))
    frames = [frames[i] for i in chosen]
    colours, tiles = _colours(prediction), []
    with Video(path) as video:
        if not frames:
            return _scaled(video.frames([frame_at(video, prediction.seconds / 2)])[0])
        numbers = [frame_at(video, frame.seconds) for frame in frames]
        for frame, (_, image) in zip(frames, video.in_order(numbers), strict=True):
            tile = _scaled(image)
            if len(frames) > 1 and tile.shape[1] > _TILE:
                tile = _resized(tile, _TILE / tile.shape[1])
            tiles.append(
                draw_boxes(
                    tile, frame.boxes, _labels(frame, names, shown), colours(frame),
                    clock(frame.seconds, 1),
                )
            )  # fmt: skip
    return render.contact_sheet(np.stack(tiles), columns, gap=4)


def moving(
    path: Path,
    prediction: BoxPrediction,
    names: Sequence[str],
    shown: Shown,
    progress: Progress = lambda done, of: None,
    largest: int = _LARGEST,
) -> tuple[Iterator[Image], float]:
    """Returns the frames up to half a second from a key frame, with boxes, and their rate.

    The boxes of a track move evenly from key frame to key frame; its labels are those of the
    nearest one. Frames whose short side exceeds `largest` pixels are scaled down.
    """
    with Video(path) as video:
        fps, times = video.fps, video.seconds.tolist()
    centres = [frame.seconds for frame in prediction.frames]
    nearest = [_nearest(centres, time) for time in times]
    numbers = [
        number
        for number, (time, i) in enumerate(zip(times, nearest, strict=True))
        if abs(time - centres[i]) <= AROUND
    ]

    def images() -> Iterator[Image]:
        colours = _colours(prediction)
        labels = [_labels(frame, names, shown) for frame in prediction.frames]
        with Video(path) as video:
            for done, (number, image) in enumerate(video.in_order(numbers), start=1):
                i, time = nearest[number], times[number]
                frame = prediction.frames[i]
                yield draw_boxes(
                    _scaled(image, largest), _boxes_at(prediction.frames, i, time), labels[i],
                    colours(frame), clock(time, 1),
                )  # fmt: skip
                progress(done, len(numbers))

    return images(), fps


def _colours(prediction: BoxPrediction) -> Callable[[ScoredFrame], list[int]]:
    """Returns the function of the colours of a key frame's boxes."""
    by_track = tracks.colours([frame.tracks for frame in prediction.frames], len(COLOURS))
    return lambda frame: [by_track[track] for track in frame.tracks.tolist()]


def _labels(frame: ScoredFrame, names: Sequence[str], shown: Shown) -> list[list[Label]]:
    """Returns the labels of each box; the first line begins with the number of the person."""
    return [
        [(f"{track}: " * (n == 0) + names[i], p) for n, (i, p) in enumerate(shown(row))]
        for track, row in zip(frame.tracks.tolist(), frame.probabilities, strict=True)
    ]


def _nearest(centres: Sequence[float], time: float) -> int:
    """Returns the index of the ascending value that is nearest to `time`."""
    after = bisect(centres, time)
    beside = [i for i in (after - 1, after) if 0 <= i < len(centres)]
    return min(beside, key=lambda i: abs(centres[i] - time))


def _boxes_at(frames: Sequence[ScoredFrame], i: int, time: float) -> Float64[np.ndarray, "boxes 4"]:
    """Returns the boxes of key frame `i` at a time nearby, moved as their tracks move."""
    frame = frames[i]
    j = i + (1 if time > frame.seconds else -1)
    boxes = frame.boxes.copy()
    if not 0 <= j < len(frames) or time == frame.seconds:
        return boxes
    share = (time - frame.seconds) / (frames[j].seconds - frame.seconds)
    rows = {int(track): row for row, track in enumerate(frames[j].tracks)}
    for row, track in enumerate(frame.tracks.tolist()):
        if track in rows:
            boxes[row] += share * (frames[j].boxes[rows[track]] - boxes[row])
    return boxes


def _scaled(image: Image, largest: int = _LARGEST) -> Image:
    """Returns a frame on which labels are readable, and which browsers can play."""
    image = render.enlarge(image[None], _SMALLEST)[0]
    factor = largest / min(image.shape[:2])
    return _resized(image, factor) if factor < 1 else image


def _resized(image: Image, factor: float) -> Image:
    height, width = (round(side * factor) for side in image.shape[:2])
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))
