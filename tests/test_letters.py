"""Letters in the shapes of arrays: all of them are in the table of `cmx_jax.model`."""

import ast
import re
from pathlib import Path

import cmx_jax
import cmx_jax.model

TYPES = {"Array", "Bool", "Float", "Float32", "Float64", "Int", "Int8", "Shaped"}
TABLE = re.findall(
    r"(?:^|  +)(\w)  (?=\w)", (cmx_jax.model.__doc__ or "").partition(":\n\n")[2], re.MULTILINE
)
FILES = sorted(Path(cmx_jax.__path__[0]).rglob("*.py"))


def letters(source: str) -> set[str]:
    """Single letters in the jaxtyping shapes of a file; other axes have words or numbers."""
    shapes = [
        node.slice.elts[1].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id in TYPES
        and isinstance(node.slice, ast.Tuple)
        and isinstance(node.slice.elts[1], ast.Constant)
    ]
    axes = {axis.lstrip("*#") for shape in shapes for axis in str(shape).split()}
    return {axis for axis in axes if len(axis) == 1 and axis.isalpha()}


def test_table_gives_each_letter_one_meaning() -> None:
    assert len(TABLE) == len(set(TABLE)) > 20


def test_letters_in_shapes_are_in_the_table() -> None:
    unknown = {str(path): letters(path.read_text()) - set(TABLE) for path in FILES}
    assert {name: axes for name, axes in unknown.items() if axes} == {}


def test_letters_are_read_from_annotations() -> None:
    source = 'def f(x: Float[Array, "*B T"], y: Int[np.ndarray, "pages #k 4"]) -> Bool[Array, ""]: ...'
    assert letters(source) == {"B", "T", "k"}
