"""Costs of a compiled program: FLOPs, bytes moved, collectives and memory, with loop trip counts.

XLA's `cost_analysis()` counts a loop's body once, for any trip count. This module reads the text of
the optimised program (HLO) instead, and counts every instruction as often as it runs:

- A fusion is one operation: it reads its operands and writes its results. Intermediate results
  inside a fusion move no bytes. If an operand is only sliced, only the slices count as read. If a
  result is updated in place, only the update counts as written.
- A custom kernel (Pallas: `tpu_custom_call`) reads its operands and writes its results once each.
  The HLO does not contain the kernel's FLOPs. `kernel_flops` has the author's estimate
  (`pl.CostEstimate`). XLA's totals include the estimated FLOPs and bytes, or 0 without an estimate.
- A conditional costs as much as the branch that moves the most bytes.
- A loop with an unknown trip count counts once, and is listed in `unknown_loops`.
- An asynchronous collective on TPUs is spread over several fusions: its start, the overlapped
  computation, and its end. The collective counts at its start.
- A transfer between slices is a pair of "send" and "recv", executed by a separate runtime
  ("megascale"). The pair counts as the collective that it implements.

`bytes` covers all operands and results in any memory, including the padding of tiled layouts.
`hbm_bytes` excludes a TPU's on-chip memory, into which the compiler prefetches. A multiply-add is
two FLOPs. All values are per device.

Without loops and kernels the totals agree with XLA's. On CPUs they agree to the byte, with one
exception: if a fusion reads overlapping slices of an array, XLA counts every slice, but this module
counts at most the whole array. On TPUs, XLA counts both halves of a prefetch. A copied array then
counts four times and a slice three times, although each is read once and written once. Counted in
XLA's way, the bytes agree to 0.2 % for the train step of MViT-B 16x4 (v5e, 4 clips).
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mvit_jax.podplan.hlo import parser, trip_counts
from mvit_jax.podplan.hlo.flops import Counter
from mvit_jax.podplan.hlo.parser import Computation, Instruction, Module, operand_shapes

FREE = {  # opcodes without FLOPs and memory traffic
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "domain"),
    *("after-all", "add-dependency", "partition-id", "replica-id", "get-dimension-size"),
    *("send", "recv", "send-done", "recv-done"),  # counted as collectives between slices
}
MOVES = {  # opcodes that only move, reshape or convert data
    *("copy", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "pad"),
    *("concatenate", "broadcast", "reverse", "gather", "scatter", "convert", "iota", "copy-done"),
    *("slice-done", "dynamic-slice-done", "dynamic-update-slice-done"),
}
COLLECTIVES = {
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "collective-broadcast"),
}
# XLA's internal custom calls on TPUs, which compute nothing.
_NO_KERNEL = (
    *("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding"),
    *("GatherScatterIndicesBitpacked", "SliceId", "ZeroCrop"),
)
_PASSES = ("tuple", "custom-call")  # opcodes that pass on pending collectives' buffers
_SLICES = ("slice", "dynamic-slice", "gather")
_SEEN_THROUGH = ("bitcast", "convert", "reshape", "copy")


@dataclass(frozen=True)
class Operation:
    """Costs of one instruction.

    Attributes:
      name: of the instruction.
      opcode: as in HLO.
      category: "matrix" (products and convolutions), "depthwise", "kernel" (custom), "collective",
        "reduce", "elementwise" or "movement".
      op_name: JAX's scopes and primitive, "jit(step)/jvp(stage1)/block0/dot_general".
      trips: number of runs, the product of the enclosing loops' trip counts.
      flops, matrix_flops, transcendentals, bytes, hbm_bytes: of one run.
      kernel_flops: of one run of a custom kernel, as stated by its author.
      cycles: of one run, estimated by the TPU compiler; 0 for kernels and on other platforms.
    """

    name: str
    opcode: str
    category: str
    op_name: str
    trips: int
    flops: int
    matrix_flops: int
    transcendentals: int
    bytes: int
    hbm_bytes: int
    kernel_flops: int = 0
    cycles: int = 0


@dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
      kind: the opcode, for example "all-reduce".
      op_name: JAX's scopes and primitive.
      trips: number of runs.
      bytes: size of a device's operands or results, whichever is larger, in one run.
      devices: number of devices per group; between slices, the number of slices, as each device
        communicates with one device of every other slice.
      between_slices: True if the data pass over the network between slices (DCN).
    """

    kind: str
    op_name: str
    trips: int
    bytes: int
    devices: int
    between_slices: bool = False


