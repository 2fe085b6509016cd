"""English about Python that every Python installation carries: training and held-out text of `tiny`.

`pydoc_data.topics` and the docstrings of the standard library, one document per topic or docstring.
Nothing is downloaded; the corpus depends on the running Python.
"""

import ast
import hashlib
import inspect
import pydoc_data.topics
import sysconfig
from pathlib import Path

SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "turtledemo"}
HELD_OUT_PERCENT = 4


def documents() -> list[str]:
    """All documents, in an order that depends only on their names."""
    texts = [f"{name}\n\n{text}" for name, text in sorted(pydoc_data.topics.topics.items())]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            texts.extend(_docstrings(path, root))
    return texts


def _docstrings(path: Path, root: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if len(text) > 40:
                texts.append(f"{module}.{getattr(node, 'name', '')}".rstrip(".") + f"\n\n{text}")
    return texts


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Splits documents into training and held-out ones, by the hash of their text."""

    def held_out(text: str) -> bool:
        return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT

    return [t for t in texts if not held_out(t)], [t for t in texts if held_out(t)]


def fingerprint(texts: list[str]) -> str:
    """SHA-256 of all documents."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
