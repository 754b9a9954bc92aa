"""Talks to the tritonserver: one gRPC stream a request, all of them on one connection."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

Inputs = Mapping[str, str | bool | Sequence[int]]
"""Input tensors of the model by name, each of one element or a list of token ids."""


Token = list[dict[str, Any]]
"""The token in one place of a text, then the likeliest there: each with `logprob`, `rank` and `decoded_token`. Empty
for the first token of a prompt."""


@dataclass(slots=True)  # not frozen: one is made for every chunk
class Output:
    """What came for one of a request's `n` outputs since the response before."""

    index: int
    text: str
    finish_reason: str | None
    """None while more is to come."""
    num_tokens: int
    """0 unless the request asks for counts."""
    logprobs: list[Token]
    """Empty unless the request asks for them."""


@dataclass(slots=True)
class Response:
    """One response of the model."""

    outputs: list[Output]
    """Those that had not ended before."""
    num_prompt_tokens: int
    """0 unless the request asks for counts."""
    num_cached_tokens: int
    """Of the prompt; likewise."""
    prompt_logprobs: list[Token]
    """In the first response, if the request asks for them."""


class TritonClient:
    """Requests to one tritonserver, from one event loop. All methods raise `InferenceServerException`."""

    def __init__(self, address: str, models: Collection[str] = ()) -> None:
        """`address` is `host:port` of the server's gRPC. Without `models`, they are those in the server's index."""
        self._models = models
        sizes = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self._client = InferenceServerClient(address, channel_args=[*sizes, ("grpc.enable_http_proxy", 0)])

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    async def models(self) -> list[str]:
        """Names of the models that are ready and take `messages`, as `tensorrt_llm_bls` does not."""
        names = []
        for name in await self._ready_models():
            with contextlib.suppress(InferenceServerException):  # unloaded meanwhile
                model = await self._client.get_model_metadata(name)
                if any(tensor.name == "messages" for tensor in model.inputs):
                    names.append(name)
        return names

    async def ready(self) -> bool:
        """Whether all loaded models are, and there is one."""
        models = await self._ready_models()
        return bool(models) and all([await self._client.is_model_ready(model) for model in models])

    async def _ready_models(self) -> list[str]:
        if self._models:
            return [model for model in self._models if await self._client.is_model_ready(model)]
        index = await self._client.get_model_repository_index()
        return sorted({model.name for model in index.models if model.state == "READY"})

    async def generate(self, model: str, inputs: Inputs, request_id: str) -> AsyncGenerator[Response]:
        """The responses to one request, which is cancelled when this iterator is closed or its task is cancelled."""

        tensors = [_tensor(name, value) for name, value in inputs.items()]

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": model, "request_id": request_id, "inputs": tensors}

        failure, ended = None, set[int]()
        call = self._client.stream_infer(requests())  # its own stream: only a whole one can be cancelled
        try:
            # To the end of the stream, not only to the last response: a server that loses a stream in between may
            # never be able to unload the model.
            async for result, error in call:
                failure = failure or error
                if error is None and (message := result.get_response()).outputs:
                    yield _response(message, ended)
            if failure is not None:
                raise failure
        except grpc.RpcError as error:
            raise InferenceServerException(error.details(), str(error.code())) from None
        finally:
            call.cancel()


def _tensor(name: str, value: str | bool | Sequence[int]) -> InferInput:
    match value:
        case bool():
            datatype, data = "BOOL", np.array([value])
        case str():
            # Half a surrogate pair is for the model to refuse.
            datatype, data = "BYTES", np.array([value.encode(errors="surrogatepass")], dtype=np.object_)
        case _:
            datatype, data = "INT32", np.array(value, dtype=np.int32)
    tensor = InferInput(name, list(data.shape), datatype)
    tensor.set_data_from_numpy(data)
    return tensor


def _response(message: Any, ended: set[int]) -> Response:
    """`ended` are the outputs that had their last response; it is brought up to date."""
    # InferResult.as_numpy searches all outputs for each of them, and takes three times as long.
    tensors = dict(zip((output.name for output in message.outputs), message.raw_output_contents, strict=True))
    texts, reasons = _strings(tensors["text_output"]), _strings(tensors["finish_reason"])
    counts = _numbers(tensors.get("num_output_tokens", b"")) or [0] * len(texts)
    logprobs = _strings(tensors.get("logprobs", b"")) or ["null"] * len(texts)
    outputs = [
        Output(index, texts[index], None if reason == "None" else reason, counts[index], _tokens(logprobs[index]))
        for index, reason in enumerate(reasons)
        if index not in ended
    ]
    ended.update(output.index for output in outputs if output.finish_reason is not None)
    (num_prompt_tokens,) = _numbers(tensors.get("num_input_tokens", b"")) or (0,)
    (num_cached_tokens,) = _numbers(tensors.get("num_cached_tokens", b"")) or (0,)
    (prompt_logprobs,) = _strings(tensors.get("prompt_logprobs", b"")) or ("null",)
    return Response(outputs, num_prompt_tokens, num_cached_tokens, _tokens(prompt_logprobs))


def _strings(data: bytes) -> list[str]:
    """Of a BYTES tensor: each is preceded by its length."""
    strings, start = [], 4
    while start <= len(data):
        end = start + int.from_bytes(data[start - 4 : start], "little")
        strings.append(data[start:end].decode())
        start = end + 4
    return strings


def _numbers(data: bytes) -> list[int]:
    """Of a UINT32 tensor."""
    return list(memoryview(data).cast("I"))


def _tokens(text: str) -> list[Token]:
    return [list(token.values()) for token in json.loads(text) or ()]
