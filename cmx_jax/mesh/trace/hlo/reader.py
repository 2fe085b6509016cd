"""Reads collectives and products of a compiled program from its optimised HLO.

HLO is the compiler's output for one target: it combines, splits, moves and widens collectives (CPU sends
bfloat16 as float32, for example). The program's jaxpr has them as written.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cmx_jax.mesh.groups import Axes
from cmx_jax.mesh.trace.hlo.collectives import COLLECTIVES, collectives_of, starts_here
from cmx_jax.mesh.trace.hlo.loops import Loops
from cmx_jax.mesh.trace.hlo.parser import Computation, Instruction, read_module, reading
from cmx_jax.mesh.trace.hlo.products import PRODUCTS, product_of
from cmx_jax.mesh.trace.hlo.replica_groups import Machine
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import Product
from cmx_jax.mesh.trace.ops.custom_calls import is_plain

CALLS = frozenset(("while", "conditional", "call", "fusion", "async", "custom-call"))
STARTED = {f"{op}-start" for op in (*COLLECTIVES, *CALLS)}
DONE = {op.replace("-start", "-done") for op in STARTED}
NOTABLE = frozenset((*COLLECTIVES, *CALLS, *STARTED, *DONE, *PRODUCTS, "send", "ragged-dot"))


@dataclass
class Program:
    """A program as one rank runs it, once.

    Attributes:
      devices: Number of devices that run it together.
      collectives: Collectives in the order in which they start. A collective of several arrays of a type
        (combined all-reduces, an all-to-all with an operand for each peer) has one shape for all of them:
        `(N, *shape)`, or `(elements,)` where shapes differ. Arrays of several types are a collective each.
      products: Matrix products and convolutions.
      notes: Sentences on what the collectives and products do not include.
    """

    devices: int
    collectives: list[Collective]
    products: list[Product]
    notes: list[str]

    @property
    def flops(self) -> dict[str, int]:
        """Operations of products by the type of their inputs, loops counted, without data-dependent ones."""
        return self._flops(lambda product: product.count or 0)

    @property
    def flops_once(self) -> dict[str, int]:
        """Operations of data-dependent products by type, each loop body and branch counted once."""
        return self._flops(lambda product: product.known if product.count is None else 0)

    def _flops(self, times: Callable[[Product], int]) -> dict[str, int]:
        total: Counter[str] = Counter()
        for product in self.products:
            total[product.dtype] += product.flops * times(product)
        return {dtype: flops for dtype, flops in total.items() if flops}


Content = dict[Instruction, tuple[int | None, int]]
"""Collectives and products in one execution of a computation and of all that it calls.

