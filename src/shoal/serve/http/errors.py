"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from shoal.errors import DataError, UserError, nearest
from shoal.serve.http.fields import KNOWN
from shoal.serve.router import Busy

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that is not served: what is wrong, and with which field."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_seconds = retry_seconds

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        told = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(self.retry_seconds)} if self.retry_seconds else None
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def refused(error: Exception) -> Refused:
    """What a client is told of an error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(str(error), status=429, code="queue_full", retry_seconds=error.seconds)
    if isinstance(error, UserError | DataError):
        return Refused(str(error))
    return Refused("the server failed at this request", status=500, code="internal")


def _invalid(error: RequestValidationError) -> Refused:
    detail = error.errors()[0]
    path = [str(part) for part in detail["loc"] if part != "body"]
    param = ".".join(path) or None
    if detail["type"] == "extra_forbidden":
        hint = nearest(path[-1], KNOWN) if len(path) == 1 else ""
        hint = hint if hint.startswith("did") else ""
        text = f"{param} is not supported here; leave it out. {hint}".rstrip()
        return Refused(text, param=param, code="unsupported_field")
    if detail["type"] == "json_invalid":
        return Refused("the body is not valid JSON", code="invalid_json")
    message = str(detail["msg"]).removeprefix("Value error, ")
    return Refused(f"{param or 'body'}: {message}", param=param)


def install(app: FastAPI) -> None:
    """Have every error of `app` answered in this form."""

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}"
        return Refused(text, status=error.status_code).response()

    for kind in (Refused, Busy, UserError):

        @app.exception_handler(kind)
        async def _ours(_: Request, error: Exception) -> JSONResponse:
            return refused(error).response()

    @app.exception_handler(Exception)
    async def _other(_: Request, error: Exception) -> JSONResponse:
        return refused(error).response()
