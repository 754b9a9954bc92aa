"""Errors in the form that OpenAI's clients expect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from tritonclient.utils import InferenceServerException

from paged_backend.errors import InvalidArgument

_FIELD = re.compile(r"(?P<field>[a-z_]+)(?P<rest>[\w.\[\]]*=.*)", re.DOTALL)
"""How a message of `InvalidArgument` begins."""
_OVERLOADED = re.compile(r"overloaded|max_waiting|queue_timeout=")
_RETRY_SECONDS = "1"


class JsonResponse(Response):
    """JSON in ASCII: a string of a client's, or in the arguments of a tool call, may have half a surrogate pair."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content).encode()


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def document(self) -> dict[str, Any]:
        """The body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        headers = {429: {"Retry-After": _RETRY_SECONDS}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JsonResponse(self.document(), self.status, headers)


def of_body(error: RequestValidationError) -> ApiError:
    """A body that is not as it must be."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidArgument):
        return ApiError(400, str(cause), param=cause.field, code="invalid_value")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body must be JSON: {cause} at {first['loc'][-1]}", code="invalid_json")
    return ApiError(
        400, "the body must be a JSON object, sent with Content-Type: application/json", code="invalid_json"
    )


def unknown_model(name: str, served: Sequence[str]) -> ApiError:
    """A model that is not `served`."""
    message = f"model={name!r}: must be one of {', '.join(served)}"
    return ApiError(404, message, param="model", code="model_not_found")


def of_server(error: InferenceServerException, fields: Mapping[str, str]) -> ApiError:
    """What the tritonserver answered, or that it did not; `fields` has the client's names of the model's inputs."""
    message = (error.message() or "").removeprefix("Error generating stream: ")
    match (error.status() or "").removeprefix("StatusCode."):
        case "INVALID_ARGUMENT":
            return _of_argument(message, fields)
        case "UNAVAILABLE" if _OVERLOADED.search(message):
            return ApiError(429, message, code="overloaded")
        case "UNAVAILABLE" if message.startswith("timeout="):
            return ApiError(504, message, code="timeout")
        case "UNAVAILABLE":
            return ApiError(503, message, code="not_ready")
    # The server's own errors have no status in a stream.
    if message.startswith("Request for unknown model"):
        missing = message.endswith("is not found")
        return ApiError(
            404 if missing else 503, message, param="model", code="model_not_found" if missing else "not_ready"
        )
    return ApiError(500, message)


def _of_argument(message: str, fields: Mapping[str, str]) -> ApiError:
    found = _FIELD.match(message)
    if found is None:
        return ApiError(400, message)
    param = fields.get(found["field"], found["field"])
    code = "context_length_exceeded" if "tokens; at most" in message else "invalid_value"
    return ApiError(400, param + found["rest"], param=param, code=code)
