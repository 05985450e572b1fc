"""Frame mAP against plain loops over the published rules, and against values worked by hand."""

import dataclasses
import heapq

import numpy as np
import pytest

from mvit_jax.training.evaluation import frame_map
from mvit_jax.training.evaluation.frame_map import Boxes, measure_frame_ap
from tests.support.refusals import refused

CLASSES = [1, 3, 4, 7, 8, 11, 12]  # of 12, the ids between them are not evaluated
LEFT = (0.0, 0.0, 0.5, 1.0)
RIGHT = (0.5, 0.0, 1.0, 1.0)


def boxes(rows):
    """Returns the `Boxes` of rows (image, box, label) or (image, box, label, score)."""
    columns = [*zip(*rows, strict=True)] or [[], [], []]
    return Boxes(
        np.array(columns[0], np.int64),
        np.array(columns[1], np.float64).reshape(-1, 4),
        np.array(columns[2], np.int64),
        np.array(columns[3], np.float64) if len(columns) == 4 else None,
    )


def measure(truth, detections, classes=(1,), **options):
    scored = boxes(detections)
    if not detections:
        scored = dataclasses.replace(scored, score=np.zeros(0))
    return measure_frame_ap(boxes(truth), scored, classes, **options)


def reference(truth, detections, classes, *, order, excluded=(), mentioned=(), size=None):
    """Computes the average precisions from rows, one box at a time."""
    listed = {row[0] for row in truth} | set(mentioned)
    truth = [row for row in truth if row[2] in classes]
    detections = [row for row in detections if row[2] in classes]
    if order == "file":
        truth = [row for row in truth if row[0] not in excluded]
        detections = [row for row in detections if row[0] not in excluded]
    else:
        heaps = {}
        for number, (image, (x1, y1, x2, y2), label, score) in enumerate(detections):
            heap = heaps.setdefault(image, [])
            entry = (score, label, y1, x1, y2, x2, number)
            if len(heap) < 50:
                heapq.heappush(heap, entry)
            elif score > heap[0][0]:
                heapq.heapreplace(heap, entry)
        numbers = sorted(
            (-entry[0], entry[-1])
            for image, heap in heaps.items()
            if image in listed
            for entry in heap
        )
        detections = [detections[number] for _, number in numbers]
    with_area = [row for row in detections if row[1][0] < row[1][2] and row[1][1] < row[1][3]]
    return [one_class(truth, with_area, label, size) for label in classes]


def one_class(truth, detections, label, size):
    targets = [row for row in truth if row[2] == label]
    matched, outcomes = set(), []  # outcomes: score, hit, area
    for image, box, name, score in detections:
        if name != label:
            continue
        best, best_iou = -1, 0.0
        for number, target in enumerate(targets):
            if target[0] == image and iou(target[1], box) > best_iou:
                best, best_iou = number, iou(target[1], box)
        if best_iou < 0.5:
            outcomes.append((score, False, area(box)))
        else:
            outcomes.append((score, best not in matched, area(targets[best][1])))
            matched.add(best)
    if size is not None:
        low, high = size
        targets = [row for row in targets if low <= area(row[1]) < high]
        outcomes = [outcome for outcome in outcomes if low <= outcome[2] < high]
    if not targets:
        return float("nan")
    outcomes.sort(key=lambda outcome: -outcome[0])
    points, hits = [], 0
    for position, (_, hit, _) in enumerate(outcomes, start=1):
        hits += hit
        points.append((hits / len(targets), hits / position))
    area_under, previous = 0.0, 0.0
    for number, (recall, _) in enumerate(points):
        interpolated = max(precision for _, precision in points[number:])
        area_under += (recall - previous) * interpolated
        previous = recall
    return area_under


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return width * height / (area(a) + area(b) - width * height)


