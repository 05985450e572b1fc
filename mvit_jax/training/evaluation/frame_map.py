"""Frame mAP, the metric of action detection on AVA (Gu et al. 2018).

Every detection is a pair of a person's box and a class, with a score. Two programs compute the
metric and match detections to the truth in different orders:

* "file", PySlowFast's, whose figures the papers report: detections are matched in the order of the
  file. Excluded images are left out.
* "score", that of the ActivityNet challenge: detections are matched by falling score. Only the 50
  best pairs of an image count, images that the truth does not mention are left out, and excluded
  images are not.

Both orders agree where no two detections of one class lie on one person.

In both, a detection is a true positive if its IoU with the truth box that it overlaps most is at
least 0.5, and no earlier detection has matched that box. The truth boxes are those of its image and
class; of equal IoUs the first box counts. A detection never falls back to another truth box. The
average precision is the area under the interpolated precision (VOC, all points).

Equal scores stay in the order of the file, for the matching and for the average precision. The two
programs leave this order to an unstable sort.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from mvit_jax.common.errors import UserError

Order = Literal["file", "score"]

MIN_IOU = 0.5
"""Smallest IoU of a true positive, inclusive."""

PAIRS_PER_IMAGE = 50
"""Largest number of pairs of an image in the order "score"."""

SIZES = {"small": (0.0, 0.05), "medium": (0.05, 0.2), "large": (0.2, np.inf)}
"""Ranges of a box's area as a fraction of the frame; the upper end is exclusive."""


# eq=False, repr=False: equality and repr of arrays with millions of rows.
@dataclass(frozen=True, eq=False, repr=False)
class Boxes:
    """Pairs of a box and a class, one per row.

    Attributes:
      image: number of the key frame, from 0.
      box: x1, y1, x2, y2, as fractions of the frame.
      label: id of the class.
      score: score of each detection; None for truth.
    """

    image: Int[np.ndarray, " pairs"]
    box: Float64[np.ndarray, "pairs 4"]
    label: Int[np.ndarray, " pairs"]
    score: Float64[np.ndarray, " pairs"] | None = None

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True, eq=False)
class FrameAP:
    """Average precisions, from 0 to 1; NaN for a class without truth.

    Attributes:
      order: order of the matching.
      classes: ids of the evaluated classes, ascending.
      per_class: average precision of each class.
      by_size: for each of `SIZES`, the average precision of each class. Truth boxes outside the
        range are left out. A detection has the size of the truth box that it overlaps most, if the
        IoU is at least 0.5; otherwise it has its own. Detections outside the range are left out.
      truth_per_class: number of truth boxes of each class.
      counts: numbers of evaluated images and pairs: "images", "truth_images", "detection_images",
        "truth", "detections"; and "without_area", the detections that were dropped because x1 >= x2
        or y1 >= y2.
    """

    order: Order
    classes: Int64[np.ndarray, " classes"]
    per_class: Float64[np.ndarray, " classes"]
    by_size: dict[str, Float64[np.ndarray, " classes"]]
    truth_per_class: Int64[np.ndarray, " classes"]
    counts: dict[str, int]

    @property
    def mean(self) -> float:
        """The mAP: mean over the classes with truth, NaN if there are none."""
        return _mean(self.per_class)

    def mean_by_size(self) -> dict[str, float]:
        """Returns the mAP of each of `SIZES`."""
        return {name: _mean(values) for name, values in self.by_size.items()}

    def mean_by_group(self, groups: Mapping[str, Collection[int]]) -> dict[str, float]:
        """Returns the mAP of groups of classes.

        Args:
          groups: class ids of each group; ids that are not evaluated have no effect.
        """
        return {
            name: _mean(self.per_class[np.isin(self.classes, list(ids))])
            for name, ids in groups.items()
        }


