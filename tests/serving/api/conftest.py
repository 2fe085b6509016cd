"""One server for a module's tests, as `cmx serve tiny` starts it."""

from collections.abc import Iterator

import openai
import pytest
from serving.api.running import Running, start_server

import cmx_jax
from cmx_jax.serving.deploy.deployment import Deployment, colocated
from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.ems import MPServer, Pool


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The model with a caching pool, as `cmx serve` starts it."""
    served_model = colocated("tiny")
    pool = Pool({"here": MPServer(tmp_path_factory.mktemp("pool"), dram=1 << 24, disk=1 << 26)})
    served_model.cache(pool, block=128)
    yield served_model
    pool.close()


@pytest.fixture(scope="module")
def server(deployment: Deployment) -> Iterator[Running]:
    with start_server(deployment) as running:
        yield running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.openai


@pytest.fixture(scope="session")
def llm() -> LLM:
    """Another instance of the model, by the Python API and without drafts."""
    return cmx_jax.from_pretrained("tiny")