def draw(seed):
    """Returns rows of truth and detections of few images, and images to exclude and mention.

    Some detections come twice, some lie on one person, some have no area. Some images have more
    than 50 pairs, no truth or no detection. Scores have one or many decimals.
    """
    rng = np.random.default_rng(seed)
    decimals = int(rng.choice([1, 2, 12]))
    truth, detections = [], []
    for image in rng.permutation(8):
        image = int(image)
        for _ in range(rng.integers(1, 6)):
            corner, side = rng.uniform(0, 0.6, 2), rng.uniform(0.1, 0.6, 2)
            person = np.array([*corner, *np.minimum(corner + side, 1)])
            labels = rng.choice(np.arange(1, 12), rng.integers(1, 4), replace=False)
            if image != 0:
                truth += [(image, tuple(person), int(label)) for label in labels]
                truth += truth[-1:] * (rng.random() < 0.1)
            for _ in range(rng.choice([0, 1, 1, 2]) if image != 1 else 0):
                box = tuple(np.clip(person + rng.normal(0, 0.03, 4), 0, 1))
                for label in range(1, 13):
                    score = rng.random() + (label in labels) * rng.random()
                    detections.append((image, box, label, round(score / 2, decimals)))
                    if rng.random() < 0.05:
                        detections.append(detections[-1])
                    if rng.random() < 0.05:
                        x1, y1, x2, y2 = box
                        detections.append((image, (x2, y1, x1, y2), label, 0.9))
    return truth, detections, {2, 9}, {0, 9} if rng.random() < 0.5 else set()


@pytest.mark.parametrize("order", ["file", "score"])
@pytest.mark.parametrize("seeds", [range(start, start + 10) for start in range(0, 60, 10)])
def test_drawn_boxes_agree_with_plain_loops(seeds, order):
    ties = 0
    for seed in seeds:
        truth, detections, excluded, mentioned = draw(seed)
        options = {"order": order, "excluded": excluded, "mentioned": mentioned}
        result = measure(truth, detections, CLASSES, **options)
        expected = reference(truth, detections, CLASSES, **options)
        np.testing.assert_allclose(result.per_class, expected, rtol=0, atol=1e-12)
        assert np.isnan(expected[-1]) and 0.05 < result.mean < 0.9
        assert result.mean == pytest.approx(np.nanmean(expected))
        for name, size in frame_map.SIZES.items():
            expected = reference(truth, detections, CLASSES, size=size, **options)
            np.testing.assert_allclose(result.by_size[name], expected, rtol=0, atol=1e-12)
        ties += len({row[3] for row in detections}) < len(detections)
    assert ties  # the rule for equal scores is part of the comparison


def test_both_orders_agree_without_overlapping_detections():
    rng = np.random.default_rng(0)
    truth = [(i, box, 1 + i % 3) for i in range(20) for box in (LEFT, RIGHT)]
    detections = [(*row, rng.random()) for row in truth if rng.random() < 0.7]
    results = [measure(truth, detections, (1, 2, 3), order=order) for order in ("file", "score")]
    assert np.array_equal(results[0].per_class, results[1].per_class)
    assert 0.5 < results[0].mean < 0.9


def test_average_precision_interpolates_precision():
    truth = [(0, LEFT, 1), (1, LEFT, 1), (2, LEFT, 1)]
    detections = [
        (0, LEFT, 1, 0.9),  # precision 1
        (0, RIGHT, 1, 0.8),
        (1, LEFT, 1, 0.7),  # 2/3
        (1, LEFT, 1, 0.6),  # the box is matched already
    ]
    assert measure(truth, detections).per_class.tolist() == [pytest.approx((1 + 2 / 3) / 3)]
    # A hit at rank 3 after a false positive at rank 1 and a hit at rank 2: 2/3 for both.
    scores = [(0, RIGHT, 1, 0.9), (0, LEFT, 1, 0.8), (1, LEFT, 1, 0.7)]
    assert measure(truth, scores).mean == pytest.approx(2 / 3 * 2 / 3)


def test_the_order_decides_between_two_detections_of_one_person():
    truth = [(0, LEFT, 1)]
    detections = [(0, LEFT, 1, 0.3), (0, LEFT, 1, 0.9)]
    assert measure(truth, detections, order="file").mean == 0.5
    assert measure(truth, detections, order="score").mean == 1.0


