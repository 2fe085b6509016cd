"""The shipped checkpoint against transformers: goldens/tiny.npz, by scripts/make_goldens.py --checkpoint."""

import numpy as np
import pytest
from support import GOLDENS

import cmx_jax
from cmx_jax.serving.deploy.llm import LLM

pytestmark = pytest.mark.slow

GOLDEN = np.load(GOLDENS / "tiny.npz")
LENGTHS = sorted(int(name.split("_")[1]) for name in GOLDEN.files if name.startswith("tokens_"))


@pytest.fixture(scope="module")
def tiny() -> LLM:
    return cmx_jax.from_pretrained("tiny")


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_equal_transformers(tiny: LLM, length: int) -> None:
    got = tiny.logits(GOLDEN[f"tokens_{length}"][None])[0, GOLDEN[f"positions_{length}"]]
    np.testing.assert_allclose(got, GOLDEN[f"logits_{length}"], atol=1e-4, rtol=0)


def test_greedy_continuations_equal_transformers(tiny: LLM) -> None:
    lengths = [length for length in LENGTHS if f"generated_{length}" in GOLDEN.files]
    prompts = [GOLDEN[f"tokens_{length}"].tolist() for length in lengths]
    expected = [GOLDEN[f"generated_{length}"].tolist() for length in lengths]
    completions = tiny.generate(prompts, max_new_tokens=len(expected[0]), ignore_eos=True)
    assert [c.tokens for c in completions] == expected
