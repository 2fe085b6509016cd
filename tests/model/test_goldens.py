"""Random-weight models against transformers: logits, greedy tokens (goldens by scripts/make_goldens.py)."""

from pathlib import Path

import numpy as np
import pytest
from support import logits_of

import cmx_jax

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).parents[1] / "goldens"
# In these cases decoding uses the same code as scoring for the part that differs: logits are enough.
SCORED = {"attention_bias", "norm_eps", "style4", "tied", "negative_bias", "no_norm_topk", "one_group"} | {
    f"{family}_{case}"
    for family in ("qwen3", "llama4")
    for case in ("bias", "eps", "style4", "tied", "no_norm_topk")
}
CASES = sorted(path.name for path in GOLDENS.iterdir() if (path / "config.json").is_file())


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_transformers(case: str) -> None:
    golden = np.load(GOLDENS / case / "golden.npz")
    llm = cmx_jax.from_pretrained(GOLDENS / case, ranks=4, max_num_seqs=4)
    names = [name for name in golden.files if name.startswith("tokens_")]
    rows = [golden[name] for name in names]
    results = [llm.logits(tokens) for tokens in rows] if case.endswith("base") else logits_of(llm, rows)
    for name, part in zip(names, results, strict=True):
        expected = golden[name.replace("tokens", "logits")]
        np.testing.assert_allclose(part, expected, atol=1e-4, rtol=0)
    if case in SCORED:
        return
    generated = golden["generated"].tolist()
    [completion] = llm.generate([golden["prompt"].tolist()], max_new_tokens=len(generated), ignore_eos=True)
    assert completion.tokens == generated
