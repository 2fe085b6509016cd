"""Language rules 1 to 3 of CONTRIBUTING.md, held for docstrings, comments and help texts of the package."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cmx_jax

ROOT = Path(cmx_jax.__file__).parent
OPENERS = frozenset(
    [
        "as",
        "at",
        "by",
        "for",
        "from",
        "how",
        "in",
        "likewise",
        "of",
        "on",
        "so",
        "that",
        "to",
        "what",
        "when",
        "where",
        "whether",
        "which",
        "who",
        "whose",
        "why",
        "with",
    ]
)
FRAGMENTS = re.compile(
    r"(?:of|that|whose|what|who|which|whether|how|where|when|why|as|so|see|by|likewise|to|from|with|for|in|on|at|it"
    r"|its|they|those|these|this|all|if|behind|has|have|is|are)\b",
    re.IGNORECASE,
)
DIALECT = re.compile(r"\b(?:behind|anew|whoever|nobody)\b", re.IGNORECASE)
ENTRY = re.compile(r"^ {2}(?:\w[\w, *]*): (\S.*)$", re.MULTILINE)


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def help_texts(tree: ast.Module) -> Iterator[str]:
    """Help texts that are written in place, or in a variable that is used as one."""
    texts = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            if keyword.arg == "help":
                value = keyword.value
                value = texts.get(value.id, value) if isinstance(value, ast.Name) else value
                yield ast.unparse(value).strip("f'\"(")


def violations(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for text in docstrings(tree):
        first = re.match(r"[A-Za-z]+", text)
        if first and first[0].lower() in OPENERS:
            yield f"docstring opens with {first[0]!r}: {text.splitlines()[0]}"
        for entry in ENTRY.findall(text):
            if FRAGMENTS.match(entry):
                yield f"entry is a fragment: {entry}"
        for word in DIALECT.findall(text):
            yield f"{word!r} in: {text.splitlines()[0]}"
    for text in help_texts(tree):
        if FRAGMENTS.match(text) or DIALECT.search(text):
            yield f"help text is a fragment: {text}"


def test_docstrings_and_help_texts_stand_alone() -> None:
    found = {str(path.relative_to(ROOT)): list(violations(path)) for path in sorted(ROOT.rglob("*.py"))}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ('"""Of a rank."""', 1),
        ('"""Sum over ranks.\n\nArgs:\n  x: of a rank.\n"""', 1),
        ('"""Sum over ranks, behind the gate."""', 1),
        ('p.add_argument("--x", help="of a rank")', 1),
        ('about = "that it has"\np.add_argument("--x", help=about)', 1),
        ('"""Returns it.\n\nArgs:\n  x: A part.\n"""\np.add_argument("--x", help="NPUs per rank")', 0),
    ],
)  # fmt: skip
def test_violations_are_found(tmp_path: Path, source: str, lines: int) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert len(list(violations(path))) == lines


def test_test_names_begin_with_a_subject() -> None:
    """A name is `test_<subject>_<condition>`; articles and question words tell a story instead."""
    words = OPENERS | {"a", "an", "the", "no", "neither", "nothing", "it", "one", "every", "each", "any"}
    names = [
        node.name
        for path in Path(__file__).parent.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert [name for name in names if name.split("_")[1] in words] == []
