"""The documents of the example tasks, read from beside them."""

from pathlib import Path
from typing import Any


def load(**_: Any) -> Any:
    """A dataset with one split, `test`: prompt, choices, and the right one's index."""
    import json

    from datasets import Dataset, DatasetDict

    text = (Path(__file__).parent / "documents.jsonl").read_text(encoding="utf-8")
    return DatasetDict({"test": Dataset.from_list([json.loads(line) for line in text.splitlines()])})