def _total(name: str) -> Any:
    return property(lambda self: sum(op.trips * getattr(op, name) for op in self.operations))


@dataclass(frozen=True)
class Counts:
    """Operations of a program; the properties are totals over all trips, per device.

    Attributes:
      operations: the operations with their costs.
      collectives: the collectives between chips and between slices.
      unknown_loops: loops with an unknown trip count, which count once.
      arguments: names, such as "state.params['head']['classifier']['bias']", and bytes in memory.
    """

    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]
    arguments: tuple[tuple[str, int], ...] = ()

    flops = _total("flops")
    matrix_flops = _total("matrix_flops")
    transcendentals = _total("transcendentals")
    bytes = _total("bytes")
    hbm_bytes = _total("hbm_bytes")
    kernel_flops = _total("kernel_flops")

    @property
    def kernels(self) -> tuple[Operation, ...]:
        """Custom kernels, whose FLOPs only `kernel_flops` includes."""
        return tuple(op for op in self.operations if op.category == "kernel")


@dataclass(frozen=True)
class Memory:
    """Memory analysis of a program, in bytes per device.

    Attributes:
      arguments: of the program's inputs.
      results: of the program's outputs.
      aliased: of results that reuse an argument's memory (donated buffers).
      temporaries: of intermediate results.
      code: of the program itself.
    """

    arguments: int
    results: int
    aliased: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """Peak memory."""
        return self.arguments + self.results - self.aliased + self.temporaries + self.code


def count(text: str) -> Counts:
    """Returns the costs of a program from the text of `jax.stages.Compiled.as_text()`."""
    module = parser.parse(text)
    walk, entry = _Walk(module), module.computations[module.entry]
    operations = tuple(walk.computation(entry, 1))
    arguments = [
        (line.op_name.replace("\\'", "'"), sum(shape.bytes for shape in line.shapes))
        for line in entry.parameters.values()
    ]
    return Counts(operations, tuple(walk.collectives), tuple(walk.unknown_loops), tuple(arguments))


