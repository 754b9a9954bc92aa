"""The model of Triton's Python backend. It imports no torch: the engine has a process of its own."""

from __future__ import annotations

import json
import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import triton_python_backend_utils as pb_utils
from prometheus_client import CollectorRegistry, Counter, Metric

from paged_backend.config import EngineConfig
from paged_backend.engine_process import EngineProcess
from paged_backend.errors import InvalidArgument, PagedBackendError
from triton_server_model.door import Door
from triton_server_model.logs import TritonLog
from triton_server_model.metric_families import is_wanted
from triton_server_model.metrics import MetricsMirror
from triton_server_model.protocol import parse_request
from triton_server_model.protocol_table import NAMES, OUTPUTS, declaration
from triton_server_model.reply import Reply
from triton_server_model.sender import Sender
from triton_server_model.server_process import end_with_server, unloads_models, visible_devices
from triton_server_model.tracing import Tracer
from triton_server_model.unknown import UnknownParameters
from triton_server_model.vllm_config import engine_fields


class TritonPythonModel:
    """Batches all requests continuously on one engine, and streams their text back."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Declare the tensors of the protocol, so that config.pbtxt need not."""
        for name in NAMES:
            if name.tensor:
                config.add_input(declaration(name))
        for output in OUTPUTS:
            config.add_output(declaration(output))
        config.set_max_batch_size(0)
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that `engine.json`, or else vLLM's `model.json`, describes, in a process of its own."""
        end_with_server()
        self._name, self._finalizing = args["model_name"], False
        self._log = TritonLog(self._name)
        shows_metrics = is_wanted(args["model_config"])
        path = pathlib.Path(args["model_repository"], args["model_version"], "engine.json")
        if not path.exists() and path.with_name("model.json").exists():
            path = path.with_name("model.json")
        try:
            devices = visible_devices(args["model_instance_kind"], args["model_instance_device_id"])
            self._engine = EngineProcess(_read_config(path), environment=devices, with_parent=True)
        except (PagedBackendError, OSError, json.JSONDecodeError) as error:
            raise pb_utils.TritonModelException(f"{path}: {error}") from None  # the message says it all
        labels = {"model": args["model_name"], "version": args["model_version"]}
        groups = json.loads(args["model_config"])["instance_group"]
        if sum(group["count"] * max(1, len(group["gpus"])) for group in groups) > 1:
            labels["instance"] = args["model_instance_name"]
        self._sender, self._tracer = Sender(self._engine, self._on_end), Tracer(self._name)
        own = CollectorRegistry()
        self._errors = Counter("paged_backend_error_responses", "Error responses, by code", ["code"], registry=own)
        for code in ("CANCELLED", "UNAVAILABLE", "INVALID_ARG", "INTERNAL"):
            self._errors.labels(code)
        self._unknown = UnknownParameters(own)

        def collect() -> Iterator[Metric]:
            yield from self._engine.collect()
            yield from own.collect()

        self._metrics = MetricsMirror(collect, labels) if shows_metrics else None
        self._door = Door(self._name, self.execute)

    def execute(self, requests: list[Any]) -> None:
        """Hand each request to the engine, or answer it at once with what is wrong with it."""
        for request in requests:
            reply = Reply(request.get_response_sender(), request.request_id(), self._errors)
            try:
                inputs = {tensor.name(): tensor.as_numpy().tolist() for tensor in request.inputs()}
                parameters = json.loads(request.parameters() or "{}")
                generation = parse_request(inputs, parameters, request.timeout())
                self._unknown.count(generation.unknown)
                reply.begin(generation, self._tracer.follow(request, generation.params))
                self._sender.submit(reply, generation.prompt, generation.params, generation.options)
            except Exception as error:
                reply.fail(error)

    def is_ready(self) -> bool:
        """Whether the engine lives. Servers from 26.03 ask."""
        return self._engine.error is None

    def finalize(self) -> None:
        """End all threads and the engine's process. Triton calls this after every request's final response."""
        self._finalizing = True
        self._door.close()
        self._engine.close()
        self._sender.join()
        if self._metrics is not None:
            self._metrics.close()
        self._tracer.close()
        self._log.close()

    def _on_end(self) -> None:
        """The engine has died: unload the model, where the server lets it, or end the server, where that is wanted."""
        if self._finalizing:
            return
        if unloads_models():
            pb_utils.unload_model(self._name)
        elif os.environ.get("PAGED_BACKEND_END_WITH_ENGINE") == "1":
            os.kill(os.getppid(), signal.SIGTERM)


def _read_config(path: pathlib.Path) -> EngineConfig:
    fields = json.loads(path.read_text())
    if not isinstance(fields, dict):
        raise InvalidArgument(path.name, fields, "must be a JSON object of EngineConfig fields")
    config = EngineConfig(**(engine_fields(fields) if path.name == "model.json" else fields))
    local = path.parent / config.require_model()
    if local.exists() or config.require_model().startswith("."):
        config = config.model_copy(update={"model": str(local.resolve())})
    return config
