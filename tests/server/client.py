"""Clients of the server under test, through the real tritonclient."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc as triton
from prometheus_client.parser import text_string_to_metric_families

from triton_server_model.launcher import MODEL_NAME, TritonServer

ENGINE = {"dtype": "float32", "device": "cpu", "max_num_seqs": 16, "max_waiting": 64, "num_blocks": 512}
CONTEXT = 512


class Stream:
    """One request on a gRPC stream of its own."""

    def __init__(self, address: str, model: str, inputs: list[Any], parameters: dict[str, Any] | None) -> None:
        self.chunks: list[str] = []
        self.error: str | None = None
        self.finals = 0
        self._heard = threading.Condition()
        self._client = triton.InferenceServerClient(address, channel_args=[("grpc.enable_http_proxy", 0)])
        self._client.start_stream(self._receive)
        self._client.async_stream_infer(model, inputs, parameters=parameters)

    def _receive(self, result: Any, error: Any) -> None:
        with self._heard:
            if error is not None:
                self.error = error.message()
            else:
                text = result.as_numpy("text_output")
                self.finals += result.get_response().parameters["triton_final_response"].bool_param
                self.chunks += [] if text is None else [text[0].decode()]
            self._heard.notify_all()

    def wait_for(self, condition: Callable[[], object]) -> None:
        with self._heard:
            assert self._heard.wait_for(lambda: condition() or self.error, timeout=60), "no response"

    def finish(self) -> str:
        """The whole text; `error` is set instead if the request failed."""
        self.wait_for(lambda: self.finals)
        self._client.stop_stream()  # drains, so that a second final response would be seen
        self._client.close()
        assert self.finals == (self.error is None)
        return "".join(self.chunks)

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


class Client:
    """What a test asks of the server."""

    def __init__(self, server: TritonServer) -> None:
        self.server = server
        self.http = httpx.Client(base_url=f"http://{server.address('http')}", trust_env=False, timeout=60)

    def stream(
        self,
        text: str | bytes,
        *,
        sampling: dict[str, Any] | str | bytes | None = None,
        stream: bool | None = True,
        exclude: bool | None = None,
        parameters: dict[str, Any] | None = None,
        model: str = MODEL_NAME,
    ) -> Stream:
        """Start a gRPC request. `sampling` that is no dict is sent as it is."""
        sampling = json.dumps(sampling) if isinstance(sampling, dict) else sampling
        values = {
            "text_input": text,
            "sampling_parameters": sampling,
            "stream": stream,
            "exclude_input_in_output": exclude,
        }
        inputs = []
        for name, value in values.items():
            if value is not None:
                flag = isinstance(value, bool)
                data = value.encode() if isinstance(value, str) else value
                inputs.append(triton.InferInput(name, [1], "BOOL" if flag else "BYTES"))
                inputs[-1].set_data_from_numpy(np.array([data], dtype=bool if flag else np.object_))
        return Stream(self.server.address("grpc"), model, inputs, parameters)

    def generate(self, body: dict[str, Any]) -> httpx.Response:
        return self.http.post(f"/v2/models/{MODEL_NAME}/generate", json=body)

    def metric(self, name: str, **labels: str) -> float | None:
        """A `paged_backend_` sample on the metrics port; None where there is no such sample."""
        text = httpx.get(f"http://{self.server.address('metrics')}/metrics", trust_env=False).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"paged_backend_{name}" and labels.items() <= sample.labels.items():
                    return sample.value
        return None

    def await_metric(self, name: str, value: float | None, **labels: str) -> None:
        eventually(lambda: self.metric(name, **labels) == value, lambda: f"{name} is {self.metric(name, **labels)}")


def eventually(condition: Callable[[], object], describe: Callable[[], str] = lambda: "", seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.1)