def memory(compiled: Any) -> Memory:
    """Returns the compiler's memory analysis of a `jax.stages.Compiled`, per device."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def scopes(op_name: str) -> tuple[str, ...]:
    """Returns the scopes in an `op_name` without JAX's transformations.

    For example, "jit(step)/jvp(stage1)/block0/mul" gives ("stage1", "block0", "mul").
    """
    bare = re.sub(r"jit\([^()]*\)|[\w.]+\(|\)", "", op_name)
    return tuple(part for part in bare.split("/") if part)


class _Walk:
    """Traversal of a program from its entry computation through loops and calls."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.collectives: list[Collective] = []
        self.unknown_loops: list[str] = []
        self.arithmetic = Counter(module)

    def computation(self, computation: Computation, trips: int) -> Iterator[Operation]:
        for line in computation.instructions.values():
            if line.opcode == "while":
                yield from self._loop(line, computation, trips)
            elif line.opcode == "conditional":
                yield from self._branches(line, trips)
            elif line.opcode in ("call", "async-start"):
                for name in line.called("to_apply") + line.called("calls"):
                    yield from self.computation(self.module.computations[name], trips)
            elif line.opcode == "send":
                self.collectives += _between_slices(line, computation, trips)
            elif not _is_free(line):
                yield self._operation(line, computation, trips)

    def _loop(self, line: Instruction, computation: Computation, trips: int) -> Iterator[Operation]:
        (body,), (condition,) = line.called("body"), line.called("condition")
        times = trip_counts.trips(line, computation, self.module)
        if times is None:
            self.unknown_loops.append(line.op_name or line.name)
            times = 1
        for name in (body, condition):
            yield from self.computation(self.module.computations[name], trips * times)

    def _branches(self, line: Instruction, trips: int) -> Iterator[Operation]:
        walks = []
        for kind in ("branch_computations", "true_computation", "false_computation"):
            for name in line.called(kind):
                walk = _Walk(self.module)
                walks.append((list(walk.computation(self.module.computations[name], trips)), walk))
        operations, walk = max(walks, key=lambda pair: sum(op.trips * op.bytes for op in pair[0]))
        self.collectives += walk.collectives
        self.unknown_loops += walk.unknown_loops
        yield from operations

    def _operation(self, line: Instruction, computation: Computation, trips: int) -> Operation:
        flops, matrix_flops, transcendentals = self.arithmetic.of(line, computation)
        inside = list(_lines_inside(line, self.module))
        traffic = list(_traffic(line, computation, self.module))
        for part, parent in inside:
            if part.opcode.removesuffix("-done") not in COLLECTIVES:
                continue
            scattered = parent is not None and _is_scattered(part, parent)
            if parent is not None:
                if _is_pending(part, parent):
                    continue
                # The collective's operands, and its results unless the fusion slices them.
                moved = (*operand_shapes(part, parent), *(() if scattered else part.shapes))
                traffic += [(shape.bytes, shape.space) for shape in moved]
            self.collectives.append(self._collective(part, parent or computation, trips, scattered))
        return Operation(
            name=line.name,
            opcode=line.opcode,
            category=_category([part for part, _ in inside]),
            op_name=line.op_name,
            trips=trips,
            flops=flops,
            matrix_flops=matrix_flops,
            transcendentals=transcendentals,
            bytes=sum(size for size, _ in traffic),
            hbm_bytes=sum(size for size, space in traffic if space == 0),
            kernel_flops=_config_number(line, r'"cost_estimate":\{"flops":'),
            cycles=_config_number(line, r'"estimated_cycles":'),
        )

    def _collective(
        self, line: Instruction, computation: Computation, trips: int, scattered: bool
    ) -> Collective:
        start = _start(line, computation)
        sent = sum(shape.bytes for shape in operand_shapes(start, computation))
        received = sum(shape.bytes for shape in line.shapes)
        return Collective(
            kind="reduce-scatter" if scattered else line.opcode.removesuffix("-done"),
            op_name=start.op_name,
            trips=trips,
            bytes=max(sent, received),
            devices=_group_size(start.attributes, self.module.devices),
        )


def _traffic(
    line: Instruction, computation: Computation, module: Module
) -> Iterator[tuple[int, int]]:
    """Yields (bytes, memory space) of every operand read and every result written."""
    start = _start(line, computation)
    operands = operand_shapes(start, computation)
    opcode = line.opcode.removesuffix("-done")
    if opcode == "fusion":
        inside = module.computations[line.called("calls")[0]]
        for position, name in enumerate(line.operands):
            arrays = computation.instructions[name].shapes
            read = _bytes_read(inside, inside.parameters[position], module)
            total = sum(shape.bytes for shape in arrays)
            yield min(read, total), arrays[0].space if arrays else 0
        for size, shape in zip(
            _bytes_written(inside, inside.root, module), line.shapes, strict=True
        ):
            yield size, shape.space
    elif opcode in ("slice", "dynamic-slice", "gather"):
        yield line.shapes[0].bytes, operands[0].space
        yield from ((shape.bytes, shape.space) for shape in operands[1:])
        yield line.shapes[0].bytes, line.shapes[0].space
    elif opcode == "dynamic-update-slice":
        yield operands[1].bytes, operands[1].space
        yield operands[1].bytes, line.shapes[0].space
    elif opcode == "scatter":  # in place: reads and writes the updated elements
        *targets, updates = operands[0], operands[-1]
        yield from ((shape.bytes, shape.space) for shape in operands[len(targets) :])
        yield 2 * updates.bytes, line.shapes[0].space
    else:
        yield from ((shape.bytes, shape.space) for shape in (*operands, *line.shapes))


