"""English about Python that every Python installation carries: the text the tiny model is trained on.

`pydoc_data.topics` and the docstrings of the standard library, one document a topic or docstring. No
download; the corpus is that of the running Python, and its sha256 is part of the training report.
"""

import ast
import hashlib
import inspect
import json
import pydoc_data.topics
import sys
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "turtledemo"}
HELD_OUT_PERCENT = 4


def documents() -> list[str]:
    """All documents, in an order that depends on their names only."""
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
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if len(text) > 40:
                found.append(f"{module}.{getattr(node, 'name', '')}".rstrip(".") + f"\n\n{text}")
    return found


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Train and held-out documents, chosen by the hash of their text."""

    def held_out(text: str) -> bool:
        return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT

    return [t for t in texts if not held_out(t)], [t for t in texts if held_out(t)]


def fingerprint(texts: list[str]) -> str:
    """sha256 over all documents."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every string round-trips, no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


if __name__ == "__main__":  # python scripts/tiny_corpus.py > corpus.json: to train elsewhere on the same text
    json.dump(documents(), sys.stdout)
