"""How often a compiled program's loops run."""

import operator
import re

from mvit_jax.podplan.hlo.parser import Computation, Instruction, Module

# A loop that counts this far without an end is one whose end hangs on data.
MOST = 100_000

_ARITHMETIC = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
}
_COMPARISONS = {
    name: getattr(operator, name.lower()) for name in ("LT", "LE", "GT", "GE", "EQ", "NE")
}
Number = int | None  # None is a number that only running the program gives


def trips(line: Instruction, computation: Computation, module: Module) -> int | None:
    """How often the body of a `while` of `computation` runs; None where nobody knows.

    XLA for CPUs writes down what it found out. Elsewhere the loop's counters, which start from
    constants, are followed until its condition fails.
    """
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.attributes)
    if found:
        return int(found.group(1))
    body, condition = (module.computations[line.called(name)[0]] for name in ("body", "condition"))
    carried = computation.instructions[line.operands[0]]
    if carried.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    start = [_number(name, computation, module, []) for name in carried.operands]
    state = {place: number for place, number in enumerate(start) if number is not None}
    for count in range(MOST):
        goes_on = _number(condition.root.name, condition, module, [state])
        if not goes_on:
            return None if goes_on is None else count
        after = {place: body.root.operands[place] for place in state}
        numbers = {place: _number(name, body, module, [state]) for place, name in after.items()}
        state = {place: number for place, number in numbers.items() if number is not None}
    return None


def _number(
    name: str, computation: Computation, module: Module, given: list[dict[int, int] | Number]
) -> Number:
    """The value of an instruction, from those of its computation's parameters: a number, or for a
    loop's tuple the numbers in it."""
    line = computation.instructions[name]

    def operand(position: int) -> Number:
        return _number(line.operands[position], computation, module, given)

    def parameter(number: int) -> dict[int, int] | Number:
        return given[number] if number < len(given) else None

    if line.opcode == "constant":
        known = {"true": 1, "false": 0}.get(line.inside, line.inside)
        return int(known) if re.fullmatch(r"-?\d+", str(known)) else None
    if line.opcode == "parameter":
        value = parameter(int(line.inside))
        return None if isinstance(value, dict) else value
    if line.opcode == "get-tuple-element":
        source = computation.instructions[line.operands[0]]
        whole = parameter(int(source.inside)) if source.opcode == "parameter" else None
        return whole.get(int(line.attribute("index"))) if isinstance(whole, dict) else None
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
