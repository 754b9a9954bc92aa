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

_KINDS = [
    (r"\d+ requests wait already|queue_timeout=\S+: the request was ended", 429, "overloaded"),
    (r"timeout=\S+: the request was ended", 504, "timeout"),
    (r"(?:outputs of )?the engine|.* has no available versions|.* is not healthy", 503, "not_ready"),
    (r"Request for unknown model", 404, "model_not_found"),
    (r".* tokens; at most \d+ are allowed", 400, "context_length_exceeded"),
    (r"[a-z_]+[\w.\[\]]*=|unexpected inference input", 400, "invalid_value"),
]
"""What the messages of the model and of the tritonserver begin with. An error in a stream has no code, unless the
client sends the header `triton_grpc_error`: but with that, servers (2.51) crash within some thousand errors."""
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
    if error.status() == "StatusCode.UNAVAILABLE":  # of the connection
        return ApiError(503, message, code="not_ready")
    for pattern, status, code in _KINDS:
        if re.match(pattern, message, re.DOTALL):
            return _named(ApiError(status, message, code=code), fields)
    return ApiError(500, message)


def _named(error: ApiError, fields: Mapping[str, str]) -> ApiError:
    """Bad input with the client's own name of the field."""
    if error.status == 400 and (found := re.match(r"[a-z_]+(?=[\w.\[\]]*=)", error.message)):
        error.param = fields.get(found[0], found[0])
        error.message = error.param + error.message[found.end() :]
    return error
