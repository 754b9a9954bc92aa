"""The model of Triton's Python backend. A second process imports it for `auto_complete_config` alone: no torch here."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import triton_python_backend_utils as pb_utils
from prometheus_client import CollectorRegistry

from paged_backend.config import EngineConfig
from paged_backend.errors import InvalidArgument, PagedBackendError
from triton_server_model.metrics import MetricsMirror
from triton_server_model.protocol import parse_request
from triton_server_model.protocol_table import NAMES, OUTPUTS, declaration
from triton_server_model.reply import Reply
from triton_server_model.sender import Sender
from triton_server_model.unknown import UnknownParameters


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
        """Load the engine that `engine.json`, in the version directory, describes."""
        path = pathlib.Path(args["model_repository"], args["model_version"], "engine.json")
        try:
            config = _read_config(path)
            from paged_backend.engine import Engine
            from paged_backend.engine_thread import EngineThread

            self._engine = EngineThread(lambda: Engine(config))
        except (PagedBackendError, OSError, json.JSONDecodeError) as error:
            raise pb_utils.TritonModelException(f"{path}: {error}") from None  # the message says it all
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._sender = Sender(self._engine.abort)
        registry = CollectorRegistry()
        registry.register(self._engine.engine.metrics.registry)
        self._unknown = UnknownParameters(registry)
        self._metrics = MetricsMirror(registry, labels)

    def execute(self, requests: list[Any]) -> None:
        """Hand each request to the engine, or answer it at once with what is wrong with it."""
        for request in requests:
            reply = Reply(request.get_response_sender())
            try:
                inputs = {tensor.name(): tensor.as_numpy().tolist() for tensor in request.inputs()}
                parameters = json.loads(request.parameters() or "{}")
                generation = parse_request(inputs, parameters, request.timeout())
                reply.begin(generation)
                self._unknown.count(generation.unknown)
                request_id = self._engine.submit(
                    generation.prompt,
                    generation.params,
                    generation.options,
                    on_output=functools.partial(self._sender.put, reply),
                )
            except Exception as error:
                reply.fail(error)
            else:
                self._sender.watch(reply, request_id)

    def is_ready(self) -> bool:
        """Whether the engine lives. Servers from 26.03 ask."""
        return self._engine.error is None

    def finalize(self) -> None:
        """End all threads. Triton calls this after every request's final response."""
        self._engine.close()
        self._sender.close()
        self._metrics.close()


def _read_config(path: pathlib.Path) -> EngineConfig:
    fields = json.loads(path.read_text())
    if not isinstance(fields, dict):
        raise InvalidArgument("engine.json", fields, "must be a JSON object of EngineConfig fields")
    config = EngineConfig(**fields)
    local = path.parent / config.require_model()
    if local.exists() or config.require_model().startswith("."):
        config = config.model_copy(update={"model": str(local.resolve())})
    return config
