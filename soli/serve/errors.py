"""Errors as OpenAI's API words them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered: `status`, one sentence, and the field of the body that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = None if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """What stands in the answer's body."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An answer that blames no field."""
    return JSONResponse(error_body(status, message), status, headers)


async def on_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def on_http_error(_: Request, error: Exception) -> JSONResponse:
    """Routes and methods that do not exist, bodies that are not JSON."""
    assert isinstance(error, HTTPException)
    said = {404: "there is no such route: see /openapi.json", 405: "this route does not take that method"}
    return error_response(error.status_code, said.get(error.status_code, str(error.detail)), error.headers)


async def on_invalid(_: Request, error: Exception) -> JSONResponse:
    """The first thing wrong with a body, named as a path: messages.0.content."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:] if isinstance(part, int) or part.islower()]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        said = f"{param} is not supported: leave it out"
    else:
        said = f"{param or 'the body'}: {str(first['msg']).removeprefix('Value error, ')}"
    return JSONResponse(error_body(422 if param is None else 400, said, param), 400)


async def on_anything(_: Request, error: Exception) -> JSONResponse:
    """A mistake of ours: the log has it, the caller learns its kind alone."""
    return error_response(500, f"the server failed with {type(error).__name__}; its log has more")
