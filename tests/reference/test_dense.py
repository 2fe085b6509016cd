"""The dense reference against transformers (goldens by scripts/make_goldens.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from reference import dense

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = sorted(
    path.parent.name
    for path in GOLDENS.glob("*/config.json")
    if json.loads(path.read_text())["model_type"] == "deepseek_v3"
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_equal_transformers(case: str, dtype: type) -> None:
    golden = np.load(GOLDENS / case / "golden.npz")
    for length in (1, 7, 40):
        for tokens, expected in zip(golden[f"tokens_{length}"], golden[f"logits_{length}"], strict=True):
            logits = dense.logits(GOLDENS / case, tokens, dtype)
            assert logits.dtype == dtype
            np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_greedy_tokens_equal_transformers(case: str) -> None:
    golden = np.load(GOLDENS / case / "golden.npz")
    expected = golden["generated"].tolist()
    assert dense.greedy(GOLDENS / case, golden["prompt"], len(expected)) == expected
