"""Talks to the tritonserver: one gRPC stream a request, all of them on one connection."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

Inputs = Mapping[str, str | bool | Sequence[int]]
"""Input tensors of the model by name, each of one element or a list of token ids."""


@dataclass(frozen=True, slots=True)
class Output:
    """What came for one of a request's `n` outputs since the response before."""

    text: str
    finish_reason: str | None
    """None while more is to come."""
    num_tokens: int
    """0 unless the request asks for counts."""
    logprobs: list[list[dict[str, Any]]]
    """For each new token, itself and then the likeliest in its place: `logprob`, `rank`, `decoded_token`. Empty unless
    the request asks for them."""


@dataclass(frozen=True, slots=True)
class Response:
    """One response of the model."""

    num_prompt_tokens: int
    """0 unless the request asks for counts."""
    outputs: list[Output]
    """One for each of the request's `n`."""


class TritonClient:
    """Requests to one tritonserver, from one event loop. All methods raise `InferenceServerException`."""

    def __init__(self, address: str) -> None:
        """`address` is `host:port` of the server's gRPC."""
        sizes = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self._client = InferenceServerClient(address, channel_args=[*sizes, ("grpc.enable_http_proxy", 0)])

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    async def models(self) -> list[str]:
        """Names of the models that are ready."""
        index = await self._client.get_model_repository_index()
        return sorted({model.name for model in index.models if model.state == "READY"})

    async def ready(self) -> bool:
        """Whether all loaded models are, and there is one."""
        models = await self.models()
        return bool(models) and all([await self._client.is_model_ready(model) for model in models])

    async def generate(self, model: str, inputs: Inputs, request_id: str) -> AsyncGenerator[Response]:
        """The responses to one request, which is cancelled when this iterator is closed or its task is cancelled."""

        async def request() -> AsyncIterator[dict[str, Any]]:
            tensors = [_tensor(name, value) for name, value in inputs.items()]
            yield {"model_name": model, "inputs": tensors, "request_id": request_id}

        # With this header an error has its status code, and ends the stream: so no stream is shared.
        call = self._client.stream_infer(request(), headers={"triton_grpc_error": "true"})
        try:
            # To the end of the stream, not only to the last response: servers leak what is dropped in between.
            async for result, error in call:
                if error is not None:
                    raise error
                message = result.get_response()
                if message.outputs:
                    yield _response(message)
        except grpc.RpcError as error:
            raise InferenceServerException(error.details(), str(error.code())) from None
        finally:
            call.cancel()


def _tensor(name: str, value: str | bool | Sequence[int]) -> InferInput:
    match value:
        case bool():
            datatype, data = "BOOL", np.array([value])
        case str():
            datatype, data = "BYTES", np.array([value.encode()], dtype=np.object_)
        case _:
            datatype, data = "INT32", np.array(value, dtype=np.int32)
    tensor = InferInput(name, list(data.shape), datatype)
    tensor.set_data_from_numpy(data)
    return tensor


def _response(message: Any) -> Response:
    # InferResult.as_numpy looks through all outputs for each of them: three times as slow.
    tensors = dict(zip((output.name for output in message.outputs), message.raw_output_contents, strict=True))
    outputs = []
    for index, text in enumerate(_strings(tensors["text_output"])):
        ...
    return Response(0, outputs)
