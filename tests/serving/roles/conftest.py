"""One cluster for all tests here; each finds it whole, and leaves nothing in it."""

from collections.abc import Iterator

import numpy as np
import pytest
from serving.roles.cluster import Cluster

import cmx_jax
from cmx_jax.serving.deploy.llm import LLM

LENGTHS = (5, 150, 33, 90, 1, 64, 17, 120)


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.heal()
        yield made
    finally:
        made.close()


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    _cluster.heal()
    yield _cluster
    _cluster.heal()
    _cluster.idle()


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The model by the Python API, without drafts."""
    return cmx_jax.from_pretrained("tiny", max_model_len=256)


@pytest.fixture(scope="session")
def asked() -> list[list[int]]:
    """Prompts of token ids, some longer than a prefill step's row."""
    rng = np.random.default_rng(5)
    return [rng.integers(0, 1024, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="session")
def offline(llm: LLM, asked: list[list[int]]) -> list[tuple[str, int]]:
    """The text behind each, and the number of its tokens."""
    return [(c.text, len(c.tokens)) for c in llm.generate(asked, max_new_tokens=TOKENS, ignore_eos=True)]


TOKENS = 60
