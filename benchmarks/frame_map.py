"""Time and memory of the frame mAP, on drawn boxes of the size of AVA's validation set.

    python -m benchmarks.frame_map

57,000 images have 1.5 persons each on average. Every person has 2 to 4 of 60 classes, and a
detection with a score for each class; a tenth of the persons is detected twice. Times are CPU times
of one thread. The peak is that of the process, and includes the detections themselves.
"""

import resource
import time
from typing import get_args

import numpy as np
from absl import app

from mvit_jax.common.frame_map import Boxes, Order, measure_frame_ap

IMAGES, CLASSES = 57_000, 60


def main(argv: list[str]) -> None:
    truth, detections = draw(np.random.default_rng(0))
    print(f"{len(truth):,} pairs of truth, {len(detections):,} detections, peak {peak():.1f} GB")
    for order in get_args(Order):
        began = time.thread_time()
        result = measure_frame_ap(truth, detections, range(1, CLASSES + 1), order=order)
        seconds = time.thread_time() - began
        print(f"order {order:6} mAP {result.mean:.4f} {seconds:6.1f} s, peak {peak():.1f} GB")


def draw(rng: np.random.Generator) -> tuple[Boxes, Boxes]:
    """Draws truth, and detections that are sorted by image."""
    image = np.repeat(np.arange(IMAGES), rng.choice([1, 2, 3], IMAGES, p=(0.65, 0.2, 0.15)))
    corner, side = rng.uniform(0, 0.5, (2, len(image), 2))
    person = np.concatenate([corner, corner + side], 1)
    labels = rng.random((len(image), CLASSES)).argsort(1) < rng.integers(2, 5, (len(image), 1))
    rows, columns = np.nonzero(labels)
    truth = Boxes(image[rows], person[rows], columns + 1)
    detected = np.sort(
        np.append(np.arange(len(image)), rng.integers(0, len(image), len(image) // 10))
    )
    box = np.clip(person[detected] + rng.normal(0, 0.02, (len(detected), 4)), 0, 1)
    score = rng.random((len(detected), CLASSES)) + 0.5 * labels[detected]
    return truth, Boxes(
        np.repeat(image[detected], CLASSES),
        np.repeat(box, CLASSES, axis=0),
        np.tile(np.arange(1, CLASSES + 1), len(detected)),
        score.ravel() / 1.5,
    )


def peak() -> float:
    """Returns the largest resident memory of the process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    app.run(main)
