"""The text of a compiled program (XLA's HLO) as computations of instructions with shapes."""

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
    """An array of `dims` elements of `dtype` ("bf16").

    Attributes:
      padded: elements in memory; a TPU's tiles of 8x128 or so are always whole.
      space: the memory that it lies in: 0 is the device's main memory, 1 a TPU's on-chip VMEM.
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
        """In memory, padding included."""
        bits = re.search(r"\d+", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits.group()) if bits else 0  # token: nothing
        return -(-self.padded * width // 8)


@dataclass(frozen=True)
class Instruction:
    """One line: what it computes, from which instructions of the same computation.

    Attributes:
      shapes: of the result; the arrays of a tuple, nested ones flattened.
      operands: names.
      inside: what stands between the opcode's brackets, as it is: a parameter's number, a
        constant's value.
      attributes: the rest of the line.
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
        """Where the program asked for it: JAX's scopes and the primitive's name."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    def attribute(self, name: str) -> str:
        """A value without braces, "fusion.3" of `calls=%fusion.3`; empty where there is none."""
        found = re.search(rf"(?:^|[\s,]){name}=%?([^\s,]+)", self.attributes)
        return found.group(1) if found else ""

    def called(self, name: str) -> tuple[str, ...]:
        """Computations that an attribute names, one or several in braces."""
        found = re.search(rf"(?:^|[\s,]){name}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return tuple(_OPERAND.findall(found.group(1))) if found else ()


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; operands come before what uses them."""

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
        """For each name the instructions that take it, and as which operand."""
        users: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for line in self.instructions.values():
            for position, operand in enumerate(line.operands):
                users[operand].append((line, position))
        return users


@dataclass(frozen=True)
class Module:
    """A program: its computations by name, which one starts, and on how many devices it runs."""

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Module:
    """The program whose text `jax.stages.Compiled.as_text()` gives."""
    lines = text.splitlines()
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in lines[1:]:
        if current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(line, found)
            current[instruction.name] = instruction
        elif found := _HEADER.match(line):
            current = {}
            computations[found.group(2)] = Computation(found.group(2), current)
            entry = found.group(2) if found.group(1) else entry
    if not entry:
        raise ValueError("this text holds no program: no line starts with ENTRY")
    counts = [
        re.search(rf"\b{name}=(\d+)", lines[0]) for name in ("num_partitions", "replica_count")
    ]
    return Module(computations, entry, math.prod(int(found.group(1)) for found in counts if found))


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type as it is printed, "(f32[4,8]{1,0:T(8,128)}, bf16[])"."""
    return tuple(_shape(*found) for found in _SHAPE.findall(text))


def operand_shapes(line: Instruction, computation: Computation) -> list[Shape]:
    return [shape for name in line.operands for shape in computation.instructions[name].shapes]


def _instruction(line: str, head: re.Match[str]) -> Instruction:
    rest = _COMMENT.sub("", line[head.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    assert opcode, line
    close = _closing(rest, opcode.end() - 1)
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
    """Elements of whole tiles: "{2,0,1:T(8,128)}" tiles dimension 0 by 8 and dimension 2 by 128."""
    found = _TILE.search(layout)
    if not found or not sizes:
        return math.prod(sizes)
    tile = [int(size) for size in found.group(1).split(",")]
    order = [int(axis) for axis in layout[: found.start()].split(",")]  # the minor one first
    physical = [sizes[axis] for axis in order]
    for place, size in enumerate(reversed(tile)):
        if place < len(physical):
            physical[place] = -(-physical[place] // size) * size
    return math.prod(physical)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for found in _BRACKET.finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a bracket is left open in {text[:80]!r}")
