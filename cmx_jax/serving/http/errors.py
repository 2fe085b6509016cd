"""Every failure in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, one line each."""

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from cmx_jax.errors import CmxError
from cmx_jax.serving.kv import TransferError
from cmx_jax.serving.scheduling.request import Overloaded
from cmx_jax.serving.service.frontend import RETRY_AFTER_S, Unavailable
from cmx_jax.serving.service.generation import Interrupted, StepFailed

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "bad_gateway_error",
    503: "service_unavailable_error",
}


class NotFound(CmxError):
    """There is no such model."""


class Gone(Exception):
    """The client left: nobody reads an answer."""


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error's document; its message is one line, and Unicode whatever was given."""
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()
    named = None if param is None else param.encode(errors="backslashreplace").decode()
    return {"error": {"message": line, "type": TYPES[status], "param": named, "code": code}}


def response(
    status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
) -> JSONResponse:
    """An error's answer; names of headers have `_` for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(body(status, message, param, code), status, headers=named)


def answer(error: Exception) -> JSONResponse:
    """What a client is told of an exception."""
    if isinstance(error, Overloaded):
        return response(429, str(error), Retry_After=str(math.ceil(error.retry_after_s)))
    if isinstance(error, StepFailed):
        return response(500, str(error))
    if isinstance(error, TransferError):
        return response(502, str(error))
    if isinstance(error, Unavailable | Interrupted):
        return response(503, str(error), Retry_After=str(math.ceil(RETRY_AFTER_S)))
    if isinstance(error, NotFound):
        return response(404, str(error), "model", "model_not_found")
    if isinstance(error, CmxError):
        return response(400, str(error))
    return response(500, "the server failed to answer: its log says why")  # uvicorn writes it there


def handle(app: FastAPI) -> None:
    """Makes an app answer like that."""

    async def failed(_: Request, error: Exception) -> JSONResponse:
        return answer(error)

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = error.status_code if error.status_code in TYPES else 400
        return response(status, str(error.detail), **(error.headers or {}))

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = error.errors()[0]
        where = ".".join(str(x) for x in found["loc"][1:] if not str(x).startswith("function-"))
        if found["type"] == "json_invalid":
            return response(400, f"the body is not JSON ({found['ctx']['error']}), expected an object")
        if found["loc"] == ("body",) and found["type"] == "model_attributes_type":
            return response(400, "the body is no object, expected one in JSON, sent as application/json")
        message = found["msg"].removeprefix("Value error, ")
        return response(400, f"{where}: {message}" if where else message, where or None)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Gone, gone)
    for kind in (CmxError, Interrupted, Exception):
        app.add_exception_handler(kind, failed)
