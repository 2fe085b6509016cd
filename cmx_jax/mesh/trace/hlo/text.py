"""HLO text as computations and instructions; what they mean is for others.

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
BRACKETS = re.compile(r"[()\[\]{},]")
COMMENT = re.compile(r"/\*.*?\*/")
CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations)=(\{[^}]*\}|%?[^\s,})]+)"
)
LONG = {"s": "int", "u": "uint", "f": "float", "bf": "bfloat", "c": "complex"}

Array = tuple[str, tuple[int, ...]]  # NumPy's name of a type, and a shape


@dataclass(slots=True, eq=False)
class Instruction:
    """`name = type op(rest`, in computation `home`."""

    name: str
    type: str
    op: str
    rest: str
    home: "Computation"

    def operands(self) -> list[str]:
        """Names of what it is given; the literal of a constant, the number of a parameter."""
        depth, start, found = 0, 0, []
        for match in BRACKETS.finditer(self.rest):
            mark = match.group()
            if mark in "([{":
                depth += 1
            elif depth and mark != ",":
                depth -= 1
            elif not depth:
                words = COMMENT.sub("", self.rest[start : match.start()]).split()  # a type may come first
                found += [words[-1].removeprefix("%")] if words else []
                start = match.end()
                if mark != ",":
                    break
        return found

    def operand(self, number: int) -> "Instruction":
        """The instruction that makes an operand."""
        names = self.operands()
        if number >= len(names) or names[number] not in self.home.instructions:
            missing = names[number] if number < len(names) else f"operand {number}"
            raise CmxError(f"HLO text: {missing} of {self.name} is not in {self.home.name}: part is lost")
        return self.home.instructions[names[number]]

    def attributes(self) -> str:
        """Operands and what follows them, without what people and backends add, which may hold any text."""
        cuts = [at for key in (", metadata={", ", backend_config=") if (at := self.rest.find(key)) >= 0]
        return self.rest[: min(cuts)] if cuts else self.rest

    def attribute(self, pattern: str) -> str | None:
        """What the first group of a pattern found."""
        found = re.search(pattern, self.attributes())
        return found.group(1) if found else None

    def op_name(self) -> str:
        """What JAX calls it."""
        name = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', self.rest)
        return name.group(1) if name else ""

    def called(self) -> dict[str, list[str]]:
        """Computations that it calls, by what for."""
        found = CALLED.findall(self.attributes())
        return {key: [name.strip(" %{}") for name in names.split(",")] for key, names in found}


@dataclass(slots=True, eq=False)
class Computation:
    """Instructions by name; `root` is the one marked so, or the last; `notable` are of the ops asked for."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None
    notable: list[Instruction] = field(default_factory=list)

    def result(self) -> Instruction:
        if not self.root:
            raise CmxError(f"HLO text: computation {self.name} is empty: part of the text is lost")
        return self.root


@dataclass(slots=True, eq=False)
class Module:
    """A program: what its first line says, its computations by name, and the one that it starts with."""

    header: str
    computations: dict[str, Computation]
    entry: Computation

    def computation(self, name: str) -> Computation:
        if name not in self.computations:
            raise CmxError(f"HLO text: computation {name} is called but not there: part of the text is lost")
        return self.computations[name]


def read_module(text: str, notable: frozenset[str]) -> Module:
    """Text to computations.

    Args:
      text: HLO as `compiled.as_text()` or a dump has it.
      notable: ops whose instructions are listed in `Computation.notable`.

    Raises:
      CmxError: it is not HLO text, or cut short.
    """
    if not (begin := re.match(r"(?:\s|//.*\n)*HloModule.*", text)):
        raise CmxError(f"no HLO text: expected 'HloModule ...' at its start, found {_looks_like(text)}")
    computations: dict[str, Computation] = {}
    entry = home = last = None
    for at, end in _lines(text, begin.end()):
        if home is None:
            if head := HEAD.match(text, at, end):
                home = computations[head.group(2)] = Computation(head.group(2))
                entry = home if head.group(1) else entry
        elif found := INSTRUCTION.match(text, at, end):
            root, name, type_, op = found.groups()
            last = Instruction(name, type_, op, text[found.end() : end], home)
            home.instructions[name] = last
            if root:
                home.root = last
            if op in notable:
                home.notable.append(last)
        elif END.match(text, at, end):
            home.root = home.root or last
            home = last = None
        elif last and last.op != "constant" and not text.startswith("//", at):
            last.rest += text[at:end]  # written by hand, over several lines
    if home:
        raise CmxError(f"HLO text: computation {home.name} has no end: the text is cut short")
    if not entry:
        raise CmxError(f"HLO text: none of {len(computations)} computations is ENTRY: the text is cut short")
    return Module(begin.group().strip(), computations, entry)


@contextmanager
def reading(instruction: Instruction) -> Iterator[None]:
    """Says which instruction it is that cannot be understood.

    Raises:
      CmxError: it could not.
    """
    try:
        yield
    except CmxError:
        raise
    except (LookupError, TypeError, ValueError, ZeroDivisionError):
        line = f"{instruction.name} = {instruction.type} {instruction.op}({instruction.rest}"
        raise CmxError(f"HLO text: no sense in {line[:90]!r}: damaged, or of an unknown form") from None


def _lines(text: str, at: int) -> Iterator[tuple[int, int]]:
    """Where lines begin and end: no copy of a text of hundreds of MB."""
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        yield at, end
        at = end + 1


def _looks_like(text: str) -> str:
    start = text[:4096].lstrip()
    if not start:
        return "nothing"
    if "stablehlo." in text[:65536] or re.match(r"(module|func\.func|#\w+ = )", start):
        return "StableHLO (MLIR), which is not compiled yet: give compiled.as_text()"
    if start[0] in "{[":
        return "JSON"
    return repr(start.splitlines()[0][:40])


def arrays(type_: str) -> list[Array]:
    """The arrays of a type, tuples flattened; dynamic sizes at their bound."""
    found = ARRAY.findall(type_)
    return [
        (numpy_dtype(dtype), tuple(map(int, re.findall(r"\d+", sizes))))
        for dtype, sizes in found
        if dtype not in ("token", "opaque")
    ]


@cache
def numpy_dtype(name: str) -> str:
    """HLO's name of a type to NumPy's: `bf16` to `bfloat16`, `f8e4m3fn` to `float8_e4m3fn`."""
    if name == "pred":
        return "bool"
    try:
        kind, bits, rest = re.fullmatch(r"([a-z]+)(\d+)(\w*)", name).groups()  # type: ignore[union-attr]
        return jnp.dtype(f"{LONG[kind]}{bits}{'_' if rest else ''}{rest}").name
    except (AttributeError, KeyError, TypeError):
        raise CmxError(f"HLO text: unknown type {name}") from None
