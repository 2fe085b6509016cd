"""Parses HLO text into computations and instructions; other files interpret them.

Optimised HLO has one instruction a line:

    %sum (p: f32[8]) -> f32[8] {
      %p = f32[8]{0} parameter(0)
      ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
    }
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import jax.numpy as jnp

from cmx_jax.errors import CmxError

HEAD = re.compile(r"\s*(ENTRY )?\s*%?([^\s({]+)\s*(?:\(.*)?\{\s*$")
INSTRUCTION = re.compile(r"\s*(ROOT )?\s*%?([^\s=]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(")
END = re.compile(r"\s*\}(?:, execution_thread=.*)?\s*$")
ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
GROUPS_OF_RANKS = re.compile(r", (?:replica_groups|source_target_pairs)=")
BRACKETS = re.compile(r"[()\[\]{},]")
COMMENT = re.compile(r"/\*.*?\*/")
CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations)=(\{[^}]*\}|%?[^\s,})]+)"
)
LONG = {"s": "int", "u": "uint", "f": "float", "bf": "bfloat", "c": "complex"}

Array = tuple[str, tuple[int, ...]]  # type by NumPy's name, and shape


@dataclass(slots=True, eq=False)
class Instruction:
    """One instruction: `name = type op(rest`, in computation `home`."""

    name: str
    type: str
    op: str
    rest: str
    home: "Computation"

    def operands(self) -> list[str]:
        """Returns the names of the operands; the literal of a constant, the number of a parameter."""
        depth, start, names = 0, 0, []
        for match in BRACKETS.finditer(self.rest):
            mark = match.group()
            if mark in "([{":
                depth += 1
            elif depth and mark != ",":
                depth -= 1
            elif not depth:
                words = COMMENT.sub("", self.rest[start : match.start()]).split()  # a type may come first
                names += [words[-1].removeprefix("%")] if words else []
                start = match.end()
                if mark != ",":
                    break
        return names

    def operand(self, number: int) -> "Instruction":
        """Returns the instruction that produces an operand."""
        names = self.operands()
        if number >= len(names) or names[number] not in self.home.instructions:
            missing = names[number] if number < len(names) else f"operand {number}"
            raise CmxError(
                f"HLO text: {missing} of {self.name} is not in {self.home.name}: part of the text is lost"
            )
        return self.home.instructions[names[number]]

    def attributes(self) -> str:
        """Returns operands and attributes, without metadata and backend config, which may hold any text."""
        cuts = [cut for key in (", metadata={", ", backend_config=") if (cut := self.rest.find(key)) >= 0]
        return self.rest[: min(cuts)] if cuts else self.rest

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a pattern's match among the attributes; None without a match."""
        match = re.search(pattern, self.attributes())
        return match.group(1) if match else None

    def op_name(self) -> str:
        """Returns JAX's name of the operation; '' if it has none."""
        name = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', self.rest)
        return name.group(1) if name else ""

    def called(self) -> dict[str, list[str]]:
        """Returns the names of the computations that it calls, by attribute such as `body`."""
        matches = CALLED.findall(self.attributes())
        return {key: [name.strip(" %{}") for name in names.split(",")] for key, names in matches}


@dataclass(slots=True, eq=False)
class Computation:
    """One computation.

    Attributes:
      name: Name of the computation.
      instructions: Instructions by name, in order.
      root: Instruction marked as ROOT, or the last one.
      notable: Instructions of the ops that `read_module` was asked to list, and all others that name groups
        of ranks.
    """

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None
    notable: list[Instruction] = field(default_factory=list)

    def result(self) -> Instruction:
        """Returns the root."""
        if not self.root:
            raise CmxError(f"HLO text: computation {self.name} is empty: part of the text is lost")
        return self.root


