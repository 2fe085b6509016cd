"""Reads one collective instruction of HLO: its operands, and the ranks that take part."""

import math

from cmx_jax.mesh.trace.hlo.parser import Array, Instruction, arrays
from cmx_jax.mesh.trace.hlo.replica_groups import (
    Machine,
    axes_of_groups,
    axes_of_pairs,
    connected,
    first_axes,
    groups_of,
    largest,
    pairs_of,
    share_in_groups,
)
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
    """Returns a collective for each type of operand, executed once.

    Args:
      instruction: Collective instruction.
      machine: Replicas, partitions and mesh axes of the program.
      op_name: Name that JAX gives the operation; its scope is read from it.
    """
    op = COLLECTIVES[instruction.op.removesuffix("-start")]
    if op == "all_reduce" and instruction.home.name.startswith("all-reduce-scatter"):
        op = "reduce_scatter"  # on TPU: a fusion that sums and keeps its own part
    share, pairs = 1.0, None
    if op == "permute":
        pairs = pairs_of(instruction, machine)
        groups, axes = connected(pairs), first_axes(axes_of_pairs, pairs, machine.meshes)
        share = sum(source != target for source, target in pairs) / max(
            machine.devices, sum(map(len, groups))
        )
        size = machine.size_of(axes) if axes else largest(groups)
    else:
        groups = groups_of(instruction, machine)
        axes, size = first_axes(axes_of_groups, groups, machine.meshes), largest(groups)
        share = share_in_groups(groups, machine.devices)
    by_type: dict[str, list[tuple[int, ...]]] = {}
    for dtype, shape in _operands(op, instruction):
        by_type.setdefault(dtype, []).append(shape)
    scope = scopes(op_name)
    return [
        Collective(
            op=op,
            axes=axes,
            group_size=size,
            dtype=dtype,
            shape=_combined(shapes),
            count=1,
            scope=scope,
            share=share,
            groups=groups,
            pairs=pairs,
        )
        for dtype, shapes in by_type.items()
    ]


def starts_here(instruction: Instruction) -> bool:
    """Returns whether an instruction starts its collective.

    TPU spreads a collective over several fusions, each of which names it; the first one starts it.
    """
    if '"async_collective_fusion_config"' not in instruction.rest:
        return True
    return any('"AsyncCollectiveStart"' in sibling.rest for sibling in instruction.home.notable)


def _operands(op: str, instruction: Instruction) -> list[Array]:
    """Returns the arrays that a rank sends.

    They are read from the operands: the type of a `-start` has operands and results.
    """
    first = arrays(instruction.operand(0).type)
    if op == "ragged_all_to_all":  # the other operands: result buffer, offsets and sizes
        return first
    parts = instruction.attribute(r"slice_sizes=\{(\{.*?\})\}")
    if op == "permute" and parts:  # the other operands: result buffer, offsets in both
        sizes = [part.split(",") for part in parts.strip("{}").split("},{")]
        return [(first[0][0], tuple(map(int, size))) for size in sizes]
    return [
        a for number in range(len(instruction.operands())) for a in arrays(instruction.operand(number).type)
    ]


def _combined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns one shape for several arrays: `(N, *shape)`, or `(elements,)` where shapes differ."""
    if len(shapes) == 1:
        return shapes[0]
    return (len(shapes), *shapes[0]) if len(set(shapes)) == 1 else (sum(map(math.prod, shapes)),)
