"""Tiny ONNX files in the layouts of person detectors: constants, and pixels as scores."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = [helper.make_opsetid("", 17)]


def constant(name, values):
    return helper.make_node(
        "Constant", [], [name], value=numpy_helper.from_array(np.asarray(values), name)
    )


def pixel(name, image, channel, y, x):
    """Returns nodes that copy a pixel of an image [1, 3, height, width] to a tensor [1, 1]."""
    steps = [constant(f"{name}_starts", np.array([channel, y, x], np.int64)),
             constant(f"{name}_ends", np.array([channel + 1, y + 1, x + 1], np.int64)),
             constant(f"{name}_axes", np.array([1, 2, 3], np.int64)),
             constant(f"{name}_shape", np.array([1, 1], np.int64))]  # fmt: skip
    parts = [image, *(f"{name}_{part}" for part in ("starts", "ends", "axes"))]
    cut = helper.make_node("Slice", parts, [f"{name}_cut"])
    flat = helper.make_node("Reshape", [f"{name}_cut", f"{name}_shape"], [name])
    return [*steps, cut, flat]


def save(path, nodes, inputs, outputs) -> Path:
    graph = helper.make_graph(nodes, "detector", inputs, outputs)
    model = helper.make_model(graph, opset_imports=OPSET, ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def tensor(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def detr(path, boxes, labels, scores, pixels=(), side=64) -> Path:
    """Writes a file with the layout of RT-DETR.

    Args:
      path: the file.
      boxes: fractions of the frame, which the file multiplies by `orig_target_sizes`.
      labels: class of each box.
      scores: score of each box.
      pixels: (channel, y, x) of pixels that are the scores of the last boxes.
      side: of the input.
    """
    count = len(boxes) - len(pixels)
    nodes = [
        constant("fractions", np.array([boxes], np.float32)),
        constant("labels", np.array([labels], np.int64)),
        constant("fixed", np.array([scores[:count]], np.float32)),
        helper.make_node("Cast", ["orig_target_sizes"], ["size"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["size", "size"], ["sizes"], axis=1),
        helper.make_node("Mul", ["fractions", "sizes"], ["boxes"]),
    ]
    for i, where in enumerate(pixels):
        nodes += pixel(f"pixel_{i}", "images", *where)
    names = ["fixed", *(f"pixel_{i}" for i in range(len(pixels)))]
    nodes.append(helper.make_node("Concat", names, ["scores"], axis=1))
    n = len(boxes)
    return save(
        path, nodes,
        [tensor("images", [1, 3, side, side]),
         tensor("orig_target_sizes", [1, 2], TensorProto.INT64)],
        [tensor("labels", [1, n], TensorProto.INT64), tensor("boxes", [1, n, 4]),
         tensor("scores", [1, n])],
    )  # fmt: skip


def yolox(path, rows, size, pixels=()) -> Path:
    """Writes a file with the layout of YOLOX.

    Args:
      path: the file.
      rows: [positions, 5 + classes], the output.
      size: height and width of the input.
      pixels: (position, channel, y, x): a pixel / 255 replaces the objectness of a position.
    """
    rows = np.asarray(rows, np.float32)
    nodes, name = [constant("rows_0", rows[None])], "rows_0"
    for i, (position, *where) in enumerate(pixels):
        nodes += pixel(f"pixel_{i}", "images", *where)
        mask = np.zeros((1, *rows.shape), np.float32)
        mask[0, position, 4] = 1 / 255
        nodes += [
            constant(f"mask_{i}", mask),
            helper.make_node("Mul", [f"mask_{i}", f"pixel_{i}"], [f"added_{i}"]),
            helper.make_node("Add", [name, f"added_{i}"], [f"rows_{i + 1}"]),
        ]
        name = f"rows_{i + 1}"
    nodes.append(helper.make_node("Identity", [name], ["output"]))
    return save(
        path, nodes, [tensor("images", [1, 3, *size])], [tensor("output", [1, *rows.shape])]
    )
