"""One request's answer over HTTP: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing
from operator import itemgetter
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from tritonclient.utils import InferenceServerException

from triton_server_model.openai import client
from triton_server_model.openai.errors import JsonResponse, of_server, unknown_model
from triton_server_model.openai.schemas import GenerationRequest

T = TypeVar("T")
Responses = AsyncGenerator[tuple[int, client.Response]]
"""Each with the number of its prompt."""
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_GRACE_SECONDS = 0.1
"""For the errors of a request's other prompts, which should not be cancelled while they are on their way."""
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode


class Reply(Protocol):
    """An endpoint's side of an answer: `Completion` or `Chat`."""

    kind: str
    chunk_kind: str
    id_prefix: str
    fields: dict[str, str]
    """Of the model's inputs, the names that this endpoint has for them."""
    request: Any

    def inputs(self) -> list[client.Inputs]:
        """What to ask the model for, for each prompt."""
        ...

    def choices(self, number: int, response: client.Response) -> Iterator[dict[str, Any]]:
        """Choices of a whole answer: those of the prompt of that number."""
        ...

    def chunks(self, number: int, response: client.Response) -> Iterator[dict[str, Any]]:
        """The same of a stream: what came since."""
        ...


class Usage:
    """Counts tokens."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        """Tokens of each, and how many of these were cached."""
        self._completion = 0

    def add(self, number: int, response: client.Response) -> None:
        """Count what came for the prompt of that number."""
        self._prompts[number] = response.num_prompt_tokens, response.num_cached_tokens
        self._completion += sum(output.num_tokens for output in response.outputs)

    def document(self) -> dict[str, Any]:
        """What OpenAI calls usage."""
        prompt, cached = (sum(tokens[part] for tokens in self._prompts.values()) for part in (0, 1))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion,
            "total_tokens": prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


async def answer(server: client.TritonClient, http: Request, reply: Reply) -> Response:
    """Generate, and cancel that as soon as the HTTP client has gone.

    Raises `ApiError` when there is no answer; in a stream that has begun the error is its last event.
    """
    request: GenerationRequest = reply.request
    name = f"{reply.id_prefix}{uuid.uuid4().hex}"
    head = {"id": name, "created": int(time.time()), "model": request.model}
    streams = [server.generate(request.model, inputs, name) for inputs in reply.inputs()]
    responses = _numbered(0, streams[0]) if len(streams) == 1 else _merged(streams)
    try:
        if not request.stream:
            return JsonResponse(await _unless_gone(http, _whole(head, reply, responses)))
        events = _events(head, reply, responses)
        first = await _unless_gone(http, anext(events))
    except InferenceServerException as error:
        failure = of_server(error, reply.fields)
        raise unknown_model(request.model, await server.models()) if failure.status == 404 else failure from None
    return StreamingResponse(_stream(first, events, reply), media_type="text/event-stream", headers=_HEADERS)


async def _whole(head: dict[str, Any], reply: Reply, responses: Responses) -> dict[str, Any]:
    usage = Usage()
    choices: list[dict[str, Any]] = []
    async for number, response in responses:
        usage.add(number, response)
        choices += reply.choices(number, response)
    choices.sort(key=itemgetter("index"))
    return head | {"object": reply.kind, "choices": choices, "usage": usage.document()}


async def _events(head: dict[str, Any], reply: Reply, responses: Responses) -> AsyncGenerator[bytes]:
    usage, with_usage = Usage(), reply.request.stream_options.include_usage
    head |= {"object": reply.chunk_kind} | ({"usage": None} if with_usage else {})
    async with aclosing(responses):
        async for number, response in responses:
            usage.add(number, response)
            if events := b"".join(_event(head | {"choices": [choice]}) for choice in reply.chunks(number, response)):
                yield events
    if with_usage:
        yield _event(head | {"choices": [], "usage": usage.document()})


async def _stream(first: bytes, rest: AsyncGenerator[bytes], reply: Reply) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        yield first
        try:
            async for events in rest:
                yield events
        except InferenceServerException as error:
            yield _event(of_server(error, reply.fields).document())
    yield b"data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {_ENCODE(document)}\n\n".encode()


async def _numbered(number: int, responses: AsyncGenerator[client.Response]) -> Responses:
    async with aclosing(responses):
        async for response in responses:
            yield number, response


async def _merged(streams: list[AsyncGenerator[client.Response]]) -> Responses:
    """What comes of all, as it comes; the first error ends them all."""
    queue: asyncio.Queue[tuple[int, client.Response] | Exception | None] = asyncio.Queue(len(streams))

    async def drain(responses: Responses) -> None:
        try:
            async for item in responses:
                await queue.put(item)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(drain(_numbered(number, stream))) for number, stream in enumerate(streams)]
    try:
        open_ = len(tasks)
        while open_:
            item = await queue.get()
            if isinstance(item, Exception):
                await asyncio.wait(tasks, timeout=_GRACE_SECONDS)
                raise item
            if item is None:
                open_ -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def _unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancelled, with `ClientDisconnect` raised, when the client goes away before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(http.receive())  # after the body only this can come
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
