"""Time and memory of AVA's metric and of its files, on drawn boxes.

    python -m benchmarks.detection

The metric has the size of AVA's validation set, the files have that of its training set.
57,000 images have 1.5 persons each on average. Every person has 2 to 4 of 60 classes, and a
detection with a score for each class; a tenth of the persons is detected twice. The files have 235
videos with 2 lines per box, the same number of lines for labels and for detected persons. Times are
CPU times of one thread. The peak is that of the process so far, drawn boxes included.
"""

import resource
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np
from absl import app

from mvit_jax.data.formats.ava_tables import SECONDS, read_key_frames, write_detections
from mvit_jax.training.evaluation.frame_map import Boxes, Order, measure_frame_ap

IMAGES, CLASSES, VIDEOS = 57_000, 60, 235


def main(argv: list[str]) -> None:
    rng = np.random.default_rng(0)
    truth, detections = draw(rng)
    print(f"{len(truth):,} pairs of truth, {len(detections):,} detections, peak {peak():.1f} GB")
    for order in get_args(Order):
        began = time.thread_time()
        result = measure_frame_ap(truth, detections, range(1, CLASSES + 1), order=order)
        seconds = time.thread_time() - began
        print(f"order {order:6} mAP {result.mean:.4f} {seconds:6.1f} s, peak {peak():.1f} GB")
    del truth, detections
    with tempfile.TemporaryDirectory() as folder:
        files = draw_files(rng, Path(folder))
        began = time.thread_time()
        frames = read_key_frames(files[:1], files[1:], min_score=0)
        seconds = time.thread_time() - began
        print(f"{len(frames):,} key frames read {seconds:8.1f} s, peak {peak():.1f} GB")
        path = Path(folder) / "detections.csv"
        count = IMAGES * 3 // 2
        scores, box = rng.random((count, CLASSES)), rng.random((count, 4))
        began = time.thread_time()
        write_detections(
            path, ["video"] * count, np.full(count, 902), box, scores, range(1, CLASSES + 1)
        )
        seconds = time.thread_time() - began
        print(f"{scores.size:,} detections written {seconds:5.1f} s, peak {peak():.1f} GB")


def draw_files(rng: np.random.Generator, folder: Path) -> list[Path]:
    """Writes a file of labels and one of person boxes; returns their paths."""
    files = [folder / "labels.csv", folder / "persons.csv"]
    for file in files:
        with file.open("w") as text:
            for video in range(VIDEOS):
                boxes = np.sort(rng.random((len(SECONDS) * 2, 2, 2)), axis=1).reshape(-1, 4)
                for row, box in enumerate(boxes.tolist()):
                    start = f"video{video:04d},{SECONDS[row // 2]:04d}"
                    corners = ",".join(f"{corner:.3f}" for corner in box)
                    text.writelines(f"{start},{corners},{action},1\n" for action in (12, 80))
    return files


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
