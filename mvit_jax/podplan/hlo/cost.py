"""What a compiled program does: arithmetic, bytes, collectives and memory, loops counted in full.

XLA's own `cost_analysis()` counts the body of a loop once, however often it runs. Here the text of
the optimised program is read instead, and every instruction counts as often as it runs:

- A fusion is one operation: it reads its operands and writes its results, and what it computes
  inside moves nothing. Of an operand that is only sliced, the slices count; of a result that is
  updated in place, the update.
- A custom kernel (Pallas: `tpu_custom_call`) reads its operands and writes its results once each.
  What it computes is not in the text: it is in no total but `kernel_flops`, which adds what the
  kernels' authors state (`pl.CostEstimate`). XLA's own totals take FLOPs and bytes from that
  statement, and count nothing where there is none.
- Of the branches of a conditional the one that moves the most bytes counts.
- A loop whose trips the compiler does not know counts once, and is reported.
- A collective that TPUs do while they compute is part of several fusions, from its start through
  what is computed meanwhile to its end: it counts at its start.
- What TPUs send to other slices leaves the program as a pair of "send" and "recv" and is done by a
  runtime of its own ("megascale"): it counts as the collective that it stands for.

`bytes` are of all operands and results, wherever they lie, with the padding of tiled layouts;
`hbm_bytes` leaves out what lies in a TPU's on-chip memory, to where the compiler brings what it
reads soon. A multiply-add is two FLOPs. Everything is per device.

Without loops and kernels the totals are XLA's: on CPUs to the byte (but where one fusion reads
overlapping slices of an array: XLA counts them all, here the array counts once). On TPUs XLA counts
both halves of what it prefetches, four times the array for a copy and three times for a slice,
where it is read once and written once; counted like that, the bytes agree to 0.2 % for the train
step of MViT-B 16x4 (v5e, 4 clips).
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mvit_jax.podplan.hlo import parser, trip_counts
from mvit_jax.podplan.hlo.flops import Counter
from mvit_jax.podplan.hlo.parser import Computation, Instruction, Module, operand_shapes

FREE = {  # names, constants, and what is no memory traffic
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "domain"),
    *("after-all", "add-dependency", "partition-id", "replica-id", "get-dimension-size"),
    *("send", "recv", "send-done", "recv-done"),  # collectives between slices count on their own
}
MOVES = {  # what only brings data elsewhere or into another form
    *("copy", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "pad"),
    *("concatenate", "broadcast", "reverse", "gather", "scatter", "convert", "iota", "copy-done"),
    *("slice-done", "dynamic-slice-done", "dynamic-update-slice-done"),
}
COLLECTIVES = {
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "collective-broadcast"),
}
# Custom calls that XLA for TPUs makes for itself, and that do nothing of their own.
_NO_KERNEL = (
    *("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding"),
    *("GatherScatterIndicesBitpacked", "SliceId", "ZeroCrop"),
)
_PASSES = ("tuple", "custom-call")  # what buffers of unfinished collectives go through in a fusion
_SLICES = ("slice", "dynamic-slice", "gather")
_SEEN_THROUGH = ("bitcast", "convert", "reshape", "copy")


@dataclass(frozen=True)
class Operation:
    """One instruction that does something, as often as it runs.

    Attributes:
      category: "matrix" (products and convolutions), "depthwise", "kernel" (custom), "collective",
        "reduce", "elementwise" or "movement".
      op_name: JAX's scopes and primitive, "jit(step)/jvp(stage1)/block0/dot_general".
      trips: how often it runs, by the loops around it.
      flops, matrix_flops, transcendentals, bytes, hbm_bytes: of one run.
      kernel_flops: of a custom kernel, as its author states them.
      cycles: of one run, as a TPU's compiler estimates; 0 for kernels and on other platforms.
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
    """Bytes that each device gives or gets (the larger of the two) in one run, among how many.

    Between slices of a TPU, `devices` counts the slices: each device talks to one in every other.
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
    """All operations of a program; the properties are totals over all trips, per device.

    Attributes:
      unknown_loops: those that are counted once, as nobody knows their trips.
      arguments: names, "state.params['head']['classifier']['bias']", and bytes in memory.
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
        """Custom kernels, whose arithmetic no other total holds."""
        return tuple(op for op in self.operations if op.category == "kernel")


@dataclass(frozen=True)
class Memory:
    """Bytes of a device that a program needs. `peak` is what must be free at once: arguments and
    results (those that take an argument's place once), temporaries, and the program itself."""

    arguments: int
    results: int
    aliased: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        return self.arguments + self.results - self.aliased + self.temporaries + self.code