def _bytes_read(computation: Computation, line: Instruction, module: Module) -> int:
    """Returns the bytes that a fusion reads of a parameter, or of a parameter's bitcast."""
    whole, total = sum(shape.bytes for shape in line.shapes), 0
    carries = _carries_collectives(computation)
    for user, position in computation.users[line.name]:
        if carries and (user.opcode in _PASSES or user.opcode in COLLECTIVES):
            continue
        if user.opcode in _SLICES and position == 0:
            total += user.shapes[0].bytes
        elif user.opcode == "dynamic-update-slice" and position == 0:
            continue  # updated in place
        elif user.opcode in _SEEN_THROUGH and user.shapes[0].elements == line.shapes[0].elements:
            share = (
                1.0 if user.root else _bytes_read(computation, user, module) / user.shapes[0].bytes
            )
            total += math.ceil(whole * share)
        elif user.opcode == "fusion":
            inside = module.computations[user.called("calls")[0]]
            total += _bytes_read(inside, inside.parameters[position], module)
        else:
            return whole
    # A parameter that is returned is read as a whole, an unused one is not read.
    return whole if line.root else min(total, whole)


def _bytes_written(computation: Computation, line: Instruction, module: Module) -> Iterable[int]:
    """Yields the bytes that a fusion writes for each array of its result."""
    if _carries_collectives(computation) and (
        line.opcode in ("parameter", "custom-call") or line.opcode in COLLECTIVES
    ):
        yield from (0 for _ in line.shapes)
    elif line.opcode == "tuple":
        for name in line.operands:
            yield from _bytes_written(computation, computation.instructions[name], module)
    elif line.opcode == "dynamic-update-slice":
        yield computation.instructions[line.operands[1]].shapes[0].bytes
    elif line.opcode in _SEEN_THROUGH and line.operands:
        source = computation.instructions[line.operands[0]]
        (size,) = _bytes_written(computation, source, module) if len(source.shapes) == 1 else (0,)
        part = size / max(1, source.shapes[0].bytes)
        yield math.ceil(line.shapes[0].bytes * part) if part < 1 else line.shapes[0].bytes
    elif line.opcode == "fusion":
        inside = module.computations[line.called("calls")[0]]
        yield from _bytes_written(inside, inside.root, module)
    else:
        yield from (shape.bytes for shape in line.shapes)


def _carries_collectives(computation: Computation) -> bool:
    """Returns True if a fusion contains collectives, whose buffers `_operation` counts."""
    return not computation.opcodes.isdisjoint(COLLECTIVES)


def _is_free(line: Instruction) -> bool:
    """Returns True if an instruction costs nothing; asynchronous pairs count at their end."""
    if line.opcode in FREE or line.opcode in ("async-update", "async-done"):
        return True
    return line.opcode.endswith("-start") or (line.opcode == "custom-call" and not _is_kernel(line))


def _is_kernel(line: Instruction) -> bool:
    target = line.attribute("custom_call_target").strip('"')
    return line.opcode == "custom-call" and target not in _NO_KERNEL


def _config_number(line: Instruction, name: str) -> int:
    """Returns a number from an instruction's backend config, or 0."""
    match = re.search(name + r'"(\d+)"', line.attributes)
    return int(match.group(1)) if match else 0