def measure_frame_ap(
    truth: Boxes,
    detections: Boxes,
    classes: Collection[int],
    *,
    order: Order = "file",
    excluded: Collection[int] = (),
    mentioned: Collection[int] = (),
) -> FrameAP:
    """Computes the average precision of each class over all images.

    5.6 million detections take 6 to 10 seconds of one core (`python -m benchmarks.detection`,
    2026-12-01).

    Args:
      truth: boxes of the truth; the classes outside `classes` may be among them.
      detections: boxes with scores, in the order of the file.
      classes: ids of the evaluated classes, 60 of AVA's 80.
      order: order of the matching, with the rules of that program (see the module).
      excluded: images to leave out, in the order "file" alone.
      mentioned: images that the truth lists without boxes; their detections count in the order
        "score". In the order "file" the detections of all images count.

    Raises:
      UserError: a score is not finite.
      ValueError: `detections` has no scores.
    """
    if detections.score is None:
        raise ValueError("the detections have no scores")
    _check_finite(detections.score)
    ids = np.unique(np.array([*classes], np.int64))
    true_rows = np.flatnonzero(np.isin(truth.label, ids))
    rows = np.flatnonzero(np.isin(detections.label, ids))
    if order == "file":
        left_out = np.array([*excluded], np.int64)
        true_rows = true_rows[~np.isin(truth.image[true_rows], left_out)]
        rows = rows[~np.isin(detections.image[rows], left_out)]
    else:
        images = np.union1d(truth.image, np.array([*mentioned], np.int64))
        rows = rows[np.isin(detections.image[rows], images)]
        rows = rows[_mark_best(_select(detections, rows, ids))]
    x1, y1, x2, y2 = detections.box.T
    has_area = (x1 < x2)[rows] & (y1 < y2)[rows]
    true, pairs = _select(truth, true_rows, ids), _select(detections, rows[has_area], ids)
    assert pairs.score is not None
    matched = _match(true, pairs, len(ids))
    hits = _mark_hits(matched, pairs.score if order == "score" else None)
    precisions = _Precisions(true.label, pairs, hits, len(ids))
    areas, pair_areas = _area(true.box), _area(pairs.box)
    pair_areas[matched >= 0] = areas[matched[matched >= 0]]
    by_size = {
        name: precisions.measure(
            (low <= areas) & (areas < high), (low <= pair_areas) & (pair_areas < high)
        )
        for name, (low, high) in SIZES.items()
    }
    return FrameAP(
        order,
        ids,
        precisions.measure(),
        by_size,
        np.bincount(true.label, minlength=len(ids)),
        {
            "images": len(np.union1d(true.image, pairs.image)),
            "truth_images": len(np.unique(true.image)),
            "detection_images": len(np.unique(pairs.image)),
            "truth": len(true),
            "detections": len(pairs),
            "without_area": int((~has_area).sum()),
        },
    )


def _check_finite(scores: np.ndarray) -> None:
    count = int((~np.isfinite(scores)).sum())
    if count:
        raise UserError(
            f"{count:,} of the {len(scores):,} scores of detections are not finite, so there is no "
            "mAP: check the weights of the model, or the file of the scores"
        )


def _select(boxes: Boxes, rows: np.ndarray, ids: np.ndarray) -> Boxes:
    """Returns rows of boxes, with the position of each class among `ids` as the label."""
    return Boxes(
        boxes.image[rows],
        boxes.box[rows],
        np.searchsorted(ids, boxes.label[rows]),
        None if boxes.score is None else boxes.score[rows],
    )


def _mark_best(pairs: Boxes) -> Bool[np.ndarray, " pairs"]:
    """Marks the 50 best pairs of each image.

    The program of ActivityNet reads the file into a heap of 50 pairs per image. A pair enters a
    full heap if its score is above the lowest score, and replaces the smallest (score, class, y1,
    x1, y2, x2). So pairs with the 50th score (`border`) are retained if at most 49 pairs of this or
    a higher score precede them. Then higher scores replace those of the lowest class.
    """
    assert pairs.score is not None
    image, score = pairs.image, pairs.score
    counts = np.bincount(image)
    starts = np.cumsum(counts) - counts
    descending = np.lexsort((-score, image))
    border = np.full(len(counts), -np.inf)
    full = counts > PAIRS_PER_IMAGE
    border[full] = score[descending[starts[full] + PAIRS_PER_IMAGE - 1]]
    marks = score > border[image]
    room = PAIRS_PER_IMAGE - np.bincount(image[marks], minlength=len(counts))
    rows = np.flatnonzero(score >= border[image])
    rows = rows[np.argsort(image[rows], kind="stable")]
    rows = rows[_ranks(image[rows]) < PAIRS_PER_IMAGE]
    tied = rows[score[rows] == border[image[rows]]]
    x1, y1, x2, y2 = -pairs.box[tied].T
    tied = tied[np.lexsort((x2, y2, x1, y1, -pairs.label[tied], image[tied]))]
    marks[tied[_ranks(image[tied]) < room[image[tied]]]] = True
    return marks


