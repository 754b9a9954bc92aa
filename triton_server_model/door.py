"""A door through which other models of the same server pass requests on to ours: JSON over a socket.

Triton's own way, business logic scripting, does not stand many requests at once. In the Python backend of 24.10, at
most 32 wait for a first response, errors after that one are lost, and under load the stub dies (arrays are freed
without Python's lock) or stops for ever (two locks are taken in either order).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

_TRY_SECONDS = 0.1


def address(model: str) -> bytes:
    """Of the door of this server's `model`. Abstract, so that no file stays behind."""
    server = os.stat("/proc/self/ns/pid").st_ino, os.getppid()  # the parent of all its stubs
    return b"\0paged-backend-" + hashlib.sha256(repr((server, model)).encode()).hexdigest().encode()


class Door:
    """Hands requests that come through to `execute`, as Triton does, and hands their responses back.

    In comes `{"id", "inputs": {name: text}, "parameters", "timeout", "request_id"}` or `{"id", "cancel": true}`, out
    goes `{"id", "final", "outputs": {name: list}}` or `{"id", "final": true, "error", "code"}`.
    """

    def __init__(self, model: str, execute: Callable[[list[Any]], None]) -> None:
        self._address, self.execute = address(model), execute
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._closing, self._open, self._ended = threading.Event(), 0, threading.Condition()
        bound = self._bind()
        self._thread = threading.Thread(target=self._run, args=[bound], name="paged-door", daemon=True)
        self._thread.start()

    def enter(self) -> bool:
        """Count one more open request; False if the door is closing."""
        with self._ended:
            self._open += not self._closing.is_set()
            return not self._closing.is_set()

    def leave(self) -> None:
        """Count one less."""
        with self._ended:
            self._open -= 1
            self._ended.notify_all()

    def close(self) -> None:
        """Refuse more requests, and wait for the end of those that are open, as Triton does with its own."""
        with self._ended:
            self._closing.set()
            self._ended.wait_for(lambda: not self._open)
        with contextlib.suppress(OSError):  # it was never bound
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _bind(self) -> bool:
        try:
            self._listener.bind(self._address)
        except OSError:  # a version of the model that is being unloaded has it still
            return False
        self._listener.listen()
        return True

    def _run(self, bound: bool) -> None:
        while not bound:
            if self._closing.wait(_TRY_SECONDS):
                return
            bound = self._bind()
        with contextlib.suppress(OSError):  # it is closed
            while True:
                visitor = _Visitor(self, Connection(self._listener.accept()[0].detach()))
                threading.Thread(target=visitor.read, name="paged-visitor", daemon=True).start()


class _Visitor:
    """A connection of another model."""

    def __init__(self, door: Door, connection: Connection) -> None:
        self._door, self._connection = door, connection
        self._requests: dict[int, _Request] = {}
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="paged-visitor-out", daemon=True).start()

    def read(self) -> None:
        """Take requests until the other model closes the connection; what is open then is cancelled."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._take(json.loads(self._connection.recv_bytes()))
        for request in tuple(self._requests.values()):
            request.cancelled = True
        self._messages.put(None)

    def answer(self, message: dict[str, Any]) -> None:
        """Send a message; never blocks."""
        self._messages.put(json.dumps(message).encode())
        if message["final"]:
            del self._requests[message["id"]]
            self._door.leave()

    def _take(self, message: dict[str, Any]) -> None:
        if message.get("cancel"):
            if (request := self._requests.get(message["id"])) is not None:
                request.cancelled = True
        elif self._door.enter():
            self._requests[message["id"]] = request = _Request(message, self.answer)
            self._door.execute([request])
        else:
            refusal = {
                "id": message["id"],
                "final": True,
                "error": "the model is being unloaded",
                "code": "UNAVAILABLE",
            }
            self._messages.put(json.dumps(refusal).encode())

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the other model has closed the connection
            while (message := self._messages.get()) is not None:
                self._connection.send_bytes(message)


class _Request:
    """As much of Triton's request and its response sender as our model uses."""

    def __init__(self, message: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        self._message, self._answer = message, answer
        self.cancelled = False

    def request_id(self) -> str:
        """The client's name for it."""
        return str(self._message["request_id"])

    def inputs(self) -> list[Any]:
        """Tensors of one string each."""
        texts: dict[str, str] = self._message["inputs"]
        return [pb_utils.Tensor(name, np.array([text.encode()], dtype=np.object_)) for name, text in texts.items()]

    def parameters(self) -> str:
        """As JSON."""
        return json.dumps(self._message["parameters"])

    def timeout(self) -> int:
        """In microseconds; 0 is none."""
        return int(self._message["timeout"])

    def get_response_sender(self) -> _Request:
        """Itself."""
        return self

    def is_cancelled(self) -> bool:
        """Whether the other model has cancelled it, or has gone."""
        return self.cancelled

    def send(self, response: Any, flags: int = 0) -> None:
        """Hand back a response of Triton's kind."""
        message: dict[str, Any] = {"id": self._message["id"], "final": bool(flags)}
        if response.has_error():
            message |= {"error": response.error().message(), "code": response.error().code().name}
        else:
            message["outputs"] = {tensor.name(): _plain(tensor.as_numpy()) for tensor in response.output_tensors()}
        self._answer(message)


def _plain(array: Any) -> list[Any]:
    return [one.decode() if isinstance(one, bytes) else one for one in array.tolist()]