def _start(line: Instruction, computation: Computation) -> Instruction:
    """Returns the start of an asynchronous pair, for the operands; else the instruction itself."""
    return computation.instructions[line.operands[0]] if line.opcode.endswith("-done") else line


def _lines_inside(
    line: Instruction, module: Module
) -> Iterator[tuple[Instruction, Computation | None]]:
    """Yields an instruction, or a fusion's instructions recursively, each with its computation.

    The computation is None for an instruction outside of a fusion.
    """
    if line.opcode != "fusion":
        yield line, None
        return
    inside = module.computations[line.called("calls")[0]]
    for part in inside.instructions.values():
        for nested, parent in _lines_inside(part, module):
            yield nested, parent or inside


def _is_pending(line: Instruction, computation: Computation) -> bool:
    """Returns True if an earlier fusion started this asynchronous collective.

    In the later fusion, the collective's end uses it, or the returned tuple contains it.
    """
    users = [user for user, _ in computation.users[line.name]]
    if any(user.opcode == "custom-call" for user in users):
        return all("AsyncCollectiveStart" not in user.attributes for user in users)
    return any(user.root and user.opcode == "tuple" for user in users)


def _is_scattered(line: Instruction, computation: Computation) -> bool:
    """Returns True for a reduce-scatter, which XLA for TPUs writes as a fusion.

    The fusion has an all-reduce of one or several arrays, followed by dynamic slices.
    """
    users = [user for user, _ in computation.users[line.name]]
    if len(line.shapes) > 1 and all(user.opcode == "get-tuple-element" for user in users):
        users = [user for part in users for user, _ in computation.users[part.name]]
    return line.opcode == "all-reduce" and {user.opcode for user in users} == {"dynamic-slice"}


def _between_slices(
    line: Instruction, computation: Computation, trips: int
) -> Iterator[Collective]:
    """Yields the collective between slices that a "send" is part of; nothing for other sends."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.attributes)
    if not transfer:
        return
    rendezvous = re.search(r'_xla_host_transfer_rendezvous="[^"]*"', line.attributes)
    halves = [line]
    if rendezvous:
        lines = computation.instructions.values()
        halves += [x for x in lines if x.opcode == "recv" and rendezvous.group() in x.attributes]
    target = re.search(r'_xla_megascale_target="\{([\d,]+)\}', line.attributes)
    yield Collective(
        kind=transfer.group(1).lower().replace("_", "-"),
        op_name=line.op_name,
        trips=trips,
        bytes=max(half.shapes[0].bytes for half in halves),
        devices=len(target.group(1).split(",")) if target else 2,
        between_slices=True,
    )


def _category(lines: list[Instruction]) -> str:
    opcodes = {line.opcode.removesuffix("-done") for line in lines}
    convolutions = [line for line in lines if line.opcode == "convolution"]
    if any("feature_group_count" in line.attributes for line in convolutions):
        return "depthwise"
    if convolutions or "dot" in opcodes:
        return "matrix"
    if opcodes & COLLECTIVES:
        return "collective"
    if any(_is_kernel(line) for line in lines):
        return "kernel"
    if opcodes & {"reduce", "reduce-window", "select-and-scatter", "sort"}:
        return "reduce"
    return "movement" if opcodes <= MOVES | FREE | {"custom-call"} else "elementwise"


def _group_size(attributes: str, devices: int) -> int:
    """Returns the number of devices in a collective's group; all without `replica_groups`.

    `replica_groups` has three formats: a list of groups, their number and size, or axes of a mesh.
    """
    # An order of the devices, "device_ids=([4,4]T(1,0))", may come between the mesh and its axes.
    match = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*)? ?\{([^}]*)\}", attributes
    )
    if match:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match.group(2))
        return math.prod(int(part or sizes[name]) for name, part in axes)
    match = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if match:
        return int(match.group(1))
    match = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(match.group(1).split(",")) if match else devices
