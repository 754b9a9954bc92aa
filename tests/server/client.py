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
ENGINE |= {"scheduling_policy": "priority", "stream_share": 0.5}  # so that few tokens come in several responses
CONTEXT = 512


class Stream:
    """One request on a gRPC stream of its own."""

    def __init__(
        self,
        address: str,
        inputs: list[Any],
        parameters: dict[str, Any] | None,
        model: str = MODEL_NAME,
        **request: Any,
    ) -> None:
        self.chunks: list[str] = []
        """Texts of the first output."""
        self.responses: list[dict[str, Any]] = []
        """All outputs by name, as lists; strings decoded."""
        self.error: str | None = None
        self.finals = 0
        self.ended = 0.0
        """When its last response came, by `time.monotonic`."""
        self._heard = threading.Condition()
        self._client = triton.InferenceServerClient(address, channel_args=[("grpc.enable_http_proxy", 0)])
        self._client.start_stream(self._receive)
        self._client.async_stream_infer(model, inputs, parameters=parameters, **request)

    def _receive(self, result: Any, error: Any) -> None:
        with self._heard:
            if error is not None:
                self.error = error.message()
            else:
                response = result.get_response()
                self.finals += response.parameters["triton_final_response"].bool_param
                self.ended = time.monotonic()
                outputs = {output.name: result.as_numpy(output.name).tolist() for output in response.outputs}
                for name, values in outputs.items():
                    outputs[name] = [value.decode() if isinstance(value, bytes) else value for value in values]
                if outputs:
                    self.responses.append(outputs)
                    self.chunks.append(outputs["text_output"][0])
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
        text: str | bytes | None = None,
        *,
        sampling: dict[str, Any] | str | bytes | None = None,
        stream: bool | None = True,
        exclude: bool | None = None,
        parameters: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None,
        **request: Any,
    ) -> Stream:
        """Start a gRPC request; `inputs` are further tensors. `sampling` that is no dict is sent as it is."""
        sampling = json.dumps(sampling) if isinstance(sampling, dict) else sampling
        values = {
            "text_input": text,
            "sampling_parameters": sampling,
            "stream": stream,
            "exclude_input_in_output": exclude,
        } | (inputs or {})
        tensors = [_tensor(name, value) for name, value in values.items() if value is not None]
        return Stream(self.server.address("grpc"), tensors, parameters, **request)

    def ask(self, text: str | bytes | None = None, **request: Any) -> dict[str, Any]:
        """The outputs of a request without `stream`; its error is raised."""
        stream = self.stream(text, **{"stream": None, "exclude": True} | request)
        stream.finish()
        assert stream.error is None, stream.error
        (outputs,) = stream.responses
        return outputs

    def refusal(self, text: str | bytes | None = None, **request: Any) -> str:
        """The error of a request."""
        stream = self.stream(text, **request)
        stream.finish()
        assert stream.error is not None
        return stream.error

    def generate(self, body: dict[str, Any]) -> httpx.Response:
        return self.http.post(f"/v2/models/{MODEL_NAME}/generate", json=body)

    def unload(self, model: str) -> None:
        """Unload a model, and wait until it is."""
        self.http.post(f"/v2/repository/models/{model}/unload").raise_for_status()
        unloaded = {"name": model, "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
        eventually(lambda: unloaded in self.http.post("/v2/repository/index").json())

    def metric(self, name: str, /, **labels: str) -> float | None:
        """A `paged_backend_` sample on the metrics port; None where there is no such sample."""
        text = httpx.get(f"http://{self.server.address('metrics')}/metrics", trust_env=False).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"paged_backend_{name}" and labels.items() <= sample.labels.items():
                    return sample.value
        return None

    def settle(self) -> None:
        """Wait until the metrics port shows all that happened before."""
        labels = {"name": "test_settle"}
        count = self.metric("unknown_parameters_total", **labels) or 0
        self.refusal("x", parameters={"test_settle": 1, "n": 128})  # counted, but no token is made for it
        self.await_metric("unknown_parameters_total", count + 1, **labels)

    def await_metric(self, name: str, value: float | None, /, **labels: str) -> None:
        eventually(lambda: self.metric(name, **labels) == value, lambda: f"{name} is {self.metric(name, **labels)}")


def _tensor(name: str, value: Any) -> Any:
    """Of one element, or of a list of them: strings, bytes, booleans or 32-bit integers."""
    values = [one.encode() if isinstance(one, str) else one for one in (value if isinstance(value, list) else [value])]
    kind, dtype = {bool: ("BOOL", np.bool_), bytes: ("BYTES", np.object_), int: ("INT32", np.int32)}[type(values[0])]
    tensor = triton.InferInput(name, [len(values)], kind)
    tensor.set_data_from_numpy(np.array(values, dtype=dtype))
    return tensor


def eventually(condition: Callable[[], object], describe: Callable[[], str] = lambda: "", seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.1)
