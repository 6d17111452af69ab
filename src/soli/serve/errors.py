"""Errors as OpenAI's API words them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
LONGEST = 800  # characters of a message


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


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """The first thing wrong with a body, named as a path: messages.0.content."""
    assert isinstance(error, RequestValidationError)
    first = _nearest(error.errors())
    if "json" not in request.headers.get("content-type", "") and first["loc"][0] == "body":
        return error_response(400, "the body is not called JSON: send it with Content-Type: application/json")
    param = _place(first["loc"], error.body, first["type"] == "missing") or None
    if first["type"] == "extra_forbidden":
        said = f"{param} is not supported: leave it out"
    else:
        said = f"{param or 'the body'}: {str(first['msg']).removeprefix('Value error, ')}"
    return JSONResponse(error_body(400, said[:LONGEST], param), 400)


async def on_soli_error(_: Request, error: Exception) -> JSONResponse:
    """What the caller caused, where no field is known."""
    return error_response(400, str(error)[:LONGEST])


def _nearest(errors: Sequence[Any]) -> Any:
    """Of what is wrong with the first wrong field, what lies deepest: of a union's members, the one that was meant."""
    of_first = [one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]]
    return max(of_first, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))


def _place(loc: Sequence[int | str], body: Any, missing: bool) -> str:
    """Where in the body pydantic found an error, without the names that it gives to the members of unions."""
    found: list[str] = []
    if loc[0] != "body":  # a part of the address
        return ".".join(map(str, loc[1:]))
    for number, part in enumerate(loc[1:], start=2):
        if isinstance(body, dict) and (part in body or (missing and number == len(loc))):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part]
        else:
            continue
        found.append(str(part)[:80])
    return ".".join(found)


async def on_anything(_: Request, error: Exception) -> JSONResponse:
    """A mistake of ours: the log has it, the caller learns its kind alone."""
    return error_response(500, f"the server failed with {type(error).__name__}; its log has more")
