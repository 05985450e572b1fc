"""Person detectors: tiny ONNX files of both layouts, with boxes that are worked out by hand."""

import numpy as np
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.predict.detector import PersonDetector
from tests.support import onnx_files

FRAME = np.zeros((100, 200, 3), np.uint8)
FRAME[:, 100:] = (250, 150, 50)  # the right half


def test_persons_of_rt_detr_are_those_of_class_0_and_of_high_score(tmp_path):
    boxes = [(0.1, 0.2, 0.3, 0.9), (0.5, 0.5, 1.5, 0.75), (0, 0, 1, 1), (0.4, 0, 0.4, 1),
             (0, 0, 0.5, 0.5), (0, 0, 0.25, 0.25), (0.5, 0, 1, 1)]  # fmt: skip
    labels = [0, 0, 1, 0, 0, 0, 0]
    scores = [0.6, 0.9, 0.95, 0.99, 0.4, None, None]
    # The scores of the last two boxes are red and blue at the right of the input.
    file = onnx_files.detr(tmp_path / "d.onnx", boxes, labels, scores, [(0, 32, 60), (2, 32, 60)])
    boxes_seen, values = PersonDetector(file)(FRAME)
    expected = [(0, 0, 0.25, 0.25), (0.5, 0.5, 1, 0.75), (0.1, 0.2, 0.3, 0.9)]
    np.testing.assert_allclose(boxes_seen, expected, atol=1e-6)
    np.testing.assert_allclose(values, [250 / 255, 0.9, 0.6], atol=1e-6)
    assert len(PersonDetector(file, min_score=0.15)(FRAME)[0]) == 5


def yolox_rows(**at):
    """Returns rows of a 64 x 64 input: 64 + 16 + 4 positions, 80 classes, of score 0."""
    rows = np.zeros((84, 85))
    for position, (dx, dy, w, h, score) in at.items():
        rows[int(position[1:]), :5] = (dx, dy, np.log(w), np.log(h), score)
        rows[int(position[1:]), 5] = 1
    return rows


def test_persons_of_yolox_are_decoded_from_three_grids_without_duplicates(tmp_path):
    rows = yolox_rows(
        p70=(0.5, 0.25, 1.25, 0.625, 0.9),  # row 1, column 2 of stride 16: (40, 20), 20 x 10
        p20=(1.0, 0.5, 2.5, 1.25, 0.7),  # row 2, column 4 of stride 8: the same box
        p83=(-0.5, -0.75, 0.5, 0.25, 0.6),  # row 1, column 1 of stride 32: (16, 8), 16 x 8
        p10=(0, 0, 1, 1, 0.4),  # below the smallest score
        p30=(0, 0, 1, 1, 0.9),  # another class
        p40=(0, 0, 1, 1, 0.8),  # row 5, column 0 of stride 8: below the frame
    )
    rows[30, 5:7] = 0, 1
    # The frame fills rows 0 to 31 of the input, since 64 / 200 = 0.32.
    file = onnx_files.yolox(tmp_path / "y.onnx", rows, (64, 64))
    boxes, scores = PersonDetector(file)(FRAME)
    expected = np.array([(30, 15, 50, 25), (8, 4, 24, 12)]) / [64, 32, 64, 32]
    np.testing.assert_allclose(boxes, expected, atol=1e-6)
    np.testing.assert_allclose(scores, [0.9, 0.6], atol=1e-6)


def test_the_input_of_yolox_is_blue_green_red_and_padded_with_114(tmp_path):
    rows = yolox_rows(p1=(0, 0, 2, 2, 0), p4=(0, 0, 2, 2, 0), p7=(0, 0, 2, 2, 0))
    pixels = [(1, 2, 10, 50), (4, 0, 10, 50), (7, 1, 60, 60)]  # red; blue; green, or padding
    file = onnx_files.yolox(tmp_path / "y.onnx", rows, (64, 64), pixels)
    detector = PersonDetector(file, min_score=0.01)
    square = np.concatenate([FRAME, FRAME])
    np.testing.assert_allclose(detector(square)[1] * 255, [250, 150, 50], rtol=1e-6)
    np.testing.assert_allclose(detector(FRAME)[1] * 255, [250, 114, 50], rtol=1e-6)


def test_exports_that_are_not_supported_are_described(tmp_path):
    rows = yolox_rows(p0=(0, 0, 20000, 3, 0.9))
    decoded = onnx_files.yolox(tmp_path / "y.onnx", rows, (64, 64))
    with pytest.raises(UserError, match=r"y.onnx are decoded already: export YOLOX without"):
        PersonDetector(decoded)(FRAME)
    other = onnx_files.yolox(tmp_path / "v5.onnx", rows[:80], (64, 64))
    words = r"inputs images \[1, 3, 64, 64\] and the outputs output \[1, 80, 85\]: export RT-DETR"
    with pytest.raises(UserError, match=words):
        PersonDetector(other)
    with pytest.raises(UserError, match=r"there is no detector .*absent.onnx: check its name"):
        PersonDetector(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(UserError, match=r"text.onnx cannot be loaded by onnxruntime: "):
        PersonDetector(tmp_path / "text.onnx")


def test_a_missing_onnxruntime_has_its_pip_line(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        UserError, match=r"onnxruntime is not installed: pip install -e '.\[onnx\]'"
    ):
        PersonDetector(tmp_path / "d.onnx")