def _ranks(ascending: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """Returns the position of each row among the rows of equal value."""
    return np.arange(len(ascending)) - np.searchsorted(ascending, ascending)


def _match(truth: Boxes, pairs: Boxes, classes: int) -> Int[np.ndarray, " pairs"]:
    """Returns the truth box that each detection overlaps most, -1 if the IoU is below `MIN_IOU`."""
    true_key, key = (boxes.image * classes + boxes.label for boxes in (truth, pairs))
    by_key = np.argsort(true_key, kind="stable")
    ascending = true_key[by_key]
    first = np.searchsorted(ascending, key, "left")
    count = np.searchsorted(ascending, key, "right") - first
    matched, best = np.full(len(pairs), -1), np.zeros(len(pairs))
    rows = np.flatnonzero(count)
    for candidate in range(count.max(initial=0)):
        rows = rows[count[rows] > candidate]
        boxes = by_key[first[rows] + candidate]
        overlap = _iou(truth.box[boxes], pairs.box[rows])
        better = overlap > best[rows]  # so the first box wins ties
        best[rows[better]] = overlap[better]
        matched[rows[better]] = boxes[better]
    matched[best < MIN_IOU] = -1
    return matched


def overlaps(
    first: Float64[np.ndarray, "first 4"], second: Float64[np.ndarray, "second 4"]
) -> Float64[np.ndarray, "first second"]:
    """Returns the IoU of each box of `first` with each box of `second`."""
    shape = len(first), len(second)
    return _iou(np.repeat(first, shape[1], axis=0), np.tile(second, (shape[0], 1))).reshape(shape)


def _iou(
    truth: Float64[np.ndarray, "pairs 4"], boxes: Float64[np.ndarray, "pairs 4"]
) -> Float64[np.ndarray, " pairs"]:
    """Returns the IoU of each truth box with the box of the same row."""
    low = np.maximum(truth[:, :2], boxes[:, :2])
    high = np.minimum(truth[:, 2:], boxes[:, 2:])
    intersection = np.maximum(high - low, 0).prod(1)
    union = _area(truth) + _area(boxes) - intersection
    return np.divide(intersection, union, out=np.zeros(len(union)), where=union > 0)


def _area(box: Float64[np.ndarray, "pairs 4"]) -> Float64[np.ndarray, " pairs"]:
    return (box[:, 2:] - box[:, :2]).prod(1)


def _mark_hits(
    matched: Int[np.ndarray, " pairs"], score: Float64[np.ndarray, " pairs"] | None
) -> Bool[np.ndarray, " pairs"]:
    """Marks the first detection of each truth box, in order or by falling score."""
    rows = np.flatnonzero(matched >= 0)
    if score is not None:
        rows = rows[np.argsort(-score[rows], kind="stable")]
    first = np.unique(matched[rows], return_index=True)[1]
    hits = np.zeros(len(matched), bool)
    hits[rows[first]] = True
    return hits


class _Precisions:
    """Average precisions over subsets of the boxes, which are sorted once."""

    def __init__(self, true_label: np.ndarray, pairs: Boxes, hits: np.ndarray, classes: int):
        assert pairs.score is not None
        self._true_label, self._classes = true_label, classes
        self._rows = np.lexsort((-pairs.score, pairs.label))
        self._hits, self._label = hits[self._rows], pairs.label[self._rows]

    def measure(
        self, true_mask: np.ndarray | None = None, mask: np.ndarray | None = None
    ) -> Float64[np.ndarray, " classes"]:
        """Returns the average precision of each class.

        Args:
          true_mask: True for the truth boxes of the subset; None for all.
          mask: True for the detections of the subset; None for all.
        """
        true_label = self._true_label if true_mask is None else self._true_label[true_mask]
        hits, label = self._hits, self._label
        if mask is not None:
            inside = mask[self._rows]
            hits, label = hits[inside], label[inside]
        totals = np.bincount(true_label, minlength=self._classes)
        ends = np.searchsorted(label, np.arange(self._classes + 1))
        values = np.full(self._classes, np.nan)
        for number in np.flatnonzero(totals):
            of_class = hits[ends[number] : ends[number + 1]]
            precision = np.cumsum(of_class) / np.arange(1, len(of_class) + 1)
            interpolated = np.maximum.accumulate(precision[::-1])[::-1]
            # Recall rises by 1 / total at each true positive.
            values[number] = interpolated[of_class].sum() / totals[number]
        return values


def _mean(values: np.ndarray) -> float:
    occurring = values[~np.isnan(values)]
    return float(occurring.mean()) if len(occurring) else float("nan")
