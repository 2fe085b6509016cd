"""Checks before every route: API keys and the size of the body.

Both are plain ASGI, so that streams pass untouched.
"""

import base64
import binascii
import hmac
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmx_jax.serving.http.error_responses import response

OPEN = "/health"  # the only route without a key
ADMIN = "/admin"


class Keys:
    """Requires a key: `Authorization: Bearer KEY`, or, for browsers, the password of a Basic login.

    Args:
      app: App to protect.
      keys: Keys of every route but `OPEN`; without keys, these routes need none.
      admin: Keys of the routes below `ADMIN`; without keys, these routes are closed.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], admin: Sequence[str]):
        self.app = app
        self._keys, self._admin = ([key.encode() for key in group] for group in (keys, admin))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == OPEN:
            return await self.app(scope, receive, send)
        admin = (scope["path"] + "/").startswith(ADMIN + "/")
        expected = self._admin if admin else self._keys
        if (not expected and not admin) or _matches(_credentials(scope), expected):
            return await self.app(scope, receive, send)
        kind = "an admin key" if admin else "an API key"
        closed = admin and not expected
        message = (
            "admin routes are closed: start the server with --admin-key"
            if closed
            else f"the key is missing or wrong, expected the header 'Authorization: Bearer KEY' with {kind}"
        )
        refused = response(401, message, None, "invalid_api_key", WWW_Authenticate='Basic realm="cmx"')
        await refused(scope, receive, send)


def _credentials(scope: Scope) -> bytes:
    header = dict(scope["headers"]).get(b"authorization", b"")
    kind, _, value = header.partition(b" ")
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return value.strip() if kind.lower() == b"bearer" else b""


def _matches(credentials: bytes, keys: Sequence[bytes]) -> bool:
    """Compares with every key, each in a time that does not depend on the credentials."""
    return sum(hmac.compare_digest(credentials, key) for key in keys) > 0


class BodyLimit:
    """Refuses a body of more than `max_bytes` bytes while it is read."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        message = f"the body has more than {self.max_bytes} bytes: send less, or raise --max-body-bytes"
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_bytes:
            return await response(413, message)(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            part = await receive()
            read += len(part.get("body", b""))
            if read > self.max_bytes:
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)