def count(text: str) -> Counts:
    """What the program of `jax.stages.Compiled.as_text()` does."""
    module = parser.parse(text)
    walk, entry = _Walk(module), module.computations[module.entry]
    operations = tuple(walk.computation(entry, 1))
    given = [
        (line.op_name.replace("\\'", "'"), sum(shape.bytes for shape in line.shapes))
        for line in entry.parameters.values()
    ]
    return Counts(operations, tuple(walk.collectives), tuple(walk.unknown_loops), tuple(given))


def memory(compiled: Any) -> Memory:
    """The memory of a `jax.stages.Compiled`, per device, as its compiler planned it."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def scopes(op_name: str) -> tuple[str, ...]:
    """The scopes in an `op_name`, without what JAX put around them: "jit(step)/jvp(stage1)/block0/
    mul" gives ("stage1", "block0", "mul")."""
    bare = re.sub(r"jit\([^()]*\)|[\w.]+\(|\)", "", op_name)
    return tuple(part for part in bare.split("/") if part)


class _Walk:
    """One pass over a program, from its entry through loops and calls."""

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
        for part, where in inside:
            if part.opcode.removesuffix("-done") not in COLLECTIVES:
                continue
            scattered = where is not None and _is_scattered(part, where)
            if where is not None:
                if _is_under_way(part, where):
                    continue
                # What it reads, and writes unless the fusion goes on with it.
                moved = (*operand_shapes(part, where), *(() if scattered else part.shapes))
                traffic += [(shape.bytes, shape.space) for shape in moved]
            self.collectives.append(self._collective(part, where or computation, trips, scattered))
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
            kernel_flops=_stated(line, r'"cost_estimate":\{"flops":'),
            cycles=_stated(line, r'"estimated_cycles":'),
        )

    def _collective(
        self, line: Instruction, computation: Computation, trips: int, scattered: bool
    ) -> Collective:
        start = _start(line, computation)
        given = sum(shape.bytes for shape in operand_shapes(start, computation))
        got = sum(shape.bytes for shape in line.shapes)
        return Collective(
            kind="reduce-scatter" if scattered else line.opcode.removesuffix("-done"),
            op_name=start.op_name,
            trips=trips,
            bytes=max(given, got),
            devices=_group_size(start.attributes, self.module.devices),
        )


def _traffic(
    line: Instruction, computation: Computation, module: Module
) -> Iterator[tuple[int, int]]:
    """(bytes, memory space) of every operand that is read and every result that is written."""
    start = _start(line, computation)
    given = operand_shapes(start, computation)
    opcode = line.opcode.removesuffix("-done")
    if opcode == "fusion":
        inside = module.computations[line.called("calls")[0]]
        for position, name in enumerate(line.operands):
            arrays = computation.instructions[name].shapes
            read = _read(inside, inside.parameters[position], module)
            whole = sum(shape.bytes for shape in arrays)
            yield min(read, whole), arrays[0].space if arrays else 0
        for size, shape in zip(_written(inside, inside.root, module), line.shapes, strict=True):
            yield size, shape.space
    elif opcode in ("slice", "dynamic-slice", "gather"):
        yield line.shapes[0].bytes, given[0].space
        yield from ((shape.bytes, shape.space) for shape in given[1:])
        yield line.shapes[0].bytes, line.shapes[0].space
    elif opcode == "dynamic-update-slice":
        yield given[1].bytes, given[1].space
        yield given[1].bytes, line.shapes[0].space
    elif opcode == "scatter":  # reads and writes what it updates, in place
        *targets, updates = given[0], given[-1]
        yield from ((shape.bytes, shape.space) for shape in given[len(targets) :])
        yield 2 * updates.bytes, line.shapes[0].space
    else:
        yield from ((shape.bytes, shape.space) for shape in (*given, *line.shapes))


def _read(computation: Computation, line: Instruction, module: Module) -> int:
    """Bytes of a fusion's parameter, or of what it is renamed to, that the fusion reads."""
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
            share = 1.0 if user.root else _read(computation, user, module) / user.shapes[0].bytes
            total += math.ceil(whole * share)
        elif user.opcode == "fusion":
            inside = module.computations[user.called("calls")[0]]
            total += _read(inside, inside.parameters[position], module)
        else:
            return whole
    # Nothing uses it, or it is the fusion's result as it is.
    return whole if line.root else min(total, whole)


