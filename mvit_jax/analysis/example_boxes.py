"""Example key frames of a detection test, its worst false positives and misses, for the report."""

from typing import Any

import numpy as np
from jaxtyping import UInt8

from mvit_jax.analysis import box_drawing, example_clips, render
from mvit_jax.data.sampling import ClipSettings
from mvit_jax.training.evaluation.boxes import BoxScores
from mvit_jax.training.evaluation.frame_map import MIN_IOU, overlaps

EXAMPLES = 12  # key frames at most
MISTAKES = 8  # false positives, and misses, at most
SIDE = 320  # pixels of a picture's longer side at most
MIN_SCORE = 0.3  # of a class beside a box
CLASSES = 3  # beside a box at most


def make(scores: BoxScores, settings: ClipSettings) -> dict[str, Any]:
    """Draws example key frames of a test and its worst mistakes.

    Returns:
      A JSON-serialisable dict:

      - "examples": key frames, evenly spread over the list. A key frame has "frame" (its name),
        "picture" (a WebP image as data URI) and "boxes". A box has "colour", "truth" (names) and
        "predicted" (names and scores).
      - "false": the pairs of a box and a class with the highest scores that no truth box matches
        (IoU of at least 0.5), one per key frame. A pair has "frame", "picture", "class", "score".
      - "missed": likewise, the pairs of the truth with the lowest score of any matching box. A
        score of None means that no box matches. Key frames without detections are left out.
    """
    tables = _Tables(scores)
    tested = np.flatnonzero(scores.tested)
    spread = tested[np.linspace(0, len(tested) - 1, min(EXAMPLES, len(tested))).astype(int)]
    return {
        "examples": [_example(scores, settings, tables, int(index)) for index in np.unique(spread)],
        "false": [_mistake(scores, settings, *pair) for pair in tables.false_positives()],
        "missed": [_mistake(scores, settings, *pair) for pair in tables.misses()],
    }


class _Tables:
    """Truth of each detected box, and the best score of each truth box, by class."""

    def __init__(self, scores: BoxScores):
        frames, truth = scores.clips.key_frames, scores.clips.truth
        self._scores, self._frames, self._truth = scores, frames, truth
        self.listed = np.zeros(scores.probabilities.shape, bool)
        self.best = np.full(truth.labels.shape, np.nan)
        self.frame_of_truth = np.full(len(truth.box), -1)
        rows = {
            (truth.videos[video], second): truth.rows(index)
            for index, (video, second) in enumerate(
                zip(truth.video.tolist(), truth.second.tolist(), strict=True)
            )
        }
        counted = [
            index
            for index in np.flatnonzero(scores.tested).tolist()
            if self._name(index) not in scores.clips.excluded
        ]
        self.counted = np.zeros(len(frames.box), bool)
        for index in counted:
            boxes, true = frames.rows(index), rows.get(self._name(index), slice(0, 0))
            self.counted[boxes] = True
            self.frame_of_truth[true] = index
            matches = overlaps(truth.box[true], frames.box[boxes]) >= MIN_IOU
            self.listed[boxes] = matches.T @ (truth.labels[true] > 0)
            for row, match in zip(range(true.start, true.stop), matches, strict=True):
                if match.any():
                    self.best[row] = scores.probabilities[boxes][match].max(0)

    def _name(self, index: int) -> tuple[str, int]:
        return self._scores.clips.video(index), int(self._frames.second[index])

    def false_positives(self) -> list[tuple[int, np.ndarray, int, float | None]]:
        """Returns key frame, box, class and score of the worst false positives."""
        wrong = np.where(self.listed, -1, self._scores.probabilities)
        wrong[~self.counted] = -1
        frame = np.repeat(np.arange(len(self._frames)), np.diff(self._frames.starts))
        return self._worst(-wrong, frame, self._frames.box, wrong, wrong >= 0)

    def misses(self) -> list[tuple[int, np.ndarray, int, float | None]]:
        """Returns key frame, box, class and score of the worst misses."""
        real = (self._truth.labels > 0) & (self.frame_of_truth >= 0)[:, None]
        order = np.where(np.isnan(self.best), -1, self.best)
        return self._worst(order, self.frame_of_truth, self._truth.box, self.best, real)

    def _worst(
        self,
        order: np.ndarray,
        frame: np.ndarray,
        box: np.ndarray,
        score: np.ndarray,
        chosen: np.ndarray,
    ) -> list[tuple[int, np.ndarray, int, float | None]]:
        """Returns the chosen pairs of lowest `order`, one per key frame."""
        evaluated = np.zeros(score.shape[1], bool)
        evaluated[np.array(list(self._scores.clips.classes.names)) - 1] = True
        rows, columns = np.nonzero(chosen & evaluated[None])
        pairs: dict[int, tuple[int, np.ndarray, int, float | None]] = {}
        for i in np.argsort(order[rows, columns], kind="stable").tolist():
            row, column = int(rows[i]), int(columns[i])
            value = float(score[row, column])
            pair = int(frame[row]), box[row], column, None if np.isnan(value) else value
            pairs.setdefault(pair[0], pair)
            if len(pairs) == MISTAKES:
                break
        return list(pairs.values())


def _example(
    scores: BoxScores, settings: ClipSettings, tables: _Tables, index: int
) -> dict[str, Any]:
    rows, names = scores.clips.key_frames.rows(index), scores.clips.class_names
    boxes = scores.clips.key_frames.box[rows]
    entries, labels = [], []
    for number, row in enumerate(range(rows.start, rows.stop)):
        values = {
            name: float(scores.probabilities[row, i - 1])
            for i, name in scores.clips.classes.names.items()
        }
        best = sorted(values.items(), key=lambda pair: -pair[1])[:CLASSES]
        predicted = [(name, score) for name, score in best if score >= MIN_SCORE]
        red, green, blue = box_drawing.colour_of(number % len(box_drawing.COLOURS))
        entries.append({
            "colour": f"#{red:02x}{green:02x}{blue:02x}",
            "truth": [names[i] for i in np.flatnonzero(tables.listed[row])],
            "predicted": [list(pair) for pair in predicted],
        })  # fmt: skip
        labels.append(predicted)
    colours = [number % len(box_drawing.COLOURS) for number in range(len(boxes))]
    frame = box_drawing.draw_boxes(_key_frame(scores, settings, index), boxes, labels, colours)
    return {"frame": _name(scores, index), "picture": _data_uri(frame), "boxes": entries}


def _mistake(
    scores: BoxScores,
    settings: ClipSettings,
    index: int,
    box: np.ndarray,
    column: int,
    score: float | None,
) -> dict[str, Any]:
    frame = box_drawing.draw_boxes(_key_frame(scores, settings, index), box[None], [[]], [0])
    return {
        "frame": _name(scores, index),
        "picture": _data_uri(frame),
        "class": scores.clips.class_names[column],
        "score": score,
    }


def _name(scores: BoxScores, index: int) -> str:
    return f"{scores.clips.video(index)}, second {scores.clips.key_frames.second[index]}"


def _key_frame(
    scores: BoxScores, settings: ClipSettings, index: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes a key frame, the middle of its clip, at the size of the pictures."""
    with scores.clips.opened(index, settings.frames) as footage:
        middle = scores.clips.clip_indices(index, footage, 2, 1)[1:]
        frame = footage.frames(middle)
    return render.enlarge(example_clips.shrink(frame, SIDE), SIDE // 2)[0]


def _data_uri(frame: UInt8[np.ndarray, "height width 3"]) -> str:
    return example_clips.webp(frame[None, None])
