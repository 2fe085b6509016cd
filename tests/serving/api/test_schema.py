"""Random requests from the OpenAPI document: whatever is sent, no answer is the server's failure."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cmx_jax.serving.http.error_responses import TYPES

# schemathesis draws where hypothesis does not want it
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
FREE = ("prompt", "messages", "echo", "stop", "stream", "ignore_eos", "cache_salt", "user")
OPERATIONS = [
    ("/", "GET"),
    ("/health", "GET"),
    ("/metrics", "GET"),
    ("/status", "GET"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/admin/drain", "POST"),
    ("/admin/pools", "POST"),
    ("/admin/requests", "GET"),
    ("/admin/trace", "GET"),
]


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_operations_complete(schema) -> None:
    """The list of operations is complete."""
    operations = [
        (operation.ok().path, operation.ok().method.upper()) for operation in schema.get_all_operations()
    ]
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@pytest.mark.slow
def test_operation_random_requests(schema, path, method) -> None:
    """Half of the requests break the document. Of the others every second one has numbers that the sampler
    takes, so that it is answered."""
    operation = schema[path][method]
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))

    @given(cases, st.booleans())
    @settings(
        max_examples=25 if method == "POST" else 5,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case, served: bool) -> None:
        if isinstance(case.body, dict) and served:
            known = {name: case.body[name] for name in FREE if name in case.body}
            case.body = {**known, "max_tokens": 4, "temperature": 0.5, "seed": 1}
        response = case.call(timeout=240)
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["type"] == TYPES[response.status_code]
            assert "\n" not in error["message"]

    statuses: set[int] = set()
    ask()
    assert statuses >= ({200, 400} if path.startswith("/v1/c") else set())