def test_equal_scores_stay_in_the_order_of_the_file():
    truth = [(0, LEFT, 1)]
    hit, miss = (0, LEFT, 1, 0.5), (0, RIGHT, 1, 0.5)
    for order in ("file", "score"):
        assert measure(truth, [hit, miss], order=order).mean == 1.0
        assert measure(truth, [miss, hit], order=order).mean == 0.5


@pytest.mark.parametrize(("width", "ap"), [(0.5, 1.0), (0.499, 0.0)])
def test_an_iou_of_one_half_is_a_hit(width, ap):
    detections = [(0, (0.0, 0.0, width, 1.0), 1, 0.5)]
    assert measure([(0, (0.0, 0.0, 1.0, 1.0), 1)], detections).mean == ap


def test_a_detection_never_falls_back_to_another_truth_box():
    # Both detections overlap the first box most, and the second by 2/3.
    truth = [(0, LEFT, 1), (0, (0.1, 0.0, 0.6, 1.0), 1)]
    assert measure(truth, [(0, LEFT, 1, 0.9), (0, LEFT, 1, 0.8)]).mean == 0.5
    # Of equal boxes only the first is ever matched.
    assert measure([(0, LEFT, 1)] * 2, [(0, LEFT, 1, 0.9), (0, LEFT, 1, 0.8)]).mean == 0.5


def test_the_first_of_two_truth_boxes_of_equal_iou_is_matched():
    first, second, between = (0.0, 0.5), (0.25, 0.75), (0.125, 0.625)  # IoU 0.6 with both
    spans = [(x1, 0.0, x2, 1.0) for x1, x2 in (first, second, between)]
    truth = [(0, box, 1) for box in spans[:2]]
    # `between` matches the first, so only the second is left.
    detections = [(0, spans[2], 1, 0.9), (0, spans[0], 1, 0.8), (0, spans[1], 1, 0.7)]
    assert measure(truth, detections).mean == pytest.approx((1 + 2 / 3) / 2)


def test_classes_without_truth_are_left_out_and_those_without_detections_are_zero():
    truth = [(0, LEFT, 5), (0, LEFT, 2), (0, LEFT, 9)]  # 9 is not evaluated
    detections = [(0, LEFT, 5, 0.9), (0, LEFT, 3, 0.9), (0, LEFT, 9, 0.9)]
    result = measure(truth, detections, (5, 2, 3))
    assert result.classes.tolist() == [2, 3, 5]
    assert result.per_class[[0, 2]].tolist() == [0.0, 1.0] and np.isnan(result.per_class[1])
    assert result.mean == 0.5 and result.truth_per_class.tolist() == [1, 0, 1]
    groups = result.mean_by_group({"a": range(1, 4), "b": [5, 9], "c": [3]})
    assert groups.pop("c") != groups.get("c") and groups == {"a": 0.0, "b": 1.0}


def test_nothing_to_evaluate_is_nan():
    assert np.isnan(measure([], [(0, LEFT, 1, 0.5)]).mean)
    assert np.isnan(measure([], [], order="score").mean)
    assert measure([(0, LEFT, 1)], []).mean == 0.0


def test_images_count_by_the_rules_of_each_program():
    truth = [(0, LEFT, 1), (1, LEFT, 2), (2, LEFT, 1)]
    detections = [(image, LEFT, 1, 0.9 - image / 10) for image in (3, 1, 0, 2, 4)]
    detections[0] = (3, LEFT, 1, 0.99)
    # By score 3, 0, 1, 2, 4, with hits in the images 0 and 2.
    file = measure(truth, detections)
    assert file.mean == pytest.approx((2 / 4 + 2 / 4) / 2)
    assert file.counts == {
        "images": 5, "truth_images": 2, "detection_images": 5, "truth": 2, "detections": 5,
        "without_area": 0,
    }  # fmt: skip
    # Without the image 3 the ranks are 0, 1, 2, 4.
    assert measure(truth, detections, excluded=[3]).mean == pytest.approx((1 + 2 / 3) / 2)
    assert measure(truth, detections, excluded=[3, 2]).mean == 1.0
    # 3 and 4 are not mentioned, 1 is by another class; excluded images have no effect.
    score = measure(truth, detections, order="score", excluded=[0])
    assert score.mean == pytest.approx((1 + 2 / 3) / 2)
    assert score.counts["detection_images"] == 3
    assert measure(truth, detections, order="score", mentioned=[3]).mean == file.mean


