"""Trip counts of HLO loops: as noted by the compiler, or by counter, limit and step.

Values are followed to the instruction that produces them, through copies, tuples, fusions, and loops in which
they are invariant: compilers move constants far away from the loops that need them.
"""

import re
from typing import NamedTuple

from cmx_jax.mesh.trace.hlo.parser import Computation, Instruction, Module

KNOWN = re.compile(r"known_trip_count\W+n\W+(\d+)")
FORWARDING = frozenset(
    ("copy", "copy-start", "copy-done", "bitcast", "reshape", "convert", "optimization-barrier")
)
MAX_STEPS = 10_000  # a damaged text may lead in a circle
MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "EQ": "EQ", "NE": "NE"}


class Value(NamedTuple):
    """The result of an instruction, or a part of it.

    Attributes:
      producer: Instruction that produces the value.
      part: Indices into the tuple that it produces; empty for the whole result.
      sites: Fusions and calls that the instruction is in, innermost first.
    """

    producer: Instruction
    part: tuple[int, ...] = ()
    sites: tuple[Instruction, ...] = ()


class Loops:
    """Trip counts of a module's loops.

    Args:
      module: Module with the loops.
      callers: Instructions that call a computation, by the name of the computation.
    """

    def __init__(self, module: Module, callers: dict[str, list[Instruction]]):
        self.module, self.callers = module, callers
        self._invariant: dict[tuple[Instruction, tuple[int, ...]], bool] = {}

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns how often a loop's body runs per execution of the loop; None if data decide."""
        if known := KNOWN.search(loop.rest):
            return int(known.group(1))
        condition, body = (self._called(loop, key) for key in ("condition", "body"))
        test = self._origin(Value(condition.result()), condition)
        if test.producer.op != "compare":
            return None
        counter, limit = (self._origin(value, condition) for value in self._operands(test))
        direction = test.producer.attribute(r"direction=(\w+)") or ""
        if not self._is_counter(counter, loop, condition):
            counter, limit, direction = limit, counter, MIRRORED.get(direction, "")
        if not self._is_counter(counter, loop, condition):
            return None
        start = self._constant(Value(loop.operand(0), counter.part))
        step, end = self._step(body, counter.part), self._constant(limit)
        return None if start is None or step is None or end is None else trips(start, step, end, direction)

    def _is_counter(self, value: Value, loop: Instruction, condition: Computation) -> bool:
        """Returns whether a value is a variable of a loop that changes."""
        inside = value.producer.op == "parameter" and value.producer.home is condition
        return inside and not self._is_invariant(loop, value.part)

    def _step(self, body: Computation, part: tuple[int, ...]) -> int | None:
        """Returns what a loop's body adds to a variable; None if that is not constant."""
        result = self._origin(Value(body.result(), part), body)
        if result.producer.op not in ("add", "subtract"):
            return None
        left, right = (self._origin(value, body) for value in self._operands(result))
        if right.producer.op == "parameter" and result.producer.op == "add" and right.part == part:
            left, right = right, left
        if left.producer.op != "parameter" or left.producer.home is not body or left.part != part:
            return None
        step = self._constant(right)
        return -step if step is not None and result.producer.op == "subtract" else step

    def _constant(self, value: Value) -> int | None:
        origin = self._origin(value).producer
        if origin.op != "constant" or not re.fullmatch(r"-?\d+", text := "".join(origin.operands())):
            return None
        return int(text)

    def _operands(self, value: Value) -> list[Value]:
        return [Value(value.producer.operand(number), (), value.sites) for number in (0, 1)]

    def _origin(self, value: Value, within: Computation | None = None) -> Value:
        """Follows a value to the instruction that produces it, or to a parameter of `within`."""
        for _ in range(MAX_STEPS):
            previous = self._previous(value, within)
            if previous is None:
                break
            value = previous
        return value

    def _previous(self, value: Value, within: Computation | None) -> Value | None:
        """Follows a value one step back; None if its instruction produces it."""
        producer, part, sites = value
        if producer.op in FORWARDING:
            return Value(producer.operand(0), part, sites)
        if producer.op == "get-tuple-element":
            return Value(producer.operand(0), (int(producer.attribute(r", index=(\d+)") or 0), *part), sites)
        if producer.op == "tuple" and part:
            return Value(producer.operand(part[0]), part[1:], sites)
        if producer.op in ("fusion", "call"):
            called = self._called(producer, "calls" if producer.op == "fusion" else "to_apply")
            return Value(called.result(), part, (producer, *sites))
        if producer.op == "while":
            return Value(producer.operand(0), part, sites) if self._is_invariant(producer, part) else None
        if producer.op != "parameter":
            return None
        number = int(producer.operands()[0])
        if sites:
            return Value(sites[0].operand(number), part, sites[1:])
        callers = self.callers.get(producer.home.name, [])
        if producer.home is within or len(callers) != 1:
            return None  # called from several places, it may be given different values
        (caller,) = callers
        if caller.op == "while":
            return Value(caller.operand(0), part) if self._is_invariant(caller, part) else None
        return Value(caller.operand(number), part) if caller.op in ("fusion", "call") else None

    def _is_invariant(self, loop: Instruction, part: tuple[int, ...]) -> bool:
        """Returns whether a variable is invariant in a loop."""
        if (loop, part) not in self._invariant:
            self._invariant[loop, part] = False
            body = self._called(loop, "body")
            origin = self._origin(Value(body.result(), part), body)
            inside = origin.producer.op == "parameter" and origin.producer.home is body
            self._invariant[loop, part] = inside and origin.part == part
        return self._invariant[loop, part]

    def _called(self, instruction: Instruction, key: str) -> Computation:
        return self.module.computation(instruction.called().get(key, ["(none)"])[0])


def trips(start: int, step: int, end: int, direction: str) -> int | None:
    """Returns how often `i = start; while i direction end: i += step` runs; None if it never ends."""
    if direction in ("GT", "GE"):
        start, step, end, direction = -start, -step, -end, MIRRORED[direction]
    if direction == "EQ":
        return None if start == end and not step else int(start == end)
    if direction == "NE":
        reaches = step and (end - start) % step == 0 and (end - start) // step >= 0
        return (end - start) // step if reaches else 0 if start == end else None
    if direction not in ("LT", "LE"):
        return None
    left = end - start + (direction == "LE")
    return 0 if left <= 0 else -(-left // step) if step > 0 else None
