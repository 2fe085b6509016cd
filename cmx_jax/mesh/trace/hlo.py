"""Collectives and FLOPs of a compiled program, read from its optimised HLO.

This is what the compiler made of a program for one target: it combines, splits, moves and widens collectives
(CPU sends bfloat16 as float32, for example). The program's jaxpr has what was asked for.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace

from cmx_jax.mesh.trace.collective import Collective
from cmx_jax.mesh.trace.hlo_collectives import COLLECTIVES, collectives_of, starts_here
from cmx_jax.mesh.trace.hlo_flops import PRODUCTS, flops_of
from cmx_jax.mesh.trace.hlo_groups import Axes, Machine
from cmx_jax.mesh.trace.hlo_loops import Loops
from cmx_jax.mesh.trace.hlo_text import Computation, Instruction, read_module, reading

CALLS = frozenset(("while", "conditional", "call", "fusion", "async", "custom-call"))
STARTED = {f"{op}-start" for op in (*COLLECTIVES, *CALLS)}
NOTABLE = frozenset((*COLLECTIVES, *CALLS, *STARTED, *PRODUCTS, "send", "ragged-dot"))
# what places data, chooses among them or marks a collective's parts, but computes and sends nothing
PLAIN_CUSTOM_CALLS = (
    "Sharding",
    "SPMD",
    "xla.sdy.",
    "AsyncCollective",
    "AllocateBuffer",
    "MoveTo",
    "annotate_device_placement",
    "TopK",
)


@dataclass
class Program:
    """A program as one rank runs it, once.

    Attributes:
      devices: that run it together.
      collectives: in the order in which they are started. One that moves several arrays of a type (combined
        all-reduces, an all-to-all with an operand for each peer) is one with all of them: `(N, *shape)`, or
        `(elements,)` where shapes differ; arrays of several types are one each.
      flops: of matrix products and convolutions by their inputs' type, loops counted.
      flops_once: of those whose number of executions is unknown, as if they ran once.
      notes: what these numbers do not know.
    """

    devices: int
    collectives: list[Collective]
    flops: dict[str, int]
    flops_once: dict[str, int]
    notes: list[str]


@dataclass
class Content:
    """What one execution of a computation runs, with all that it calls; None: unknown how often."""

    runs: dict[Instruction, int | None] = field(default_factory=dict)
    flops: Counter[str] = field(default_factory=Counter)
    once: Counter[str] = field(default_factory=Counter)

    def __bool__(self) -> bool:
        return bool(self.runs or self.flops or self.once)

    def add(self, other: "Content", times: int | None) -> None:
        for instruction, count in other.runs.items():
            before = self.runs.get(instruction, 0)
            unknown = before is None or count is None or times is None
            self.runs[instruction] = None if unknown else before + count * times  # type: ignore[operator]
        self.once.update(other.once)
        for dtype, flops in other.flops.items():
            if times is None:
                self.once[dtype] += flops
            else:
                self.flops[dtype] += flops * times


def read_hlo(text: str, mesh_axes: Axes | None = None) -> Program:
    """The collectives and FLOPs of optimised HLO.

    Args:
      text: `compiled.as_text()`, or a dump of it.
      mesh_axes: names and sizes, outermost first: a device's number is its place in that mesh, row-major.

    Raises:
      CmxError: it is not optimised HLO, or cut short.
    """
    return _Reader(text, mesh_axes).program()


class _Reader:
    def __init__(self, text: str, mesh_axes: Axes | None):
        self.module = read_module(text, NOTABLE)
        self.notes: list[str] = []
        self.machine = self._machine(mesh_axes or ())
        self.contents: dict[str, Content] = {}
        callers: dict[str, list[Instruction]] = {}
        for computation in self.module.computations.values():
            for instruction in computation.notable:
                if instruction.op.removesuffix("-start") in CALLS:
                    for name in itertools.chain(*instruction.called().values()):
                        callers.setdefault(name, []).append(instruction)
        self.loops = Loops(self.module, callers)

    def _machine(self, axes: Axes) -> Machine:
        replicas, partitions = (
            int(re.findall(rf"\b{key}=(\d+)", self.module.header + f" {key}=1")[0])
            for key in ("replica_count", "num_partitions")
        )
        mesh = math.prod(size for _, size in axes)
        if axes and replicas * partitions not in (1, mesh):
            self.notes.append(
                f"for {replicas * partitions} devices, but the mesh has {mesh}: axes are unknown"
            )
            axes, mesh = (), 1
        return Machine(replicas, partitions, max(replicas * partitions, mesh), axes)

    def program(self) -> Program:
        content = self.content(self.module.entry)
        collectives = [
            replace(collective, count=count)
            for instruction, count in content.runs.items()
            for collective in self._collectives(instruction)
        ]
        self._note_others()
        return Program(self.machine.devices, collectives, dict(content.flops), dict(content.once), self.notes)

    def content(self, computation: Computation) -> Content:
        """Bottom up, each computation once."""
        if computation.name in self.contents:
            return self.contents[computation.name]
        found = self.contents[computation.name] = Content()
        for instruction in computation.notable:
            with reading(instruction):
                self._add(found, instruction)
        return found

    def _add(self, found: Content, instruction: Instruction) -> None:
        op = instruction.op.removesuffix("-start")
        if op in PRODUCTS:
            found.flops.update(dict((flops_of(instruction),)))
        elif op == "while":
            self._add_loop(found, instruction)
        elif op == "conditional":
            self._add_branches(found, instruction)
        elif op in CALLS or "calls" in instruction.called():
            # a custom call decides for itself how often it calls
            times = None if op == "custom-call" else 1
            for key in ("calls", "called_computations") if op != "call" else ("to_apply",):
                for name in instruction.called().get(key, []):
                    found.add(self.content(self.module.computation(name)), times)
        elif op in COLLECTIVES and starts_here(instruction):
            found.runs[instruction] = 1

    def _add_loop(self, found: Content, loop: Instruction) -> None:
        called = loop.called()
        condition, body = (
            self.content(self.module.computation(called.get(key, [f"{key} of {loop.name}"])[0]))
            for key in ("condition", "body")
        )
        if condition or body:
            count = self.loops.trip_count(loop)
            if count is None:
                self.notes.append(f"loop {loop.name}: unknown how often it runs, data decide")
            found.add(body, count)
            found.add(condition, None if count is None else count + 1)

    def _add_branches(self, found: Content, choice: Instruction) -> None:
        called = choice.called()
        names = called.get("branch_computations") or [
            name for key in ("true_computation", "false_computation") for name in called.get(key, [])
        ]
        branches = [self.content(self.module.computation(name)) for name in names]
        first, *others = branches
        if all(self._sent(other) == self._sent(first) for other in others):
            found.add(Content(first.runs), 1)
        else:
            for branch in branches:
                found.add(Content(branch.runs), None)
            self.notes.append(f"branches of {choice.name}: data decide which collectives run")
        if all((other.flops, other.once) == (first.flops, first.once) for other in others):
            found.add(Content({}, first.flops, first.once), 1)
        else:
            most = Counter[str]()
            for branch in branches:
                most |= branch.flops + branch.once
            found.once.update(most)
            self.notes.append(
                f"branches of {choice.name}: data decide which FLOPs run; flops_once has the most"
            )

    def _sent(self, content: Content) -> Counter[tuple[Collective, int | None]]:
        """What branches are compared by."""
        return Counter(
            (replace(collective, scope=""), count)
            for instruction, count in content.runs.items()
            for collective in self._collectives(instruction)
        )

    def _collectives(self, instruction: Instruction) -> list[Collective]:
        with reading(instruction):
            return collectives_of(instruction, self.machine)

    def _note_others(self) -> None:
        others: Counter[str] = Counter()
        for computation in self.module.computations.values():
            for instruction in computation.notable:
                if instruction.op in ("send", "ragged-dot"):
                    others[instruction.op] += 1
                elif instruction.op == "custom-call":
                    target = instruction.attribute(r'custom_call_target="([^"]*)"') or "?"
                    others[f"custom call {target}"] += not target.startswith(PLAIN_CUSTOM_CALLS)
        for name, count in others.items():
            if count:
                self.notes.append(f"{count} x {name}: what it computes and sends is not counted")
