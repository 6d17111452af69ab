"""Errors in the format of OpenAI's API: {"error": {"message", "type", "param", "code"}}; on the routes of Anthropic's
in that one's: {"type": "error", "error": {"type", "message"}}, whose message names the field."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from soli.errors import SoliError
from soli.serve.protocol_responses import (
    AnthropicErrorDetail,
    AnthropicErrorResponse,
    ErrorDetail,
    ErrorResponse,
    to_json,
)

ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
DISCONNECTED = 499  # nginx's status for a client that closed the connection before its answer
MAX_MESSAGE = 800  # characters
HTTP_MESSAGES = {404: "there is no such route: see /openapi.json", 405: "this route does not take that method"}


class ApiError(Exception):
    """A request that is not answered: `status`, one sentence, and the field of the body that caused it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = None if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self, path: str) -> dict[str, Any]:
        """The JSON body on the route of `path`."""
        return error_body(path, self.status, str(self), self.param, self.code)


class BodyError(HTTPException):
    """A body that is rejected before it is validated, with the field that caused it: FastAPI passes on no other kind
    of error from there."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(400, message)
        self.param = param


def error_body(
    path: str, status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON body of an error on the route of `path`."""
    if path.startswith(ANTHROPIC_PATH):
        kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        named = message if param is None or message.startswith(param) else f"{param}: {message}"
        return to_json(AnthropicErrorResponse(type="error", error=AnthropicErrorDetail(type=kind, message=named)))
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return to_json(ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code)))


def error_response(path: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error of no particular field."""
    return JSONResponse(error_body(path, status, message), status, headers)


async def _on_api_error(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(request.url.path), error.status, error.headers)


async def _on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Routes and methods that do not exist, bodies that are not JSON."""
    message = HTTP_MESSAGES.get(error.status_code, str(error.detail))
    param = error.param if isinstance(error, BodyError) else None
    body = error_body(request.url.path, error.status_code, message, param)
    return JSONResponse(body, error.status_code, error.headers)


async def _on_invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first invalid field of the body, named by its path: messages.0.content."""
    first = _most_specific(error.errors())
    if "json" not in request.headers.get("content-type", "") and first["loc"][0] == "body":
        message = "the body is not declared as JSON: send it with Content-Type: application/json"
        return error_response(request.url.path, 400, message)
    param = _param(first["loc"], error.body, first["type"] == "missing") or None
    if first["type"] == "extra_forbidden":
        message = f"{param} is not supported: leave it out"
    else:
        message = f"{param or 'the body'}: {str(first['msg']).removeprefix('Value error, ')}"
    return JSONResponse(error_body(request.url.path, 400, message[:MAX_MESSAGE], param), 400)


async def _on_disconnect(_: Request, __: ClientDisconnect) -> Response:
    """Nobody reads it; the status is for the log."""
    return Response(status_code=DISCONNECTED)


async def _on_soli_error(request: Request, error: SoliError) -> JSONResponse:
    """The caller's error, if the field is not known."""
    return error_response(request.url.path, 400, str(error)[:MAX_MESSAGE])


async def _on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    """A bug: the log has it, the caller learns only its type."""
    message = f"the server failed with {type(error).__name__}; its log has more"
    return error_response(request.url.path, 500, message)


# Every exception of a route becomes an answer in this format.
HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    ApiError: _on_api_error,
    ClientDisconnect: _on_disconnect,
    HTTPException: _on_http_error,
    RequestValidationError: _on_invalid_body,
    SoliError: _on_soli_error,
    Exception: _on_unexpected_error,
}


def _most_specific(errors: Sequence[Any]) -> Any:
    """Of the errors of the first invalid field the deepest: of a union's members, the one that was meant."""
    of_first_field = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    return max(of_first_field, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))


def _param(location: Sequence[int | str], body: Any, missing: bool) -> str:
    """The path in the body of pydantic's error location, without the names that it gives to members of unions."""
    if location[0] != "body":  # a path or query parameter
        return ".".join(map(str, location[1:]))
    path: list[str] = []
    for number, part in enumerate(location[1:], start=2):
        if isinstance(body, dict) and (part in body or (missing and number == len(location))):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part]
        else:
            continue
        path.append(str(part)[:80])
    return ".".join(path)
