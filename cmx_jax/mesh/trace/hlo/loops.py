"""How often an HLO loop runs: as the compiler noted it, or by its counter, limit and step.

Values are followed to the instruction that makes them, through copies, tuples, fusions, and loops that hand
them on unchanged: compilers move constants far away from the loops that need them.
"""

import re
from typing import NamedTuple

from cmx_jax.mesh.trace.hlo.text import Computation, Instruction, Module

KNOWN = re.compile(r"known_trip_count\W+n\W+(\d+)")
PASSES_ON = frozenset(
    ("copy", "copy-start", "copy-done", "bitcast", "reshape", "convert", "optimization-barrier")
)
MOST_STEPS = 10_000  # a damaged text may lead in a circle
MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "EQ": "EQ", "NE": "NE"}


class Value(NamedTuple):
    """What an instruction makes, or a part of its tuple; `sites`: the fusions and calls in which it is."""

    made_by: Instruction
    part: tuple[int, ...] = ()
    sites: tuple[Instruction, ...] = ()


class Loops:
    """Trip counts of a module's loops.

    Args:
      callers: instructions that call a computation, by its name.
    """

    def __init__(self, module: Module, callers: dict[str, list[Instruction]]):
        self.module, self.callers = module, callers
        self._kept: dict[tuple[Instruction, tuple[int, ...]], bool] = {}

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a loop's body runs each time; None if data decide."""
        if known := KNOWN.search(loop.rest):
            return int(known.group(1))
        condition, body = (self._called(loop, key) for key in ("condition", "body"))
        test = self._origin(Value(condition.result()), condition)
        if test.made_by.op != "compare":
            return None
        counter, limit = (self._origin(value, condition) for value in self._operands(test))
        direction = test.made_by.attribute(r"direction=(\w+)") or ""
        if not self._is_counter(counter, loop, condition):
            counter, limit, direction = limit, counter, MIRRORED.get(direction, "")
        if not self._is_counter(counter, loop, condition):
            return None
        start = self._constant(Value(loop.operand(0), counter.part))
        step, end = self._step(body, counter.part), self._constant(limit)
        return None if start is None or step is None or end is None else trips(start, step, end, direction)

    def _is_counter(self, value: Value, loop: Instruction, condition: Computation) -> bool:
        """Whether it is a loop's variable, and changes."""
        inside = value.made_by.op == "parameter" and value.made_by.home is condition
        return inside and not self._hands_on(loop, value.part)

    def _step(self, body: Computation, part: tuple[int, ...]) -> int | None:
        """What a body adds to a variable."""
        made = self._origin(Value(body.result(), part), body)
        if made.made_by.op not in ("add", "subtract"):
            return None
        left, right = (self._origin(value, body) for value in self._operands(made))
        if right.made_by.op == "parameter" and made.made_by.op == "add" and right.part == part:
            left, right = right, left
        if left.made_by.op != "parameter" or left.made_by.home is not body or left.part != part:
            return None
        step = self._constant(right)
        return -step if step is not None and made.made_by.op == "subtract" else step

    def _constant(self, value: Value) -> int | None:
        made = self._origin(value).made_by
        if made.op != "constant" or not re.fullmatch(r"-?\d+", text := "".join(made.operands())):
            return None
        return int(text)

    def _operands(self, value: Value) -> list[Value]:
        return [Value(value.made_by.operand(number), (), value.sites) for number in (0, 1)]

    def _origin(self, value: Value, within: Computation | None = None) -> Value:
        """The instruction that really makes a value; parameters of `within` are not followed further."""
        for _ in range(MOST_STEPS):
            before = self._before(value, within)
            if before is None:
                break
            value = before
        return value

    def _before(self, value: Value, within: Computation | None) -> Value | None:
        """One step back; None if the value is made here."""
        made, part, sites = value
        if made.op in PASSES_ON:
            return Value(made.operand(0), part, sites)
        if made.op == "get-tuple-element":
            return Value(made.operand(0), (int(made.attribute(r", index=(\d+)") or 0), *part), sites)
        if made.op == "tuple" and part:
            return Value(made.operand(part[0]), part[1:], sites)
        if made.op in ("fusion", "call"):
            called = self._called(made, "calls" if made.op == "fusion" else "to_apply")
            return Value(called.result(), part, (made, *sites))
        if made.op == "while":
            return Value(made.operand(0), part, sites) if self._hands_on(made, part) else None
        if made.op != "parameter":
            return None
        number = int(made.operands()[0])
        if sites:
            return Value(sites[0].operand(number), part, sites[1:])
        callers = self.callers.get(made.home.name, [])
        if made.home is within or len(callers) != 1:
            return None  # called from several places, it may be given different values
        (caller,) = callers
        if caller.op == "while":
            return Value(caller.operand(0), part) if self._hands_on(caller, part) else None
        return Value(caller.operand(number), part) if caller.op in ("fusion", "call") else None

    def _hands_on(self, loop: Instruction, part: tuple[int, ...]) -> bool:
        """Whether a loop leaves a variable as it was."""
        if (loop, part) not in self._kept:
            self._kept[loop, part] = False
            body = self._called(loop, "body")
            made = self._origin(Value(body.result(), part), body)
            kept = made.made_by.op == "parameter" and made.made_by.home is body
            self._kept[loop, part] = kept and made.part == part
        return self._kept[loop, part]

    def _called(self, instruction: Instruction, key: str) -> Computation:
        return self.module.computation(instruction.called().get(key, ["(none)"])[0])


def trips(start: int, step: int, end: int, direction: str) -> int | None:
    """How often `i = start; while i direction end: i += step` runs; None if without end."""
    if direction in ("GT", "GE"):
        start, step, end, direction = -start, -step, -end, MIRRORED[direction]
    if direction == "EQ":
        return None if start == end and not step else int(start == end)
    if direction == "NE":
        whole = step and (end - start) % step == 0 and (end - start) // step >= 0
        return (end - start) // step if whole else 0 if start == end else None
    if direction not in ("LT", "LE"):
        return None
    left = end - start + (direction == "LE")
    return 0 if left <= 0 else -(-left // step) if step > 0 else None
