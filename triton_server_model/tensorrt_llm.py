"""A second model, for clients of TensorRT-LLM's Triton models: it passes their requests on to `paged_llm`."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import triton_python_backend_utils as pb_utils

from paged_backend.errors import EngineDead
from triton_server_model.door import MOST_DOORS, address
from triton_server_model.logs import TritonLog
from triton_server_model.protocol import error_code
from triton_server_model.reply import send_error
from triton_server_model.server_process import end_with_server
from triton_server_model.tensorrt_llm_protocol import INPUTS, OUTPUTS, Answer, Question, translate
from triton_server_model.tracing import trace_context

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
"""Between looks for cancelled requests; TensorRT-LLM's backend takes as long."""
_SEARCH_SECONDS = 1.0
"""Between looks for further instances of the model."""
_MESSAGES = 256
"""Taken at once at most; what they have for one request leaves as one response."""


class TritonPythonModel:
    """Translates requests and responses; the model behind the door does the work."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Declare the tensors of `tensorrt_llm_protocol`, so that config.pbtxt need not."""
        for tensor in INPUTS:
            config.add_input(tensor)
        for tensor in OUTPUTS:
            config.add_output(tensor)
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Learn which model does the work; it need not be loaded yet."""
        end_with_server()
        self._log = TritonLog(args["model_name"])
        parameters = json.loads(args["model_config"])["parameters"]
        self._model = parameters.get("tensorrt_llm_model_name", {"string_value": "paged_llm"})["string_value"]
        self._lines: dict[int, _Line] = {}
        self._next_search = 0.0

    def execute(self, requests: list[Any]) -> None:
        """Pass each request on, or answer it at once with what is wrong with it."""
        for request in requests:
            responses = request.get_response_sender()
            try:
                question = translate({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
                self._line().pass_on(_Call(Answer(question), responses), question, request)
            except Exception as error:
                if error_code(error) == "INTERNAL":
                    logger.exception("the request failed", extra={"request_id": request.request_id()})
                send_error(responses, f"Error generating stream: {error}", error_code(error))

    def finalize(self) -> None:
        """End all threads. Triton calls this after every request's final response."""
        for line in self._lines.values():
            line.close()
        self._log.close()

    def _line(self) -> _Line:
        """To the instance with the fewest requests from here. Raises `EngineDead` if the model is not loaded."""
        if time.monotonic() >= self._next_search or not any(line.open for line in self._lines.values()):
            self._next_search = time.monotonic() + _SEARCH_SECONDS
            for number in range(MOST_DOORS):
                if number not in self._lines or not self._lines[number].open:
                    with contextlib.suppress(OSError):  # there is none
                        self._lines[number] = _Line(address(self._model, number))
        lines = [line for line in self._lines.values() if line.open]
        if not lines:
            raise EngineDead(f"model {self._model!r}, which does the work, is not loaded")
        return min(lines, key=lambda line: len(line.calls))


class _Line:
    """A connection to a model's door, and the requests that went through it; a thread answers them."""

    def __init__(self, door: bytes) -> None:
        """Raises OSError if nobody is there."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(door)
        except OSError:
            self._socket.close()
            raise
        self._connection = Connection(os.dup(self._socket.fileno()))
        self.calls: dict[int, _Call] = {}
        """Those that are open."""
        self._names = itertools.count()
        self._next_look = 0.0
        self.open = True
        """Whether more requests may go through."""
        self._sending = threading.Lock()  # and guards `open`
        self._thread = threading.Thread(target=self._run, name="paged-line", daemon=True)
        self._thread.start()

    def pass_on(self, call: _Call, question: Question, request: Any) -> None:
        """Ask `question` for Triton's `request`. Raises `EngineDead` if the model has gone."""
        message = {
            "id": next(self._names),
            "inputs": {"text_input": question.prompt, "sampling_parameters": json.dumps(question.fields)},
            "parameters": json.loads(request.parameters() or "{}"),
            "timeout": request.timeout(),
            "request_id": request.request_id(),
            "trace": trace_context(request),
        }
        with self._sending:
            if not self.open:
                raise EngineDead("the model that does the work has gone")
            self.calls[message["id"]] = call
            self._send(message)

    def close(self) -> None:
        """End the thread."""
        with contextlib.suppress(OSError):  # the model has gone
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                if self._connection.poll(_LOOK_SECONDS):
                    self._take()
                if time.monotonic() >= self._next_look:
                    self._look()
                    self._next_look = time.monotonic() + _LOOK_SECONDS
        except (EOFError, OSError):
            pass  # the model has gone
        except Exception:
            logger.exception("a line to the model that does the work is cut")
        with self._sending:
            self.open = False
        for call in self.calls.values():
            call.fail("the model that does the work has gone", "UNAVAILABLE")
        self._connection.close()
        self._socket.close()

    def _take(self) -> None:
        """Answer with what has come."""
        heard: dict[int, list[Mapping[str, Any]]] = {}
        try:
            for _ in range(_MESSAGES):
                message = json.loads(self._connection.recv_bytes())
                if "closing" in message:
                    self.open = False
                elif message["id"] in self.calls:
                    heard.setdefault(message["id"], []).append(message)
                if not self._connection.poll():
                    break
        finally:  # the model may be gone by now
            for name, messages in heard.items():
                self._answer(name, messages)

    def _answer(self, name: int, messages: list[Mapping[str, Any]]) -> None:
        call = self.calls[name]
        try:
            ended = call.send(messages)
        except Exception as error:  # ends this request alone
            logger.exception("a request cannot be answered; it is cancelled")
            self._cancel(name)
            call.fail(f"Error generating stream: {error}", error_code(error))
            ended = True
        if ended:
            del self.calls[name]

    def _look(self) -> None:
        """Pass cancellation on."""
        for name, call in tuple(self.calls.items()):
            if call.is_cancelled():
                self._cancel(name)

    def _cancel(self, name: int) -> None:
        with self._sending:
            self._send({"id": name, "cancel": 1})

    def _send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the model has gone: the thread finds that out, and fails all calls
            self._connection.send_bytes(json.dumps(message).encode())


class _Call:
    """One request that was passed on."""

    def __init__(self, answer: Answer, responses: Any) -> None:
        """`responses` is Triton's response sender."""
        self._responses = responses
        self._answer, self._cancelled = answer, False

    def send(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Send what has come for it; whether that was the last."""
        for message in messages:
            if "outputs" in message:
                self._answer.add(message["outputs"])
        last = messages[-1]
        complete = last["final"] and "error" not in last
        responses = self._answer.take(ended=complete)
        for number, tensors in enumerate(responses, start=1):
            response = pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in tensors.items()])
            final = complete and number == len(responses)
            self._responses.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
        if "error" in last:
            send_error(self._responses, last["error"], last["code"])
        return bool(last["final"])

    def fail(self, message: str, code: str) -> None:
        """End it with an error, if it can be told."""
        with contextlib.suppress(Exception):
            send_error(self._responses, message, code)

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled it or gone; told once only."""
        if self._cancelled:
            return False
        try:
            self._cancelled = self._responses.is_cancelled()
        except Exception:
            logger.exception("a request cannot be asked about; it is cancelled")
            self._cancelled = True
        return self._cancelled