def test_the_50_best_pairs_of_an_image_count_in_score_order():
    truth = [(0, LEFT, 1), (1, LEFT, 1)]
    better = [(0, RIGHT, 2, 0.9)] * 49
    for rivals, expected in [(better, 1.0), (better + better[:1], 0.5)]:
        detections = [(0, LEFT, 1, 0.1), (1, LEFT, 1, 0.2), *rivals]
        assert measure(truth, detections, (1, 2), order="score").per_class[0] == expected
        assert measure(truth, detections, (1, 2)).per_class[0] == 1.0
    # The classes that are not evaluated do not count among the 50.
    detections = [(0, LEFT, 1, 0.1), (1, LEFT, 1, 0.2), *better, *better]
    assert measure(truth, detections, (1,), order="score").mean == 1.0


def test_equal_scores_at_the_border_of_50_are_retained_as_in_a_heap():
    """A heap loses the lowest class of equal scores first, then the lowest y1, x1, y2 and x2."""
    one, two, better = (0, LEFT, 1, 0.1), (0, RIGHT, 1, 0.1), [(0, LEFT, 3, 0.9)] * 49
    for box, expected in [(LEFT, 0.0), (RIGHT, 1.0)]:
        retained = measure([(0, box, 1)], [one, two, *better], (1, 3), order="score")
        assert retained.per_class[0] == expected
    two = (0, LEFT, 2, 0.1)
    retained = measure([(0, LEFT, 1), (0, LEFT, 2)], [two, one, *better], (1, 2, 3), order="score")
    assert retained.per_class[:2].tolist() == [0.0, 1.0]
    # The pair that comes when the heap is full never enters.
    retained = measure([(0, LEFT, 2)], [*better, one, two], (1, 2, 3), order="score")
    assert retained.per_class[1] == 0.0


def test_detections_without_area_are_dropped_after_the_choice_of_50():
    flat = [(0, (0.5, 0.0, 0.5, 1.0), 1, 0.9)]
    assert measure([(0, LEFT, 1)], [*flat, (0, LEFT, 1, 0.5)]).mean == 1.0
    result = measure([(0, LEFT, 1)], [*flat * 50, (0, LEFT, 1, 0.5)], order="score")
    assert result.mean == 0.0 and result.counts["without_area"] == 50


def test_a_detection_has_the_size_of_its_truth_box():
    large, small = (0.0, 0.0, 0.5, 0.5), (0.8, 0.8, 1.0, 1.0)  # areas 0.25 and 0.04
    inside = (0.0, 0.0, 0.5, 0.3)  # area 0.15, IoU 0.6 with the large box
    truth = [(0, large, 1), (0, small, 1)]
    detections = [
        (0, inside, 1, 0.9),  # a hit, large
        (0, inside, 1, 0.8),  # false, large although the box itself is medium
        (1, small, 1, 0.7),  # false, small
        (0, small, 1, 0.6),  # a hit, small
    ]
    result = measure(truth, detections)
    assert result.mean == pytest.approx((1 + 2 / 4) / 2)
    sizes = result.mean_by_size()
    assert sizes["large"] == 1.0 and sizes["small"] == 0.5 and np.isnan(sizes["medium"])


def test_scores_that_are_not_finite_end_with_a_one_sentence_error():
    detections = [(0, LEFT, 1, 0.5), (0, LEFT, 1, float("nan")), (0, LEFT, 1, float("inf"))]
    with refused("2 of the 3 scores of detections are not finite"):
        measure([(0, LEFT, 1)], detections)
    with pytest.raises(ValueError, match="no scores"):
        measure_frame_ap(boxes([(0, LEFT, 1)]), boxes([(0, LEFT, 1)]), (1,))
