"""One loaded model for all tests of the evaluation."""

import pytest

import cmx_jax
from cmx_jax.serving.deploy.llm import LLM


@pytest.fixture(scope="session")
def tiny() -> LLM:
    """The shipped model on two ranks."""
    return cmx_jax.from_pretrained("tiny", ranks=2, max_model_len=128)
