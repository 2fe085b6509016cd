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
    processes = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        processes.heal()
        yield processes
    finally:
        processes.close()


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
def cluster_prompts() -> list[list[int]]:
    """Prompts of token ids, some longer than a prefill step's row."""
    rng = np.random.default_rng(5)
    return [rng.integers(0, 1024, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="session")
def offline(llm: LLM, cluster_prompts: list[list[int]]) -> list[tuple[str, int]]:
    """The model's answer to each prompt, and its number of tokens."""
    return [
        (c.text, len(c.tokens)) for c in llm.generate(cluster_prompts, max_new_tokens=TOKENS, ignore_eos=True)
    ]


TOKENS = 60
