"""Keys, limits, and what a client of HTTP sees of them."""

import base64
from collections.abc import Iterator

import pytest
from serving.api.running import Running, start_server

from cmx_jax.errors import CmxError
from cmx_jax.serving.api.context import Limits

ASK = {"prompt": "x", "max_tokens": 1, "temperature": 0}
MOST = 2000


@pytest.fixture(scope="module")
def closed(deployment) -> Iterator[Running]:
    limits = Limits(max_body_bytes=MOST, max_choices=3)
    with start_server(deployment, limits, api_keys=["first", "sécond"], admin_keys=["root"]) as running:
        yield running


def bearer(key: str) -> dict[str, bytes]:
    return {"Authorization": b"Bearer " + key.encode()}


ROUTES = ["/", "/status", "/metrics", "/v1/models", "/v1/models/tiny", "/openapi.json", "/nowhere"]
WRONG = [
    {},
    bearer("firs"),
    bearer("first1"),
    bearer("root"),
    {"Authorization": b"first"},
    {"Authorization": b"Basic first"},
    {"Authorization": b"Basic " + base64.b64encode(b"first:wrong")},
    {"Authorization": b"Bearer \xff"},
]


@pytest.mark.parametrize("headers", WRONG)
def test_keys_wrong(closed, headers) -> None:
    """A wrong key is refused on every route."""
    for route in ROUTES:
        answer = closed.http.get(route, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert closed.http.post("/v1/completions", json=ASK, headers=headers).status_code == 401
    assert closed.http.post("/v1/chat/completions", json=ASK, headers=headers).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [bearer("first"), bearer("sécond"), {"Authorization": b"Basic " + base64.b64encode(b"me:first")}],
)
def test_keys_several(closed, headers) -> None:
    """Each API key opens every route but the admin routes."""
    for route in ROUTES[:-1]:
        assert closed.http.get(route, headers=headers).status_code == 200
    assert closed.http.get("/nowhere", headers=headers).status_code == 404
    assert closed.http.post("/v1/completions", json=ASK, headers=headers).status_code == 200
    assert closed.http.post("/admin/drain", headers=headers).status_code == 401
    assert closed.http.get("/admin/requests", headers=headers).status_code == 401


def test_keys_health_and_admin(closed) -> None:
    """`/health` needs no key, and admin routes need their own."""
    assert closed.http.get("/health").status_code == 200
    answer = closed.http.get("/admin/requests", headers=bearer("root"))
    assert answer.json() == {"requests": []}


@pytest.mark.parametrize("chunked", [False, True])
def test_body_above_limit(closed, chunked) -> None:
    """A large body is refused while it is read."""

    def body() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * 100

    content = body() if chunked else b"".join(body())
    headers = bearer("first") | {"Content-Type": b"application/json"}
    answer = closed.http.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 413
    assert f"more than {MOST} bytes" in answer.json()["error"]["message"]


def test_body_at_limit(closed) -> None:
    """A body that is as large as the limit is accepted."""
    body = b'{"prompt": "x", "max_tokens": 1'.ljust(MOST - 1) + b"}"
    assert len(body) == MOST
    headers = bearer("first") | {"Content-Type": b"application/json"}
    answer = closed.http.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 200


def test_choices_above_limit(closed) -> None:
    """More choices than the limit are refused."""
    ask = ASK | {"prompt": ["x", "y"], "n": 2}
    answer = closed.http.post("/v1/completions", json=ask, headers=bearer("first"))
    assert answer.status_code == 400
    assert "2 prompt(s) with n 2 are 4 choices, expected at most 3" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "Field required"),
        (b"[]", "the body is not an object, expected one in JSON, sent as application/json"),
        (b'{"prompt": ', "the body is not JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature is nan"),
        (b'{"prompt": "x", "top_k": 1' + b"0" * 300 + b"}", "top_k is 1000"),
        (b'{"prompt": "x", "top_k": 1' + b"0" * 1900 + b"}", "top_k is 1000"),
        (b'{"prompt": "\\ud800"}', "the prompt is not Unicode text"),
        (b'{"prompt": "x", "\\ud800": 1}', "as a unicode string"),
        (b'{"prompt": "x", "stream_options": {"\\ud800": 1}}', "stream_options: "),
        (b"\xff", "body"),
    ],
)
def test_body_invalid(closed, body, message) -> None:
    headers = bearer("first") | {"Content-Type": b"application/json"}
    answer = closed.http.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_body_content_type(closed) -> None:
    """A body must be sent as JSON."""
    headers = bearer("first") | {"Content-Type": b"text/plain"}
    answer = closed.http.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 400
    assert "sent as application/json" in answer.json()["error"]["message"]


def test_openapi_statuses(closed) -> None:
    """The OpenAPI document lists only statuses that occur."""
    paths = closed.http.get("/openapi.json", headers=bearer("first")).json()["paths"]
    assert {s for operations in paths.values() for op in operations.values() for s in op["responses"]} == {
        *("200", "400", "401", "404", "405", "413", "429", "500", "502", "503", "default")
    }


def test_methods_and_origins(closed) -> None:
    """Wrong methods and other origins are refused."""
    assert closed.http.delete("/v1/models", headers=bearer("first")).json()["error"]["type"]
    answer = closed.http.get("/v1/models", headers=bearer("first") | {"Origin": b"http://elsewhere"})
    assert "access-control-allow-origin" not in answer.headers


def test_keys_none(deployment) -> None:
    """Without keys, every route but the admin routes is open."""
    with start_server(deployment) as running:
        assert running.http.get("/v1/models").status_code == 200
        answer = running.http.post("/admin/drain")
        assert answer.status_code == 401
        assert "start the server with --admin-key" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["max_body_bytes", "max_choices"])
def test_limits_invalid(name) -> None:
    """Limits less than 1 are refused."""
    with pytest.raises(CmxError, match=f"{name} is 0, expected at least 1"):
        Limits(**{name: 0})