The values are the number of executions (None: data decide), and that number if all data-dependent loops and
branches ran once."""


def add(content: Content, other: Content, times: int | None) -> None:
    """Adds to `content` what runs `times` times (None: data decide)."""
    for instruction, (count, known) in other.items():
        before, known_before = content.get(instruction, (0, 0))
        unknown = before is None or count is None or times is None
        total = None if unknown else before + count * times  # type: ignore[operator]
        content[instruction] = total, known_before + known * (1 if times is None else times)


def read_hlo(text: str, *meshes: Axes) -> Program:
    """Reads the collectives and products of optimised HLO.

    Args:
      text: Text of the program: `compiled.as_text()`, or a dump of it.
      meshes: Names and sizes of the axes of each mesh, outermost first; a device's number is its position in
        the mesh, row-major. The axes of a collective are those of the first mesh that has its groups.

    Raises:
      CmxError: The text is not optimised HLO, or is cut short.

    Example:
      >>> import jax
      >>> compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), "float32")).compile()
      >>> read_hlo(compiled.as_text()).flops
      {'float32': 524288}
    """
    return _Reader(text, meshes).program()


def _started(instruction: Instruction) -> Instruction:
    """Returns the instruction that a `-done` awaits, past its updates."""
    while instruction.op.endswith(("-done", "-update")):
        instruction = instruction.operand(0)
    return instruction


class _Reader:
    def __init__(self, text: str, meshes: tuple[Axes, ...]):
        self.module = read_module(text, NOTABLE)
        self.notes: list[str] = []
        self.machine = self._machine(meshes)
        self.contents: dict[str, Content] = {}
        self.callers: dict[str, list[Instruction]] = {}
        for computation in self.module.computations.values():
            for instruction in computation.notable:
                if instruction.op.removesuffix("-start") in CALLS:
                    for name in itertools.chain(*instruction.called().values()):
                        self.callers.setdefault(name, []).append(instruction)
        self.loops = Loops(self.module, self.callers)
        self.starts: dict[Instruction, Instruction] = {}  # of collectives inside `async` computations

    def _machine(self, meshes: tuple[Axes, ...]) -> Machine:
        replicas, partitions = (
            int(re.findall(rf"\b{key}=(\d+)", self.module.header + f" {key}=1")[0])
            for key in ("replica_count", "num_partitions")
        )
        devices, fitting, largest = replicas * partitions, [], 1
        for axes in filter(None, meshes):
            ranks = math.prod(size for _, size in axes)
            if devices not in (1, ranks):
                self.notes.append(f"for {devices} devices, but the mesh has {ranks}: axes are unknown")
            else:
                fitting.append(axes)
                largest = max(largest, ranks)
        return Machine(replicas, partitions, max(devices, largest), tuple(fitting))

    def program(self) -> Program:
        collectives: list[Collective] = []
        products: list[Product] = []
        content = self.content(self.module.entry)
        awaited = {_started(i): position for position, i in enumerate(content) if i.op in DONE}
        for position, (instruction, (count, known)) in enumerate(content.items()):
            for one in self._described(instruction):
                one = replace(one, count=count, known=known, position=position)
                if isinstance(one, Collective):
                    awaited_at = awaited.get(self.starts.get(instruction, instruction))
                    collectives.append(replace(one, awaited_at=awaited_at))
                else:
                    products.append(one)
        self._note_uncounted()
        return Program(self.machine.devices, collectives, products, self.notes)

    def content(self, computation: Computation) -> Content:
        """Returns the content of a computation; each is read once, bottom up."""
        if computation.name in self.contents:
            return self.contents[computation.name]
        content: Content = {}
        self.contents[computation.name] = content
        for instruction in computation.notable:
            with reading(instruction):
                self._add(content, instruction)
        return content

    def _add(self, content: Content, instruction: Instruction) -> None:
        op = instruction.op.removesuffix("-start")
        if op == "while":
            self._add_loop(content, instruction)
        elif op == "conditional":
            self._add_branches(content, instruction)
        elif instruction.op in DONE:
            content[instruction] = 1, 1
        elif op in CALLS or "calls" in instruction.called():
            # nothing tells how often a custom call calls
            times = None if op == "custom-call" else 1
            for key in ("calls", "called_computations") if op != "call" else ("to_apply",):
                for name in instruction.called().get(key, []):
                    inner = self.content(self.module.computation(name))
                    add(content, inner, times)
                    if op == "async":
                        self.starts |= dict.fromkeys(inner, instruction)
        elif op in PRODUCTS or (op in COLLECTIVES and starts_here(instruction)):
            content[instruction] = 1, 1

    def _add_loop(self, content: Content, loop: Instruction) -> None:
        called = loop.called()
        condition, body = (
            self.content(self.module.computation(called.get(key, [f"{key} of {loop.name}"])[0]))
            for key in ("condition", "body")
        )
        if condition or body:
            count = self.loops.trip_count(loop)
            if count is None:
                self.notes.append(f"loop {loop.name}: unknown how often it runs, data decide")
            add(content, body, count)
            add(content, condition, None if count is None else count + 1)

    def _add_branches(self, content: Content, choice: Instruction) -> None:
        """Adds the branches of a condition; what they do not all have in the same way is data-dependent.

        Collectives and products are compared separately: if all branches have the same ones, these are added
        once with their counts, otherwise those of every branch are added with count None.
        """
        called = choice.called()
        names = called.get("branch_computations") or [
            name for key in ("true_computation", "false_computation") for name in called.get(key, [])
        ]
        branches = [self.content(self.module.computation(name)) for name in names]
        for kind, computes in (("collectives", False), ("products", True)):
            parts = [{i: runs for i, runs in b.items() if (i.op in PRODUCTS) == computes} for b in branches]
            same = all(self._facts(part) == self._facts(parts[0]) for part in parts)
            for part in parts[:1] if same else parts:
                add(content, part, 1 if same else None)
            if not same:
                self.notes.append(f"branches of {choice.name}: data decide which {kind} run")

    def _facts(self, content: Content) -> Counter[tuple]:
        """Returns the facts by which branches are compared."""
        return Counter(
            (replace(one, scope=""), runs) for i, runs in content.items() for one in self._described(i)
        )

    def _described(self, instruction: Instruction) -> Sequence[Collective | Product]:
        with reading(instruction):
            if instruction.op in DONE:
                return []
            if instruction.op in PRODUCTS:
                return [product_of(instruction)]
            # in a computation of its own a collective may have no name, but its caller has one
            named = (instruction, *self.callers.get(instruction.home.name, []))
            return collectives_of(
                instruction, self.machine, next(filter(None, (i.op_name() for i in named)), "")
            )

    def _note_uncounted(self) -> None:
        """Adds notes on instructions whose products and messages are not counted."""
        uncounted: Counter[str] = Counter()
        for computation in self.module.computations.values():
            for instruction in computation.notable:
                if instruction.op in ("send", "ragged-dot") or instruction.op not in NOTABLE:
                    uncounted[instruction.op] += 1
                elif instruction.op == "custom-call":
                    target = instruction.attribute(r'custom_call_target="([^"]*)"') or "?"
                    uncounted[f"custom call {target}"] += not is_plain(target)
        for name, count in uncounted.items():
            if count:
                self.notes.append(f"{count} x {name}: what it computes and sends is not counted")
