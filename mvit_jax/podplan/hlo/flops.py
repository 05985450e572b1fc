"""FLOPs and transcendentals of HLO instructions, counted as in XLA."""

import functools
import math
import re

import numpy as np

from mvit_jax.podplan.hlo.parser import Computation, Instruction, Module, Shape, operand_shapes

TRANSCENDENTAL = {
    *("exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "power", "sqrt"),
    *("rsqrt", "cbrt", "sine", "cosine", "tan", "erf", "logistic", "atan2"),
}
ARITHMETIC = {  # one FLOP per element, as in XLA
    *("add", "subtract", "multiply", "divide", "maximum", "minimum", "compare", "select", "abs"),
    *("negate", "and", "or", "xor", "not", "clamp", "convert", "floor", "ceil", "sign", "popcnt"),
    *("shift-left", "shift-right-logical", "shift-right-arithmetic", "is-finite", "remainder"),
    *("round-nearest-afz", "round-nearest-even", "bitcast-convert", "stochastic-convert"),
}


class Counter:
    """Counts the instructions of one program, including the computations that they call."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._cache: dict[str, tuple[int, int, int]] = {}

    def of(self, line: Instruction, computation: Computation) -> tuple[int, int, int]:
        """Returns all FLOPs, FLOPs of dots and convolutions, and transcendentals."""
        elements = sum(shape.elements for shape in line.shapes)
        if line.opcode == "fusion":
            return self._inside(*line.called("calls"))
        if line.opcode == "dot":
            flops = dot_flops(line, *operand_shapes(line, computation)[:2])
            return flops, flops, 0
        if line.opcode == "convolution":
            flops = convolution_flops(line, *operand_shapes(line, computation)[:2])
            return flops, flops, 0
        if line.opcode in TRANSCENDENTAL:
            return 0, 0, elements
        if line.opcode in ARITHMETIC:
            return elements, 0, 0
        if line.opcode in ("reduce", "reduce-window", "select-and-scatter", "scatter", "map"):
            runs = _body_runs(line, computation)
            flops, _, transcendentals = self._inside(
                *(line.called("to_apply") or line.called("scatter"))
            )
            return runs * flops, 0, runs * transcendentals
        return 0, 0, 0

    def _inside(self, name: str) -> tuple[int, int, int]:
        if name not in self._cache:
            computation = self.module.computations[name]
            totals = [self.of(line, computation) for line in computation.instructions.values()]
            flops, matrix_flops, transcendentals = zip(*totals, strict=True)
            self._cache[name] = sum(flops), sum(matrix_flops), sum(transcendentals)
        return self._cache[name]


def dot_flops(line: Instruction, left: Shape, right: Shape) -> int:
    """Returns the FLOPs of a dot: 2 x elements of the result x contracted elements."""
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
    axes = [int(axis) for axis in match.group(1).split(",") if axis] if match else []
    return 2 * line.shapes[0].elements * math.prod(left.dims[axis] for axis in axes)


def convolution_flops(line: Instruction, image: Shape, kernel: Shape) -> int:
    """Returns the FLOPs of a convolution: two per product of a kernel and an image element.

    Padding and the holes of a dilated image cost nothing. XLA for TPUs also writes matrix products
    as convolutions, with batch dimensions as dilated spatial dimensions, so holes do occur.
    """
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    assert match, line
    of_image, of_kernel, of_result = match.groups()
    result = line.shapes[0]
    window = _window(line.attributes, len(of_image) - 2)
    products = 1
    for axis in range(len(of_image) - 2):
        products *= _positions(
            image.dims[of_image.index(str(axis))],
            result.dims[of_result.index(str(axis))],
            *window[axis],
        )
    # The kernel's input features are per group.
    features = kernel.dims[of_kernel.index("i")] * result.dims[of_result.index("f")]
    batch_groups = int(line.attribute("batch_group_count") or 1)
    batch = image.dims[of_image.index("b")] // batch_groups
    return 2 * products * features * batch


def _window(attributes: str, rank: int) -> list[tuple[int, int, int, int, int]]:
    """Returns (size, stride, padding before, image dilation, kernel dilation) per spatial axis."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in match.group(1).split()) if match else {}

    def values(name: str, default: str) -> list[int]:
        return [
            int(x.split("_")[0]) for x in fields.get(name, "x".join([default] * rank)).split("x")
        ]

    names = (("size", "1"), ("stride", "1"), ("pad", "0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
    return list(zip(*(values(*name) for name in names), strict=True)) if rank else []


@functools.lru_cache(maxsize=4096)
def _positions(
    image: int, result: int, size: int, stride: int, before: int, dilation: int, spread: int
) -> int:
    """Counts pairs of output position and kernel element that hit an image element, on one axis."""
    outputs, elements = (result, stride), (size, spread)
    few, many = sorted((outputs, elements))
    offsets = np.arange(many[0]) * many[1] - before
    total = 0
    for index in range(few[0]):
        at = offsets + index * few[1]
        total += int(np.sum((at >= 0) & (at <= (image - 1) * dilation) & (at % dilation == 0)))
    return total


def _body_runs(line: Instruction, computation: Computation) -> int:
    """Returns how often an instruction such as a reduction calls its function."""
    first = operand_shapes(line, computation)[0]
    if line.opcode == "reduce":
        return first.elements - line.shapes[0].elements
    if line.opcode == "scatter":
        return operand_shapes(line, computation)[-1].elements
    if line.opcode == "map":
        return line.shapes[0].elements
    match = re.search(r"window=\{size=([\dx]+)", line.attributes)
    sizes = [int(size) for size in match.group(1).split("x")] if match else []
    window = math.prod(sizes)
    if any(size >= 2 * n - 1 > 1 for size, n in zip(sizes, first.dims, strict=False)):
        return first.elements  # every window covers the whole axis: one sum, copied
    if line.opcode == "select-and-scatter":
        return operand_shapes(line, computation)[1].elements * window
    return line.shapes[0].elements * (window - 1)
