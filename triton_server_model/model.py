"""The model of Triton's Python backend. It imports no torch: the engine has a process of its own."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import triton_python_backend_utils as pb_utils

from paged_backend.config import EngineConfig
from paged_backend.engine_process import EngineProcess
from paged_backend.errors import InvalidArgument, PagedBackendError
from triton_server_model.metrics import MetricsMirror
from triton_server_model.protocol import INPUTS, OUTPUT, parse_request
from triton_server_model.reply import Reply
from triton_server_model.sender import Sender
from triton_server_model.server_process import end_with_server, unloads_models, visible_devices


class TritonPythonModel:
    """Batches all requests continuously on one engine, and streams their text back."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Declare the tensors of `protocol`, so that config.pbtxt need not."""
        for tensor in INPUTS:
            config.add_input(tensor)
        config.add_output(OUTPUT)
        config.set_max_batch_size(0)
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that `engine.json`, in the version directory, describes, in a process of its own."""
        end_with_server()
        self._name, self._finalizing = args["model_name"], False
        path = pathlib.Path(args["model_repository"], args["model_version"], "engine.json")
        try:
            devices = visible_devices(args["model_instance_kind"], args["model_instance_device_id"])
            self._engine = EngineProcess(_read_config(path), environment=devices)
        except (PagedBackendError, OSError, json.JSONDecodeError) as error:
            raise pb_utils.TritonModelException(f"{path}: {error}") from None  # the message says it all
        # Equal labels from two stubs, of two instances or while one replaces another, hang or crash the server (24.10).
        process = str(self._engine.process.pid)
        labels = {"model": args["model_name"], "version": args["model_version"], "engine_pid": process}
        self._sender = Sender(self._engine, self._on_end)
        self._metrics = MetricsMirror(self._engine.collect, labels)

    def execute(self, requests: list[Any]) -> None:
        """Hand each request to the engine, or answer it at once with what is wrong with it."""
        for request in requests:
            reply = Reply(request.get_response_sender())
            try:
                inputs = {tensor.name(): tensor.as_numpy().item() for tensor in request.inputs()}
                generation = parse_request(inputs, json.loads(request.parameters() or "{}"))
                reply.begin(generation)
                self._sender.submit(reply, generation.prompt, generation.params)
            except Exception as error:
                reply.fail(error)

    def is_ready(self) -> bool:
        """Whether the engine lives. Servers from 26.03 ask."""
        return self._engine.error is None

    def finalize(self) -> None:
        """End all threads and the engine's process. Triton calls this after every request's final response."""
        self._finalizing = True
        self._engine.close()
        self._sender.join()
        self._metrics.close()

    def _on_end(self) -> None:
        """The engine has died: stop being ready, where the server lets a model do so."""
        if not self._finalizing and unloads_models():
            pb_utils.unload_model(self._name)


def _read_config(path: pathlib.Path) -> EngineConfig:
    fields = json.loads(path.read_text())
    if not isinstance(fields, dict):
        raise InvalidArgument("engine.json", fields, "must be a JSON object of EngineConfig fields")
    config = EngineConfig(**fields)
    local = path.parent / config.require_model()
    if local.exists() or config.require_model().startswith("."):
        config = config.model_copy(update={"model": str(local.resolve())})
    return config
