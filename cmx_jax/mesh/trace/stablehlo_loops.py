"""Trip counts of the loops of StableHLO that count from one number to another."""

import re
from collections.abc import Callable
from typing import Any

from jax.extend.mlir import ir

INCLUSIVE = {"LT": 0, "LE": 1, "GT": 0, "GE": 1}  # 1 if the loop runs for the last value too


def trips(loop: Any) -> int | None:
    """Returns how often a loop runs if it counts from one number to another; None if data decide."""
    condition, body = (region.blocks[0] for region in loop.regions)
    results = list(_terminator(body).operands)
    test = _defining_op(_terminator(condition).operands[0])
    if test is None or test.name != "stablehlo.compare":
        return None

    def constant(value: Any, block: Any) -> int | None:
        """Returns a constant of a block; for a loop-invariant variable, its initial value."""
        op = _defining_op(value)
        if op is not None:
            return _constant(op)
        number = _argument_index(value, block)
        if number is None or _argument_index(results[number], body) != number:
            return None
        start = _defining_op(loop.operands[number])
        return None if start is None else _constant(start)

    counter, limit = (test.operands[i] for i in (0, 1))
    number, end = _argument_index(counter, condition), constant(limit, condition)
    step = None if number is None else _step(results[number], number, body, constant)
    start = None if number is None else _defining_op(loop.operands[number])
    begin = None if start is None else _constant(start)
    direction = re.search(r"comparison_direction (\w+)", str(test.attributes["comparison_direction"]))
    if begin is None or end is None or not step or not direction or direction[1] not in INCLUSIVE:
        return None
    if (step > 0) != (direction[1] in ("LT", "LE")):
        return None
    return max(0, -(-(end - begin + INCLUSIVE[direction[1]] * (1 if step > 0 else -1)) // step))


def _step(result: Any, number: int, body: Any, constant: Callable[[Any, Any], int | None]) -> int | None:
    """Returns what one iteration adds to the counter; None if that is not constant."""
    op = _defining_op(result)
    if op is None or op.name not in ("stablehlo.add", "stablehlo.subtract"):
        return None
    left, right = op.operands
    if op.name == "stablehlo.add" and _argument_index(left, body) != number:
        left, right = right, left
    step = constant(right, body) if _argument_index(left, body) == number else None
    return -step if step is not None and op.name == "stablehlo.subtract" else step


def _terminator(block: Any) -> Any:
    """Returns the last operation of a block, which returns its results."""
    return block.operations[len(block.operations) - 1].operation


def _defining_op(value: Any) -> Any:
    """Returns the operation that computes a value; None for a block's argument."""
    owner = _unconstrained(value).owner
    return None if isinstance(owner, ir.Block) else owner.operation


def _unconstrained(value: Any) -> Any:
    """Returns the value that sharding constraints were applied to."""
    while not isinstance(value.owner, ir.Block) and value.owner.name == "sdy.sharding_constraint":
        value = value.owner.operands[0]
    return value


def _argument_index(value: Any, block: Any) -> int | None:
    """Returns the index of a value among a block's arguments; None if it is not one of them."""
    value = _unconstrained(value)
    return next((i for i, other in enumerate(block.arguments) if other == value), None)


def _constant(op: Any) -> int | None:
    if op.name != "stablehlo.constant" or not re.match(r"dense<-?\d+>", str(op.attributes["value"])):
        return None
    return int(re.match(r"dense<(-?\d+)>", str(op.attributes["value"]))[1])  # type: ignore[index]