@dataclass(slots=True, eq=False)
class Module:
    """A program.

    Attributes:
      header: First line, with the number of replicas and partitions.
      computations: Computations by name.
      entry: Computation that the program starts with.
    """

    header: str
    computations: dict[str, Computation]
    entry: Computation

    def computation(self, name: str) -> Computation:
        """Returns a computation by name."""
        if name not in self.computations:
            raise CmxError(f"HLO text: computation {name} is called but missing: part of the text is lost")
        return self.computations[name]


def read_module(text: str, notable: frozenset[str]) -> Module:
    """Parses HLO text.

    Args:
      text: HLO of `compiled.as_text()` or of a dump.
      notable: Ops whose instructions are listed in `Computation.notable`.

    Raises:
      CmxError: The text is not HLO, or is cut short.
    """
    if not (begin := re.match(r"(?:\s|//.*\n)*HloModule.*", text)):
        raise CmxError(f"no HLO text: expected 'HloModule ...' at its start, found {_looks_like(text)}")
    computations: dict[str, Computation] = {}
    entry = home = last = None
    for start, end in _lines(text, begin.end()):
        if home is None:
            if head := HEAD.match(text, start, end):
                home = computations[head.group(2)] = Computation(head.group(2))
                entry = home if head.group(1) else entry
        elif match := INSTRUCTION.match(text, start, end):
            root, name, type_, op = match.groups()
            last = Instruction(name, type_, op, text[match.end() : end], home)
            home.instructions[name] = last
            if root:
                home.root = last
            if op in notable or GROUPS_OF_RANKS.search(text, match.end(), end):
                home.notable.append(last)
        elif END.match(text, start, end):
            home.root = home.root or last
            home = last = None
        elif last and last.op != "constant" and not text.startswith("//", start):
            last.rest += text[start:end]  # an instruction over several lines, written by hand
    if home:
        raise CmxError(f"HLO text: computation {home.name} has no end: the text is cut short")
    if not entry:
        raise CmxError(f"HLO text: none of {len(computations)} computations is ENTRY: the text is cut short")
    return Module(begin.group().strip(), computations, entry)


@contextmanager
def reading(instruction: Instruction) -> Iterator[None]:
    """Turns errors of the block into one that names the instruction.

    Raises:
      CmxError: The block could not interpret the instruction.
    """
    try:
        yield
    except CmxError:
        raise
    except (LookupError, TypeError, ValueError, ZeroDivisionError):
        line = f"{instruction.name} = {instruction.type} {instruction.op}({instruction.rest}"
        raise CmxError(f"HLO text: {line[:90]!r} is not understood: damaged, or of an unknown form") from None


def _lines(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Yields the start and end of each line: a text may have hundreds of MB and is not copied."""
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield start, end
        start = end + 1


def _looks_like(text: str) -> str:
    """Describes the beginning of a text that is not HLO."""
    start = text[:4096].lstrip()
    if not start:
        return "nothing"
    if "stablehlo." in text[:65536] or re.match(r"(module|func\.func|#\w+ = )", start):
        return "StableHLO (MLIR), which is not compiled yet: give compiled.as_text()"
    if start[0] in "{[":
        return "JSON"
    return repr(start.splitlines()[0][:40])


def arrays(type_: str) -> list[Array]:
    """Returns the arrays of a type, tuples flattened; dynamic sizes are their bounds."""
    return [
        (numpy_dtype(dtype), tuple(map(int, re.findall(r"\d+", sizes))))
        for dtype, sizes in ARRAY.findall(type_)
        if dtype not in ("token", "opaque")
    ]


@cache
def numpy_dtype(name: str) -> str:
    """Returns NumPy's name of a type of HLO: `bfloat16` for `bf16`, `float8_e4m3fn` for `f8e4m3fn`."""
    if name == "pred":
        return "bool"
    try:
        kind, bits, rest = re.fullmatch(r"([a-z]+)(\d+)(\w*)", name).groups()  # type: ignore[union-attr]
        return jnp.dtype(f"{LONG[kind]}{bits}{'_' if rest else ''}{rest}").name
    except (AttributeError, KeyError, TypeError):
        raise CmxError(f"HLO text: unknown type {name}") from None
