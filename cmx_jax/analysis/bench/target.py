"""The server under load: its address and its model."""

import os
from typing import Any

import httpx

from cmx_jax.errors import CmxError

CONNECT_S, ANSWER_S = 5.0, 30.0
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
HINT = "start it (cmx serve MODEL), or say where it is by --base-url"


class Target:
    """A server of OpenAI's API.

    Args:
      base_url: Address, with or without `/v1`.
      endpoint: One of `ENDPOINTS`.
      api_key: API key; None: the one in CMX_API_KEY or OPENAI_API_KEY, if any.
      model: Name of the model at the server; None: the first one that the server lists.

    Attributes:
      base_url: Address without `/v1`.
      endpoint: Path of the endpoint.
      chat: Flag; prompts are messages.
      headers: HTTP headers with the API key.
      model: Name of the model in requests.
      max_model_len: Tokens of the longest sequence; None if the server does not tell.

    Raises:
      CmxError: The server does not answer, refuses the key, or does not serve the model.
    """

    def __init__(
        self,
        base_url: str,
        endpoint: str = ENDPOINTS[0],
        api_key: str | None = None,
        model: str | None = None,
    ):
        if endpoint not in ENDPOINTS:
            raise CmxError(f"endpoint is {endpoint!r}, expected {' or '.join(ENDPOINTS)}")
        self.base_url, self.endpoint, self.chat = _address(base_url), endpoint, endpoint == ENDPOINTS[1]
        key = api_key or os.environ.get("CMX_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
        if not (key.isascii() and key.isprintable()):
            raise CmxError("the API key holds a character that no header can carry, expected ASCII")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        listed = self._listed(model is not None)
        if model is not None and listed and model not in listed:
            names = ", ".join(listed)
            raise CmxError(f"model {model!r} is not served at {self.base_url}, expected one of: {names}")
        self.model = next(iter(listed)) if model is None else model
        self.max_model_len: int | None = listed.get(self.model)

    def _listed(self, optional: bool) -> dict[str, int | None]:
        """Context lengths of the served models by name; empty if `optional` and the server has no list."""
        url = f"{self.base_url}/v1/models"
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        try:
            with httpx.Client(timeout=timeout, headers=self.headers, trust_env=False) as http:
                answer = http.get(url)
        except httpx.HTTPError as error:
            raise CmxError(f"no server answers at {self.base_url} ({reason(error)}): {HINT}") from None
        if answer.status_code in (401, 403):
            refusal = message(answer.content)
            raise CmxError(f"{self.base_url} refuses the API key ({refusal}): give --api-key or CMX_API_KEY")
        if answer.status_code == 404 and optional:
            return {}
        try:
            listed = {str(x["id"]): _integer(x.get("max_model_len")) for x in answer.json()["data"]}
            if answer.status_code != 200 or not listed:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CmxError(
                f"{url} answers {answer.status_code} and lists no models, expected OpenAI's API: {HINT}"
            ) from None
        return listed


def _address(base_url: str) -> str:
    try:
        url = httpx.URL(base_url)
        good = url.scheme in ("http", "https") and bool(url.host) and not url.query
        good = good and 0 < (url.port or 80) < 2**16
    except httpx.InvalidURL:
        good = False
    if not good:
        raise CmxError(f"base_url is {base_url!r}, expected http://HOST:PORT or https://HOST:PORT")
    return base_url.rstrip("/").removesuffix("/v1")


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def message(body: bytes) -> str:
    """Message in an error's body, in OpenAI's form or another, as one short line."""
    text = body.decode(errors="replace")
    try:
        document = httpx.Response(200, content=body).json()
        text = str(document["error"]["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300] or "no reason given"


def reason(error: httpx.HTTPError) -> str:
    """Reason of a failed connection."""
    return str(error) or type(error).__name__
