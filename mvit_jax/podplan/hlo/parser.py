"""Parser of XLA's HLO text: computations, instructions and shapes."""

import functools
import math
import re
from dataclasses import dataclass

_SHAPE = re.compile(r"([a-z]+[a-z0-9]*)\[([0-9,<=? ]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_TILE = re.compile(r":T\(([\d,]+)\)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?.*\{$")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_BRACKET = re.compile(r"[()]")


@dataclass(frozen=True)
class Shape:
    """Type and layout of an array.

    Attributes:
      dtype: as in HLO, for example "bf16".
      dims: the shape.
      padded: elements in memory, including the padding of tiled layouts (8x128 on TPUs).
      space: memory space; 0 is the device's main memory, 1 a TPU's on-chip VMEM.
    """

    dtype: str
    dims: tuple[int, ...]
    padded: int
    space: int = 0

    @functools.cached_property
    def elements(self) -> int:
        return math.prod(self.dims)

    @functools.cached_property
    def bytes(self) -> int:
        """Size in memory, padding included."""
        bits = re.search(r"\d+", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits.group()) if bits else 0  # 0: a token
        return -(-self.padded * width // 8)


@dataclass(frozen=True)
class Instruction:
    """One instruction, which is one line of HLO.

    Attributes:
      name: unique within the program.
      opcode: as in HLO, for example "dot".
      shapes: shapes of the result; nested tuples are flattened.
      operands: names of instructions of the same computation.
      inside: text between the opcode's parentheses, for example a parameter's number or a
        constant's value.
      attributes: the rest of the line.
      root: True if the instruction is the computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """The instruction's origin: JAX's scopes and the primitive's name."""
        match = _OP_NAME.search(self.attributes)
        return match.group(1) if match else ""

    def attribute(self, name: str) -> str:
        """Returns an attribute's value, such as "fusion.3" for `calls=%fusion.3`, or ""."""
        match = re.search(rf"(?:^|[\s,]){name}=%?([^\s,]+)", self.attributes)
        return match.group(1) if match else ""

    def called(self, name: str) -> tuple[str, ...]:
        """Returns the names of the computations (one, or several in braces) in an attribute."""
        match = re.search(rf"(?:^|[\s,]){name}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return tuple(_OPERAND.findall(match.group(1))) if match else ()


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in topological order."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(line for line in self.instructions.values() if line.root)

    @functools.cached_property
    def opcodes(self) -> frozenset[str]:
        return frozenset(line.opcode for line in self.instructions.values())

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        lines = self.instructions.values()
        return {int(line.inside): line for line in lines if line.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Users of each instruction, with its position among the user's operands."""
        users: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for line in self.instructions.values():
            for position, operand in enumerate(line.operands):
                users[operand].append((line, position))
        return users


@dataclass(frozen=True)
class Module:
    """A program: computations by name, the entry computation, and the number of devices."""

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Module:
    """Parses the text of `jax.stages.Compiled.as_text()`."""
    lines = text.splitlines()
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in lines[1:]:
        if current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(line, match)
            current[instruction.name] = instruction
        elif match := _HEADER.match(line):
            current = {}
            computations[match.group(2)] = Computation(match.group(2), current)
            entry = match.group(2) if match.group(1) else entry
    if not entry:
        raise ValueError("the HLO text has no entry computation: no line starts with ENTRY")
    counts = [
        re.search(rf"\b{name}=(\d+)", lines[0]) for name in ("num_partitions", "replica_count")
    ]
    return Module(computations, entry, math.prod(int(match.group(1)) for match in counts if match))


def shapes(text: str) -> tuple[Shape, ...]:
    """Parses the arrays of a type, such as "(f32[4,8]{1,0:T(8,128)}, bf16[])"."""
    return tuple(_shape(*groups) for groups in _SHAPE.findall(text))


def operand_shapes(line: Instruction, computation: Computation) -> list[Shape]:
    return [shape for name in line.operands for shape in computation.instructions[name].shapes]


def _instruction(line: str, head: re.Match[str]) -> Instruction:
    rest = _COMMENT.sub("", line[head.end() :])
    end = _closing_bracket(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    assert opcode, line
    close = _closing_bracket(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    plain = opcode.group(1) in ("constant", "parameter")
    return Instruction(
        name=head.group(2),
        opcode=opcode.group(1),
        shapes=shapes(rest[:end]),
        operands=() if plain else tuple(_OPERAND.findall(inside)),
        inside=inside,
        attributes=rest[close + 1 :],
        root=head.group(1) is not None,
    )


@functools.lru_cache(maxsize=65536)
def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = _SPACE.search(layout)
    sizes = tuple(int(size.strip("<=? ")) for size in dims.split(",") if size)
    return Shape(dtype, sizes, _padded(sizes, layout), int(space.group(1)) if space else 0)


def _padded(sizes: tuple[int, ...], layout: str) -> int:
    """Counts elements with tile padding: "{2,0,1:T(8,128)}" tiles axis 0 by 8 and axis 2 by 128."""
    match = _TILE.search(layout)
    if not match or not sizes:
        return math.prod(sizes)
    tile = [int(size) for size in match.group(1).split(",")]
    order = [int(axis) for axis in layout[: match.start()].split(",")]  # minor to major
    physical = [sizes[axis] for axis in order]
    for index, size in enumerate(reversed(tile)):
        if index < len(physical):
            physical[index] = -(-physical[index] // size) * size
    return math.prod(physical)


def _closing_bracket(text: str, start: int) -> int:
    """Returns the index of the bracket that closes the one at `start`."""
    depth = 0
    for match in _BRACKET.finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unclosed bracket in {text[:80]!r}")
