"""What one collective instruction of HLO moves, and among whom."""

import math

from cmx_jax.mesh.trace.hlo.groups import (
    Groups,
    Machine,
    axes_of_groups,
    axes_of_pairs,
    connected,
    groups_of,
    pairs_of,
)
from cmx_jax.mesh.trace.hlo.text import Array, Instruction, arrays
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.scope import scopes

COLLECTIVES = {
    "all-to-all": "all_to_all",
    "all-gather": "all_gather",
    "all-reduce": "all_reduce",
    "reduce-scatter": "reduce_scatter",
    "collective-permute": "permute",
    "collective-broadcast": "broadcast",
    "ragged-all-to-all": "ragged_all_to_all",
}


def collectives_of(instruction: Instruction, machine: Machine, op_name: str) -> list[Collective]:
    """One for each type of operand, executed once."""
    op = COLLECTIVES[instruction.op.removesuffix("-start")]
    if op == "all_reduce" and instruction.home.name.startswith("all-reduce-scatter"):
        op = "reduce_scatter"  # how TPU writes it: a fusion that sums, and keeps its own part
    share, pairs = 1.0, None
    if op == "permute":
        pairs = pairs_of(instruction, machine)
        groups, axes = connected(pairs), axes_of_pairs(pairs, machine.axes)
        share = sum(source != target for source, target in pairs) / max(
            machine.devices, sum(map(len, groups))
        )
        size = math.prod(n for name, n in machine.axes if name in axes) if axes else _largest(groups)
    else:
        groups = groups_of(instruction, machine)
        axes, size = axes_of_groups(groups, machine.axes), _largest(groups)
    by_type: dict[str, list[tuple[int, ...]]] = {}
    for dtype, shape in _operands(op, instruction):
        by_type.setdefault(dtype, []).append(shape)
    scope = scopes(op_name)
    return [
        Collective(op, axes, size, dtype, _together(shapes), 1, scope, share, groups, pairs)
        for dtype, shapes in by_type.items()
    ]


def starts_here(instruction: Instruction) -> bool:
    """TPU spreads a collective over several fusions, each of which names it: the first starts it."""
    if '"async_collective_fusion_config"' not in instruction.rest:
        return True
    return any('"AsyncCollectiveStart"' in other.rest for other in instruction.home.notable)


def _largest(groups: Groups) -> int:
    return max(map(len, groups), default=1)


def _operands(op: str, instruction: Instruction) -> list[Array]:
    """What a rank sends from. The results of a start would be operands and results."""
    first = arrays(instruction.operand(0).type)
    if op == "ragged_all_to_all":  # the others: where to, and how much
        return first
    parts = instruction.attribute(r"slice_sizes=\{(\{.*?\})\}")
    if op == "permute" and parts:  # the others: a buffer for the result, and where parts are in both
        sizes = [part.split(",") for part in parts.strip("{}").split("},{")]
        return [(first[0][0], tuple(map(int, size))) for size in sizes]
    return [
        a for number in range(len(instruction.operands())) for a in arrays(instruction.operand(number).type)
    ]


def _together(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    first, *others = shapes
    if not others:
        return first
    return (len(shapes), *first) if set(others) == {first} else (sum(map(math.prod, shapes)),)
