"""Person boxes from a detector that the user has as an ONNX file, run by onnxruntime.

Two layouts of exports are supported, by detectors under the Apache licence. In both, class 0 of
COCO is the person:

- RT-DETR and D-FINE: inputs `images` (RGB from 0 to 1, the whole frame stretched to the input's
  size) and `orig_target_sizes` (width and height of the frame); outputs `labels`, `boxes` (x1, y1,
  x2, y2 in pixels of the frame) and `scores`. They need no suppression of duplicates.
- YOLOX: one input (BGR from 0 to 255, scaled to fit and padded with 114 at the right and at the
  bottom) and one output `[1, positions, 5 + classes]`: centre and logarithmic size of a box
  relative to the position and its stride, objectness, and class scores.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, Float64, UInt8
from PIL import Image

from mvit_jax.common import extras
from mvit_jax.common.errors import UserError
from mvit_jax.common.files import expanded
from mvit_jax.common.text import first_line
from mvit_jax.training.evaluation.frame_map import overlaps

MIN_SCORE = 0.5
"""Smallest score of a person.

SlowFast's demo takes 0.9 and PyTorchVideo's tutorial 0.55, both of Faster R-CNN. The detectors here
score each class by a sigmoid, which is seldom above 0.9.
"""

_PERSON = 0  # in COCO's classes, from 0
_SIDE = 640  # of an input of any size
_STRIDES = (8, 16, 32)  # of YOLOX's three grids
_PADDING = 114
_LARGEST = 9.0  # logarithm of a box's size in strides: no frame has as many
_MAX_IOU = 0.45  # of two persons of YOLOX, as in its demo

Persons = tuple[Float64[np.ndarray, "persons 4"], Float64[np.ndarray, " persons"]]


class PersonDetector:
    """The persons in a frame, by an ONNX file."""

    def __init__(self, file: str | os.PathLike[str], min_score: float = MIN_SCORE) -> None:
        """Loads the file; its layout follows from its inputs and outputs.

        Args:
          file: the ONNX file.
          min_score: smallest score of a person.

        Raises:
          UserError: onnxruntime is not installed, the file does not exist, cannot be loaded, or has
            another layout.
        """
        extras.require("onnxruntime")
        import onnxruntime

        path = expanded(file)
        if not path.is_file():
            raise UserError(f"there is no detector {path}: check its name")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has no common class for its errors
            raise UserError(
                f"{path} cannot be loaded by onnxruntime: {first_line(error)}"
            ) from error
        self._path, self._min_score = path, min_score
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        names = {x.name for x in inputs}, {x.name for x in outputs}
        if names == ({"images", "orig_target_sizes"}, {"labels", "boxes", "scores"}):
            image = next(x for x in inputs if x.name == "images")
            self._detect, self._size = self._detr, _height_width(image.shape, _SIDE)
        elif _is_yolox(inputs, outputs):
            self._detect, self._size = self._yolox, _height_width(inputs[0].shape, _SIDE)
        else:
            raise UserError(_unsupported(path, inputs, outputs))

    def __call__(self, frame: UInt8[np.ndarray, "height width 3"]) -> Persons:
        """Returns the boxes of persons as fractions of an RGB frame, and their scores, falling."""
        height, width = frame.shape[:2]
        pixels, scores = self._detect(frame)
        boxes = np.clip(np.asarray(pixels, np.float64) / [width, height, width, height], 0, 1)
        solid = (boxes[:, 2:] > boxes[:, :2]).all(1) & (scores >= self._min_score)
        boxes, scores = boxes[solid], np.asarray(scores, np.float64)[solid]
        order = np.argsort(-scores, kind="stable")
        return boxes[order], scores[order]

    def _detr(self, frame: UInt8[np.ndarray, "height width 3"]) -> tuple[np.ndarray, np.ndarray]:
        height, width = self._size
        # Pillow's resizing averages over the pixels that it leaves out, as in training.
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
        images = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
        sizes = np.array([[frame.shape[1], frame.shape[0]]], np.int64)
        labels, boxes, scores = self._run(
            ["labels", "boxes", "scores"], {"images": images, "orig_target_sizes": sizes}
        )
        persons = labels == _PERSON
        return boxes[persons], scores[persons]

    def _yolox(self, frame: UInt8[np.ndarray, "height width 3"]) -> tuple[np.ndarray, np.ndarray]:
        images, scale = _fitted(frame, self._size)
        name = self._session.get_inputs()[0].name
        (rows,) = self._run(None, {name: images})
        scores = rows[:, 4] * rows[:, 5 + _PERSON]
        likely = scores >= self._min_score
        if np.any(rows[likely, 2:4] > _LARGEST):
            raise UserError(
                f"the boxes of {self._path} are decoded already: export YOLOX without "
                "--decode_in_inference"
            )
        boxes = _decoded(rows[:, :4], self._size)[likely] / scale
        single = _without_duplicates(boxes, scores[likely])
        return boxes[single], scores[likely][single]

    def _run(self, names: list[str] | None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Returns the outputs of a batch of one frame, without the axis of the batch."""
        try:
            return [np.asarray(x)[0] for x in self._session.run(names, inputs)]
        except Exception as error:
            raise UserError(
                f"the detector {self._path} failed on a frame: {first_line(error)}"
            ) from error


