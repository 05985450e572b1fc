"""Action detection in video files: class scores of each person at each key frame."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64, Int64, UInt8

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import AnyPath, expanded
from mvit_jax.common.text import plural
from mvit_jax.config import Config
from mvit_jax.data import detection
from mvit_jax.data.augmentation import Cut, whole_cut
from mvit_jax.data.formats import ava_tables
from mvit_jax.data.formats.ava import clip_indices
from mvit_jax.data.media.video import Video, opened
from mvit_jax.data.sampling import FRAME_RATE
from mvit_jax.predict.detector import PersonDetector
from mvit_jax.predict.tracks import link
from mvit_jax.predict.windows import clips_of
from mvit_jax.training import build
from mvit_jax.training.distributed import sharding
from mvit_jax.training.run_folder import RunFolder, class_names
from mvit_jax.training.step import detect_step

_LAST_SECOND = 10**6  # of a csv file
_FEWEST = 4  # boxes of a compiled program


@dataclass(frozen=True)
class KeyFrame:
    """The persons at a moment of a video.

    Attributes:
      seconds: time from the beginning of the video.
      boxes: x1, y1, x2, y2 as fractions of the frame.
      persons: score of each person.
    """

    seconds: float
    boxes: Float64[np.ndarray, "boxes 4"]
    persons: Float64[np.ndarray, " boxes"]


@dataclass(frozen=True)
class ScoredFrame(KeyFrame):
    """A key frame with the model's scores.

    Attributes:
      tracks: number of each box's track.
      probabilities: of each box and class, independent of each other.
    """

    tracks: Int64[np.ndarray, " boxes"]
    probabilities: Float64[np.ndarray, "boxes classes"]


@dataclass(frozen=True)
class BoxPrediction:
    """A detection model's prediction for one video.

    Attributes:
      frames: the key frames, by time.
      seconds: length of the video.
    """

    frames: tuple[ScoredFrame, ...]
    seconds: float

    def tracks(self) -> list[tuple[float, float, Float64[np.ndarray, " classes"]]]:
        """Returns the times of each track's first and last box, and its mean probabilities."""
        by_track: dict[int, list[tuple[float, np.ndarray]]] = {}
        for frame in self.frames:
            for track, probabilities in zip(frame.tracks, frame.probabilities, strict=True):
                by_track.setdefault(int(track), []).append((frame.seconds, probabilities))
        return [
            (rows[0][0], rows[-1][0], np.mean([p for _, p in rows], axis=0))
            for _, rows in sorted(by_track.items())
        ]


KeyFrames = Callable[..., list[KeyFrame]]  # of an opened video; `progress` may be passed
Progress = Callable[[int, int], object]  # called with the number of parts done and of all parts


@dataclass(frozen=True)
class Shown:
    """Choice of the classes of a box.

    Attributes:
      top: number of classes at most.
      min_score: smallest probability.
    """

    top: int = 5
    min_score: float = 0.3

    def __call__(self, probabilities: Float64[np.ndarray, " classes"]) -> list[tuple[int, float]]:
        """Returns the most probable classes and their probabilities."""
        rows = _best(probabilities, self.top)
        return [(i, probability) for i, probability in rows if probability >= self.min_score]


def is_detection(folder: str | AnyPath) -> bool:
    """Returns True if the run in a folder is one of action detection."""
    with RunFolder(folder) as run:
        return run.config.data.source == "ava"