def _written(computation: Computation, line: Instruction, module: Module) -> Iterable[int]:
    """Bytes that a fusion writes for each array of its result."""
    if _carries_collectives(computation) and (
        line.opcode in ("parameter", "custom-call") or line.opcode in COLLECTIVES
    ):
        yield from (0 for _ in line.shapes)
    elif line.opcode == "tuple":
        for name in line.operands:
            yield from _written(computation, computation.instructions[name], module)
    elif line.opcode == "dynamic-update-slice":
        yield computation.instructions[line.operands[1]].shapes[0].bytes
    elif line.opcode in _SEEN_THROUGH and line.operands:
        source = computation.instructions[line.operands[0]]
        (size,) = _written(computation, source, module) if len(source.shapes) == 1 else (0,)
        part = size / max(1, source.shapes[0].bytes)
        yield math.ceil(line.shapes[0].bytes * part) if part < 1 else line.shapes[0].bytes
    elif line.opcode == "fusion":
        inside = module.computations[line.called("calls")[0]]
        yield from _written(inside, inside.root, module)
    else:
        yield from (shape.bytes for shape in line.shapes)


def _carries_collectives(computation: Computation) -> bool:
    """Whether buffers of collectives pass through this fusion, which count where those do."""
    return not computation.opcodes.isdisjoint(COLLECTIVES)


def _is_free(line: Instruction) -> bool:
    """Starts count where they are done."""
    if line.opcode in FREE or line.opcode in ("async-update", "async-done"):
        return True
    return line.opcode.endswith("-start") or (line.opcode == "custom-call" and not _is_kernel(line))


def _is_kernel(line: Instruction) -> bool:
    target = line.attribute("custom_call_target").strip('"')
    return line.opcode == "custom-call" and target not in _NO_KERNEL


def _stated(line: Instruction, name: str) -> int:
    """A number in the compiler's notes on an instruction."""
    found = re.search(name + r'"(\d+)"', line.attributes)
    return int(found.group(1)) if found else 0


def _start(line: Instruction, computation: Computation) -> Instruction:
    """The instruction with the operands: for the end of an asynchronous pair its start."""
    return computation.instructions[line.operands[0]] if line.opcode.endswith("-done") else line


def _lines_inside(
    line: Instruction, module: Module
) -> Iterator[tuple[Instruction, Computation | None]]:
    """The instruction, or those of a fusion, to any depth, and which computation holds them."""
    if line.opcode != "fusion":
        yield line, None
        return
    inside = module.computations[line.called("calls")[0]]
    for part in inside.instructions.values():
        for deep, where in _lines_inside(part, module):
            yield deep, where or inside


def _is_under_way(line: Instruction, computation: Computation) -> bool:
    """Whether an asynchronous collective in a fusion was started by an earlier one: what ends it
    takes it, or it leaves the fusion as it is."""
    users = [user for user, _ in computation.users[line.name]]
    if any(user.opcode == "custom-call" for user in users):
        return all("AsyncCollectiveStart" not in user.attributes for user in users)
    return any(user.root and user.opcode == "tuple" for user in users)


def _is_scattered(line: Instruction, computation: Computation) -> bool:
    """Whether of a sum over devices each keeps a slice, in a fusion of the two: so XLA for TPUs
    writes a reduce-scatter, of one array or of several."""
    users = [user for user, _ in computation.users[line.name]]
    if len(line.shapes) > 1 and all(user.opcode == "get-tuple-element" for user in users):
        users = [user for part in users for user, _ in computation.users[part.name]]
    return line.opcode == "all-reduce" and {user.opcode for user in users} == {"dynamic-slice"}


def _between_slices(
    line: Instruction, computation: Computation, trips: int
) -> Iterator[Collective]:
    """The collective between slices of which this "send" is one half; other sends are none."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.attributes)
    if not transfer:
        return
    meeting = re.search(r'_xla_host_transfer_rendezvous="[^"]*"', line.attributes)
    halves = [line]
    if meeting:
        others = computation.instructions.values()
        halves += [x for x in others if x.opcode == "recv" and meeting.group() in x.attributes]
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
    """How many devices take part together: `replica_groups` is a list of groups, their number and
    size, or axes of a mesh; nothing means all devices."""
    # Between the mesh and its axes may stand which device is where, "device_ids=([4,4]T(1,0))".
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*)? ?\{([^}]*)\}", attributes
    )
    if found:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))
        return math.prod(int(part or sizes[name]) for name, part in axes)
    found = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if found:
        return int(found.group(1))
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(found.group(1).split(",")) if found else devices
