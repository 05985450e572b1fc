"""A tiny data set in AVA's format: coloured persons, whose classes are their colours."""

from pathlib import Path

import cv2
import numpy as np

from tests.data.bar_codes import write

COLOURS = {1: (250, 20, 20), 2: (250, 250, 250), 3: (20, 20, 250), 4: (20, 250, 20)}
"""Colour of a person by the id of its class; the class list lacks id 2."""

CLASS_LIST = "\n".join(
    f'label {{ name: "{name}" label_id: {number} label_type: PERSON_MOVEMENT }}'
    for number, name in {1: "red", 3: "blue", 4: "green"}.items()
)

SECONDS = (902, 903)
FLAGS = {
    "data.source": "ava", "data.sampling": "key_frame", "data.multi_label": True,
    "data.class_list": "classes.pbtxt", "data.train_boxes": "boxes.csv",
    "data.test_boxes": "boxes.csv", "data.val_list": "test.csv", "data.val_boxes": "boxes.csv",
    "data.stride": 2, "augment.crop_area": None, "augment.jitter": (34, 40), "augment.flip": 0.5,
    "augment.label_smoothing": 0.0, "eval.clips": 1,
}  # fmt: skip
"""Keys of a config that trains on the folder."""


def write_ava(folder: Path, videos: int = 4, *, frames: bool = False) -> Path:
    """Writes videos (or folders of frames) with two persons each, and the lists of all splits.

    Every other video is tall. All splits have the same key frames. `boxes.csv` repeats the labelled
    boxes, with the score 0.95, and has a box without label.
    """
    rng = np.random.default_rng(0)
    labels, boxes = [], []
    for number in range(videos):
        height, width = ((48, 64), (64, 48))[number % 2]
        picture = np.full((height, width, 3), 60, np.uint8)
        for person in range(2):
            action = int(rng.choice(list(COLOURS)))
            x1 = int(rng.integers(2, width // 2 - 16)) + person * width // 2
            y1 = int(rng.integers(2, height - 22))
            picture[y1 : y1 + 20, x1 : x1 + 12] = COLOURS[action]
            corners = (x1 / width, y1 / height, (x1 + 12) / width, (y1 + 20) / height)
            text = ",".join(f"{corner:.3f}" for corner in corners)
            for second in SECONDS:
                labels.append(f"v{number},{second:04d},{text},{action},{person}")
                boxes.append(f"v{number},{second:04d},{text},{action},0.95")
        boxes.append(f"v{number},0903,0.000,0.000,0.100,0.100,,0.92")
        pictures = [picture] * 125
        if frames:
            (folder / f"frames/v{number}").mkdir(parents=True)
            encoded = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
            for frame in range(1, 126):
                (folder / f"frames/v{number}/v{number}_{frame:06d}.png").write_bytes(encoded)
        else:
            (folder / "videos").mkdir(parents=True, exist_ok=True)
            write(folder / f"videos/v{number}.mp4", pictures, crf="1", pix_fmt="yuv444p")
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text("\n".join(labels) + "\n")
    (folder / "boxes.csv").write_text("\n".join(boxes) + "\n")
    (folder / "classes.pbtxt").write_text(CLASS_LIST)
    return folder