class BoxPredictor:
    """The detection model of a workdir, or of a folder that `convert` wrote.

    Attributes:
      config: the run's config.
      names: of the classes.
      step: of the checkpoint.

    Raises:
      UserError: the folder has no run or no such checkpoint, or the number of class names is wrong.
    """

    def __init__(
        self, folder: str | AnyPath, *, which: str = "last", weights: str | None = None
    ) -> None:
        """Loads the model; arguments as for `Predictor`."""
        mesh = sharding.make_mesh()  # the run's mesh may need more devices than this machine has
        with RunFolder(folder, {}, weights=weights) as run:
            self.config: Config = run.config
            self.names = class_names(self.config, folder, run.num_classes(which))
            settings = run.settings(which)
            self._params, self.step = run.params_on(mesh, which), run.step(which)
        self._settings = settings.clips
        self._scores = jax.jit(
            partial(
                detect_step,
                apply=build.model_apply(self.config, settings.model, mesh),
                recipe=settings.step,
            )
        )

    def predict(
        self,
        path: str | os.PathLike[str],
        key_frames: KeyFrames,
        *,
        check: Callable[[Video], None] = lambda video: None,
        progress: Progress = lambda done, of: None,
    ) -> BoxPrediction:
        """Scores the persons of a video in the whole frame, at the model's short side.

        Args:
          path: the file.
          key_frames: returns the key frames of the opened video, by time: `detect` or `read_boxes`
            without their first argument.
          check: called with the opened video; may raise.
          progress: called with the number of key frames done and the total, once for the boxes and
            once for the scores.

        Raises:
          DecodeError: the file cannot be decoded, or is an image.
        """
        with opened(path, max(self._settings.frames, 2)) as video:
            assert isinstance(video, Video)  # an image has no frames for a clip of two
            check(video)
            frames = key_frames(video, progress=progress)
            seconds = video.num_frames / video.fps
            tracks = link([f.seconds for f in frames], [f.boxes for f in frames])
            scores = self._scored(video, frames)
            scored = []
            for frame, track, probabilities in zip(frames, tracks, scores, strict=True):
                scored.append(
                    ScoredFrame(frame.seconds, frame.boxes, frame.persons, track, probabilities)
                )
                progress(len(scored), len(frames))
        return BoxPrediction(tuple(scored), seconds)

    def _scored(
        self, video: Video, frames: Sequence[KeyFrame]
    ) -> Iterator[Float64[np.ndarray, "boxes classes"]]:
        """Yields the probabilities of each key frame's boxes."""
        pending: tuple[int, jax.Array] | None = None
        clips = self._clips(video, [frame for frame in frames if len(frame.boxes)])
        for frame in frames:
            scores: tuple[int, Any] = 0, np.zeros((1, 0, len(self.names)))
            if len(frame.boxes):
                clip, boxes = next(clips)
                with jax.default_matmul_precision(self.config.precision):
                    scores = len(boxes), self._scores(self._params, clip[None], _padded(boxes))
            if pending is not None:  # the next clip is decoded while the model computes
                yield np.asarray(pending[1], np.float64)[0, : pending[0]]
            pending = scores
        if pending is not None:
            yield np.asarray(pending[1], np.float64)[0, : pending[0]]

    def _clips(
        self, video: Video, frames: Sequence[KeyFrame]
    ) -> Iterator[
        tuple[UInt8[np.ndarray, "1 time height width 3"], Float64[np.ndarray, "boxes 4"]]
    ]:
        """Yields the clip of each key frame, and its boxes in pixels of the clip."""
        if not frames:
            return
        settings = self._settings
        indices = np.stack(
            [
                clip_indices(
                    video, round(frame.seconds * FRAME_RATE), settings.frames, settings.stride
                )
                for frame in frames
            ]
        )
        height, width = video.frames([0]).shape[1:3]
        cut: Cut = whole_cut(height, width, settings.short_side)

        def transform(
            images: UInt8[np.ndarray, "time _ _ 3"],
        ) -> UInt8[np.ndarray, "1 time _ _ 3"]:
            return cut.apply(images, settings.interpolation)[None]

        for frame, clip in zip(frames, clips_of(video, indices, transform), strict=True):
            yield clip, cut.move(detection.to_pixels(frame.boxes, height, width))


def _padded(boxes: Float64[np.ndarray, "boxes 4"]) -> np.ndarray:
    """Returns boxes [1, n, 4] with zeros up to a power of two, as each number is a compilation."""
    count = max(_FEWEST, 1 << (len(boxes) - 1).bit_length())
    return np.pad(boxes.astype(np.float32), ((0, count - len(boxes)), (0, 0)))[None]


def detect(
    detector: PersonDetector, video: Video, progress: Progress = lambda done, of: None
) -> list[KeyFrame]:
    """Returns the persons in the middle of each second of a video."""
    duration = video.num_frames / video.fps
    times = [min(0.5, duration / 2), *np.arange(1.5, duration).tolist()]
    numbers = [frame_at(video, time) for time in times]
    frames = []
    for time, (_, image) in zip(times, video.in_order(numbers), strict=True):
        frames.append(KeyFrame(time, *detector(image)))
        progress(len(frames), len(times))
    return frames


