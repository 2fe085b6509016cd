"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, each message one line."""

import math
from typing import TypedDict

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


class ErrorBody(TypedDict):
    """Description of an error.

    Attributes:
      message: One line of text.
      type: Class of the error, one of `TYPES`.
      param: Name of the field that caused the error, or None.
      code: Code of the error, or None.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorDocument(TypedDict):
    """JSON body of an error response."""

    error: ErrorBody


class NotFound(CmxError):
    """The requested model does not exist here."""


class Gone(Exception):
    """The client disconnected, so an answer is useless."""


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> ErrorDocument:
    """Makes an error document; its message is one line of valid Unicode, whatever `message` contains."""
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()
    field = None if param is None else param.encode(errors="backslashreplace").decode()
    return {"error": {"message": line, "type": TYPES[status], "param": field, "code": code}}


def response(
    status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
) -> JSONResponse:
    """Makes an error response; names of `headers` have `_` in place of `-`."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(body(status, message, param, code), status, headers=fields)


def answer(error: Exception) -> JSONResponse:
    """Makes the response to an exception."""
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
    return response(500, "the server failed to answer: its log says why")  # uvicorn logs the exception


def handle(app: FastAPI) -> None:
    """Makes an app answer every error in this form."""

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
        first = error.errors()[0]
        field = ".".join(str(x) for x in first["loc"][1:] if not str(x).startswith("function-"))
        if first["type"] == "json_invalid":
            return response(400, f"the body is not JSON ({first['ctx']['error']}), expected an object")
        if first["loc"] == ("body",) and first["type"] == "model_attributes_type":
            return response(400, "the body is not an object, expected one in JSON, sent as application/json")
        message = first["msg"].removeprefix("Value error, ")
        return response(400, f"{field}: {message}" if field else message, field or None)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Gone, gone)
    for kind in (CmxError, Interrupted, Exception):
        app.add_exception_handler(kind, failed)
