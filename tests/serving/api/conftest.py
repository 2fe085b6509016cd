"""One server for a module's tests, as `cmx serve tiny` starts it."""

from collections.abc import Iterator

import openai
import pytest
from serving.api.running import Running, serving

import cmx_jax
from cmx_jax.serving.deployment import Deployment, colocated
from cmx_jax.serving.llm import LLM


@pytest.fixture(scope="session")
def deployment() -> Deployment:
    return colocated("tiny")


@pytest.fixture(scope="module")
def server(deployment: Deployment) -> Iterator[Running]:
    with serving(deployment) as running:
        yield running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.openai


@pytest.fixture(scope="session")
def llm() -> LLM:
    """Another instance of the model, by the Python API and without drafts."""
    return cmx_jax.from_pretrained("tiny")