def _fitted(
    frame: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]
) -> tuple[Float32[np.ndarray, "1 3 _ _"], float]:
    """Returns YOLOX's input, and the scale of the frame in it."""
    scale = min(size[0] / frame.shape[0], size[1] / frame.shape[1])
    height, width = (max(int(side * scale), 1) for side in frame.shape[:2])
    padded = np.full((*size, 3), _PADDING, np.uint8)
    padded[:height, :width] = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
    return padded[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32), scale


def _decoded(
    rows: Float32[np.ndarray, "positions 4"], size: tuple[int, int]
) -> Float64[np.ndarray, "positions 4"]:
    """Returns x1, y1, x2, y2 in pixels of YOLOX's input."""
    corners, strides = [], []
    for stride in _STRIDES:
        y, x = np.mgrid[: size[0] // stride, : size[1] // stride]
        corners.append(np.stack([x.ravel(), y.ravel()], 1))
        strides.append(np.full((x.size, 1), stride))
    stride = np.concatenate(strides)
    centres = (rows[:, :2] + np.concatenate(corners)) * stride
    half = np.exp(np.minimum(rows[:, 2:].astype(np.float64), _LARGEST)) * stride / 2
    return np.concatenate([centres - half, centres + half], axis=1)


def _without_duplicates(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Returns the indices of boxes that overlap no box of a higher score: greedy suppression."""
    single: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if not single or overlaps(boxes[[i]], boxes[single]).max() <= _MAX_IOU:
            single.append(int(i))
    return single


def _height_width(shape: Sequence[Any], default: int) -> tuple[int, int]:
    height, width = (side if isinstance(side, int) else default for side in shape[2:])
    return height, width


def _is_yolox(inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
    if len(inputs) != 1 or len(outputs) != 1:
        return False
    image, rows = inputs[0].shape, outputs[0].shape
    if len(image) != 4 or image[1] != 3 or len(rows) != 3 or not isinstance(rows[2], int):
        return False
    height, width = _height_width(image, _SIDE)
    return rows[2] > 5 and rows[1] == sum((height // s) * (width // s) for s in _STRIDES)


def _unsupported(path: Path, inputs: Sequence[Any], outputs: Sequence[Any]) -> str:
    described = [
        ", ".join(f"{x.name} {list(x.shape)}" for x in tensors) or "none"
        for tensors in (inputs, outputs)
    ]
    return (
        f"the detector {path} has the inputs {described[0]} and the outputs {described[1]}: export "
        "RT-DETR or D-FINE (images, orig_target_sizes; labels, boxes, scores), or YOLOX (one input "
        "[1, 3, height, width]; one output [1, positions, 5 + classes])"
    )
