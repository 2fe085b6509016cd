"""What stands before every route: keys, and the largest body. Plain ASGI, so that streams pass untouched."""

import base64
import binascii
import hmac
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmx_jax.serving.http.errors import response

OPEN = "/health"  # the one route without a key
ADMIN = "/admin"


class Keys:
    """Lets in who has a key: `Authorization: Bearer KEY`, or, for browsers, the password of a Basic login.

    Args:
      app: what stands behind.
      keys: of every route but `OPEN`; none lets everyone in.
      admin: of routes below `ADMIN`; none keeps them closed.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], admin: Sequence[str]):
        self.app = app
        self._keys, self._admin = ([key.encode() for key in of] for of in (keys, admin))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == OPEN:
            return await self.app(scope, receive, send)
        admin = (scope["path"] + "/").startswith(ADMIN + "/")
        expected = self._admin if admin else self._keys
        if (not expected and not admin) or _matches(_given(scope), expected):
            return await self.app(scope, receive, send)
        what = "an admin key" if admin else "an API key"
        closed = admin and not expected
        message = (
            "admin routes are closed: start the server with --admin-key"
            if closed
            else f"the key is missing or wrong, expected the header 'Authorization: Bearer KEY' with {what}"
        )
        refused = response(401, message, None, "invalid_api_key", WWW_Authenticate='Basic realm="cmx"')
        await refused(scope, receive, send)


def _given(scope: Scope) -> bytes:
    header = dict(scope["headers"]).get(b"authorization", b"")
    kind, _, value = header.partition(b" ")
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return value.strip() if kind.lower() == b"bearer" else b""


def _matches(given: bytes, keys: Sequence[bytes]) -> bool:
    """Compares with every key, each in a time that does not depend on what is given."""
    return sum(hmac.compare_digest(given, key) for key in keys) > 0


class BodyLimit:
    """Refuses a body of more bytes than a limit while it is read."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        message = f"the body has more than {self.most} bytes: send less, or raise --max-body-bytes"
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.most:
            return await response(413, message)(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            part = await receive()
            read += len(part.get("body", b""))
            if read > self.most:
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)