def frame_at(video: Video, seconds: float) -> int:
    """Returns the number of the frame that is shown at a time, as in the clips of AVA."""
    return int(clip_indices(video, round(seconds * FRAME_RATE), 1, 1)[0])


def read_boxes(
    file: str | os.PathLike[str],
    video: Video,
    *,
    min_score: float,
    first_second: int = 0,
    classes: int = ava_tables.CLASSES,
    progress: Progress = lambda done, of: None,
) -> list[KeyFrame]:
    """Reads the persons of a video from a csv file in AVA's format.

    Args:
      file: lines `video,second,x1,y1,x2,y2,action,score`, or AVA's labels, whose last column is
        the number of a person. The video is named as the file, without its suffix.
      video: the opened video.
      min_score: smallest score of a person.
      first_second: second of the csv file at which the video begins.
      classes: largest number of an action in the file. The actions are not used.
      progress: not called.

    Raises:
      UserError: the file is broken, has no boxes of the video, or boxes outside its length.
    """
    path, name = expanded(file), Path(video.path).stem
    files = ([path], []) if _has_labels(path) else ([], [path])
    table = ava_tables.read_key_frames(
        *files, classes=classes, min_score=min_score, seconds=range(_LAST_SECOND)
    )
    if name not in table.videos:
        shown = ", ".join(table.videos[:3]) + ", ..." * (len(table.videos) > 3)
        raise UserError(
            f"{path} has no boxes of {name}, only of {plural(len(table.videos), 'video')} "
            f"({shown}): name the video in the first column as its file, without the suffix"
        )
    rows = np.flatnonzero(table.video == table.videos.index(name))
    seconds = table.second[rows] - first_second
    duration = video.num_frames / video.fps
    if not len(rows) or seconds[0] < 0 or seconds[-1] > duration:
        raise UserError(
            f"{path} has boxes of {name} at the seconds {table.second[rows[0]]} to "
            f"{table.second[rows[-1]]}, but the video lasts from {first_second} to "
            f"{first_second + duration:.1f}: set --first_second to the second of its first frame"
        )
    return [
        KeyFrame(float(second), table.box[table.rows(row)], table.score[table.rows(row)])
        for row, second in zip(rows.tolist(), seconds.tolist(), strict=True)
    ]


def _has_labels(path: Path) -> bool:
    """Returns True if a csv file has labels of persons with numbers, in place of scores."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            rows = [line.rstrip().split(",") for line in itertools.islice(lines, 1000)]
    except (OSError, UnicodeDecodeError):
        return False  # `read_key_frames` raises
    return all(
        len(row) in (1, 2, 7)
        or (row[-1].strip().isdecimal() and row[6:7] and row[6].strip() not in ("", "-1"))
        for row in rows
    )


def described(prediction: BoxPrediction, names: Sequence[str], shown: Shown) -> dict[str, Any]:
    """Returns a JSON-serialisable dict of a prediction.

    "key_frames" has the time in seconds and, for each box, its corners as fractions of the frame,
    its track, the score of the person and the most probable classes. "persons" has an entry per
    track, the longest first: the times of its first and last box, and the classes by their mean
    probability, at least one.
    """

    def classes(rows: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"class": names[i], "probability": probability} for i, probability in rows]

    frames = [
        {
            "second": frame.seconds,
            "boxes": [
                {
                    "box": [round(x, 4) for x in frame.boxes[i].tolist()],
                    "track": int(frame.tracks[i]),
                    "person": float(frame.persons[i]),
                    "classes": classes(_best(frame.probabilities[i], shown.top)),
                }
                for i in range(len(frame.boxes))
            ],
        }
        for frame in prediction.frames
    ]
    persons = [
        {"track": i, "start": start, "end": end, "classes": classes(shown(mean) or _best(mean, 1))}
        for i, (start, end, mean) in enumerate(prediction.tracks())
    ]
    persons.sort(key=lambda person: person["start"] - person["end"])
    return {"seconds": prediction.seconds, "key_frames": frames, "persons": persons}


def _best(probabilities: Float64[np.ndarray, " classes"], top: int) -> list[tuple[int, float]]:
    # A stable sort, so that ties have the same order on every platform.
    order = np.argsort(-probabilities, kind="stable")[:top].tolist()
    return [(i, float(probabilities[i])) for i in order]
