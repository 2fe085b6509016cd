"""The groups of a collective: HLO's replica groups as devices, and the mesh axes that make such groups.

A device's number is its position in the mesh, row-major. With `P` partitions, replica `r` of partition `p` is
device `r P + p`.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import numpy as np

from cmx_jax.mesh.groups import Axes, Groups, mesh_groups
from cmx_jax.mesh.trace.hlo.parser import Instruction

GROUPS = (
    r"replica_groups=(\{(?:\s*\{[\d,\s]*\},?)*\s*\}"  # {{0,1},{2,3}}
    r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"  # [2,4]<=[8], [4,2]<=[2,4]T(1,0)
    r"|mesh\[.*?\](?:, device_ids=\(.*?\))? \{.*?\})"  # mesh['a'=2,'b'=4] {'b'}
)
PAIRS = r"source_target_pairs=(\{(?:\s*\{[\d,\s]*\},?)*\s*\})"


class Machine(NamedTuple):
    """The devices that a program runs on.

    Attributes:
      replicas: Number of replicas.
      partitions: Number of partitions of each replica.
      devices: Number of devices, by the mesh if the text does not tell.
      meshes: Names and sizes of the axes of each mesh; empty if unknown.
    """

    replicas: int
    partitions: int
    devices: int
    meshes: tuple[Axes, ...]

    def size_of(self, axes: tuple[str, ...]) -> int:
        """Returns the number of ranks along mesh axes of the first mesh that has them all."""
        mesh = next(dict(mesh) for mesh in self.meshes if set(axes) <= {name for name, _ in mesh})
        return math.prod(mesh[name] for name in axes)


def first_axes(
    axes_of: Callable[[Groups, Axes], tuple[str, ...]], groups: Groups, meshes: Iterable[Axes]
) -> tuple[str, ...]:
    """Returns the axes of the first mesh whose axes make these groups, or ()."""
    return next(filter(None, (axes_of(groups, axes) for axes in meshes)), ())


def largest(groups: Groups) -> int:
    """Returns the number of members of the largest group."""
    return max(map(len, groups), default=1)


def share_in_groups(groups: Groups, devices: int) -> float:
    """Returns the share of the devices that are in a group; 1 if the groups have more than are known."""
    members = sum(map(len, groups))
    return members / max(devices, members)


def groups_of(instruction: Instruction, machine: Machine) -> Groups:
    """Returns the devices of each group."""
    groups = read_groups(instruction.attribute(GROUPS) or "{}")
    groups = devices_of(groups, *_ids(instruction), machine.replicas, machine.partitions)
    return groups or (tuple(range(machine.devices)),)


def pairs_of(instruction: Instruction, machine: Machine) -> Groups:
    """Returns the pairs (source, target) of a permute, as devices."""
    pairs = read_groups(instruction.attribute(PAIRS) or "{}")
    return devices_of(pairs, *_ids(instruction), machine.replicas, machine.partitions) if pairs else ()


def _ids(instruction: Instruction) -> tuple[bool, bool | None]:
    """Returns the two attributes by which XLA tells the kind of ids in groups.

    Returns:
      Whether the instruction has a channel, and whether its ids are global (None: this op has no such flag).
    """
    has_flag = re.match(r"all-gather|all-reduce|reduce-scatter", instruction.op)
    ids = instruction.attribute(r"(use_global_device_ids=true)") is not None if has_flag else None
    return instruction.attribute(r"(\bchannel_id=)") is not None, ids


@cache
def devices_of(ids: Groups, channel: bool, global_ids: bool | None, replicas: int, partitions: int) -> Groups:
    """Returns groups of replicas, partitions or devices as groups of devices.

    Args:
      ids: Groups as written in the instruction; empty for one group of all.
      channel: True if the instruction has a channel.
      global_ids: True if its ids are global; None if this op has no such flag.
      replicas: Number of replicas.
      partitions: Number of partitions of each replica.

    Returns:
      Groups of devices; empty if there are no groups and the number of devices is unknown.
    """
    rs, ps = range(replicas), range(partitions)
    if replicas * partitions == 1 or (channel and global_ids):
        return ids or (() if replicas * partitions == 1 else (tuple(range(replicas * partitions)),))
    of_partitions = channel and global_ids is None
    ids = ids or (tuple(ps if of_partitions else rs),)
    if max(map(max, ids)) >= (partitions if of_partitions else replicas):
        return ids  # too large for replicas or partitions: these are devices
    if of_partitions:
        return tuple(tuple(r * partitions + p for p in group) for r in rs for group in ids)
    if channel:
        return tuple(tuple(r * partitions + p for r in group for p in ps) for group in ids)
    return tuple(tuple(r * partitions + p for r in group) for p in ps for group in ids)


@cache
def read_groups(text: str) -> Groups:
    """Reads groups in any of their forms: a list, an iota, or axes of a mesh."""
    if text.startswith("mesh"):
        return _read_mesh(text)
    if text.startswith("["):
        shape, rest = text.split("<=")
        return _rows(_iota(rest).reshape(_numbers(shape)))
    return tuple(_numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", text))


def _iota(text: str) -> np.ndarray:
    """Reads `[2,4]T(1,0)`: the numbers from 0 in that shape, transposed."""
    sizes, _, order = text.partition("T")
    numbers = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return numbers.transpose(_numbers(order)) if order else numbers


def _read_mesh(text: str) -> Groups:
    """Reads `mesh['a'=2,'b'=8] {'a','b':(2)4}`: axes, where `(2)4` is the part of 4 after the first 2."""
    mesh, ids, chosen = re.match(  # type: ignore[union-attr]
        r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}$", text
    ).groups()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    parts = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen)
    ]
    devices = (_iota(ids) if ids.startswith("[") else np.array(_numbers(ids))) if ids else None
    return mesh_groups(sizes, parts, devices)


def _rows(numbers: np.ndarray) -> Groups:
    return tuple(map(tuple, numbers.tolist()))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


@cache
def axes_of_groups(groups: Groups, mesh_axes: Axes) -> tuple[str, ...]:
    """Returns the axes over which a collective has these groups, outermost first; () if there are none."""
    sizes = [size for _, size in mesh_axes]
    if not groups or sum(map(len, groups)) != math.prod(sizes):
        return ()
    chosen = _varying([groups[0]], sizes)
    numbers = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), chosen, range(-len(chosen), 0))
    expected = _rows(numbers.reshape(-1, math.prod(sizes[axis] for axis in chosen)))
    same = set(map(frozenset, expected)) == set(map(frozenset, groups))
    return tuple(mesh_axes[axis][0] for axis in chosen) if same else ()


@cache
def axes_of_pairs(pairs: Groups, mesh_axes: Axes) -> tuple[str, ...]:
    """Returns the axes along which the messages of these pairs travel, outermost first."""
    sizes = [size for _, size in mesh_axes]
    if max(itertools.chain((0,), *pairs)) >= math.prod(sizes):
        return ()
    return tuple(mesh_axes[axis][0] for axis in _varying(pairs, sizes))


def _varying(groups: Groups | list[tuple[int, ...]], sizes: list[int]) -> list[int]:
    """Returns the indices of the axes in which members of some group differ."""
    varying = set()
    for group in groups:
        if max(group) >= math.prod(sizes):
            return []
        positions = np.array(np.unravel_index(np.array(group), sizes)).reshape(len(sizes), -1)
        varying |= set(np.flatnonzero((positions != positions[:, :1]).any(1)).tolist())
    return sorted(varying)


def connected(pairs: Groups) -> Groups:
    """Returns the groups of devices that pairs connect."""
    group_of: dict[int, set[int]] = {}
    for source, target in pairs:
        joined = group_of.get(source, {source}) | group_of.get(target, {target})
        group_of |= dict.fromkeys(joined, joined)
    return tuple(sorted({tuple(sorted(group)) for group in group_of.values()}))
