"""Trip counts of a compiled program's loops."""

import operator
import re
from collections.abc import Iterator

from mvit_jax.podplan.hlo.parser import Computation, Instruction, Module

# Loops that do not end within this many iterations count as data-dependent.
MAX_TRIPS = 100_000

_ARITHMETIC = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
}
_COMPARISONS = {
    name: getattr(operator, name.lower()) for name in ("LT", "LE", "GT", "GE", "EQ", "NE")
}
Number = int | None  # None is a value that is only known at run time


def trips(line: Instruction, computation: Computation, module: Module) -> int | None:
    """Returns the trip count of a `while` instruction, or None if it depends on data.

    XLA for CPUs annotates trip counts. Elsewhere the loop's counters are evaluated from their
    constant initial values until the condition fails.
    """
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.attributes)
    if match:
        return int(match.group(1))
    body, condition = (module.computations[line.called(name)[0]] for name in ("body", "condition"))
    carried = computation.instructions[line.operands[0]]
    if carried.opcode == "parameter":  # XLA for CPUs wraps loops in calls since jaxlib 0.12
        calls = list(_calls(computation.name, module))
        if len(calls) != 1:
            return None
        call, computation = calls[0]
        carried = computation.instructions[call.operands[int(carried.inside)]]
    if carried.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    start = [_number(name, computation, module, []) for name in carried.operands]
    state = {index: number for index, number in enumerate(start) if number is not None}
    for count in range(MAX_TRIPS):
        continues = _number(condition.root.name, condition, module, [state])
        if not continues:
            return None if continues is None else count
        after = {index: body.root.operands[index] for index in state}
        numbers = {index: _number(name, body, module, [state]) for index, name in after.items()}
        state = {index: number for index, number in numbers.items() if number is not None}
    return None


def _calls(name: str, module: Module) -> Iterator[tuple[Instruction, Computation]]:
    """Yields the calls of a computation, and the computations that hold them."""
    for caller in module.computations.values():
        for line in caller.instructions.values():
            if line.opcode == "call" and name in line.called("to_apply"):
                yield line, caller


def _number(
    name: str, computation: Computation, module: Module, parameters: list[dict[int, int] | Number]
) -> Number:
    """Evaluates an instruction, given the parameters of its computation.

    A parameter is a number, or a loop's tuple as a dict of the known numbers by index.
    """
    line = computation.instructions[name]

    def operand(position: int) -> Number:
        return _number(line.operands[position], computation, module, parameters)

    def parameter(number: int) -> dict[int, int] | Number:
        return parameters[number] if number < len(parameters) else None

    if line.opcode == "constant":
        constant = {"true": 1, "false": 0}.get(line.inside, line.inside)
        return int(constant) if re.fullmatch(r"-?\d+", str(constant)) else None
    if line.opcode == "parameter":
        value = parameter(int(line.inside))
        return None if isinstance(value, dict) else value
    if line.opcode == "get-tuple-element":
        source = computation.instructions[line.operands[0]]
        values = parameter(int(source.inside)) if source.opcode == "parameter" else None
        return values.get(int(line.attribute("index"))) if isinstance(values, dict) else None
    if line.opcode in ("copy", "bitcast", "convert", "reshape"):
        return operand(0)
    if line.opcode == "fusion":
        inside = module.computations[line.called("calls")[0]]
        numbers = [operand(position) for position in range(len(line.operands))]
        return _number(inside.root.name, inside, module, [*numbers])
    if line.opcode in _ARITHMETIC or line.opcode == "compare":
        left, right = operand(0), operand(1)
        if left is None or right is None:
            return None
        function = _ARITHMETIC.get(line.opcode) or _COMPARISONS[line.attribute("direction")]
        return int(function(left, right))
    return None
