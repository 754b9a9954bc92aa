"""The HTTP application."""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from tritonclient.utils import InferenceServerException

from triton_server_model.openai.answer import answer
from triton_server_model.openai.chat import Chat
from triton_server_model.openai.client import TritonClient
from triton_server_model.openai.completions import Completion
from triton_server_model.openai.errors import ApiError, of_body, of_server, unknown_model
from triton_server_model.openai.schemas import ChatRequest, CompletionRequest


def from_environment() -> FastAPI:
    """The application for a tritonserver that runs already, and for more processes than one:

    `PAGED_BACKEND_GRPC=host:8001 uvicorn --factory triton_server_model.openai.app:from_environment --workers 4`.
    `PAGED_BACKEND_API_KEY` is the API key, `PAGED_BACKEND_MODELS` names the models, with commas between, to a front end
    that may not see the server's index of them (`--grpc-restricted-protocol=model-repository`).
    """
    models = os.environ.get("PAGED_BACKEND_MODELS", "").replace(",", " ").split()
    return create_app(os.environ["PAGED_BACKEND_GRPC"], os.environ.get("PAGED_BACKEND_API_KEY"), models)


def create_app(address: str, api_key: str | None = None, models: Collection[str] = ()) -> FastAPI:
    """OpenAI's API for the tritonserver whose gRPC is at `address`, `host:port`: for its `models`, or else all of them.

    With an `api_key`, all but `/health` needs it as bearer token.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.server = TritonClient(address, models)
        app.state.started = int(time.time())
        yield
        await app.state.server.close()

    def check_key(authorization: Annotated[str, Header()] = "") -> None:
        if api_key is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {api_key}".encode()):
            raise ApiError(401, "the header Authorization must be 'Bearer <API key>'", code="invalid_api_key")

    app = FastAPI(title="paged-backend", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(_v1, prefix="/v1", dependencies=[Depends(check_key)])
    app.add_api_route("/health", _health)
    for error in (ApiError, InferenceServerException, RequestValidationError, HTTPException, ClientDisconnect):
        app.add_exception_handler(error, _failed)
    app.add_exception_handler(Exception, _failed)  # after which it is logged, too
    return app


async def _failed(http: Request, error: Exception) -> Response:
    match error:
        case ClientDisconnect():
            return Response(status_code=499)  # which nobody reads
        case InferenceServerException():
            error = of_server(error, {})
        case RequestValidationError():
            error = of_body(error)
        case HTTPException():
            error = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}")
    return (error if isinstance(error, ApiError) else ApiError(500, "internal error")).response()


_v1 = APIRouter()


@_v1.post("/completions")
async def completions(http: Request, request: CompletionRequest) -> Response:
    """Go on from prompts."""
    return await answer(http.app.state.server, http, Completion(request))


@_v1.post("/chat/completions")
async def chat_completions(http: Request, request: ChatRequest) -> Response:
    """The next message of a chat."""
    return await answer(http.app.state.server, http, Chat(request))


@_v1.get("/models")
async def models(http: Request) -> dict[str, Any]:
    """The models that are ready."""
    return {"object": "list", "data": [_model(http, name) for name in await http.app.state.server.models()]}


@_v1.get("/models/{name:path}")
async def model(http: Request, name: str) -> dict[str, Any]:
    """One of them."""
    names = await http.app.state.server.models()
    if name not in names:
        raise unknown_model(name, names)
    return _model(http, name)


def _model(http: Request, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": http.app.state.started, "owned_by": "paged-backend"}


async def _health(http: Request) -> Response:
    if not await http.app.state.server.ready():
        raise ApiError(503, "no model is ready", code="not_ready")
    return Response()
