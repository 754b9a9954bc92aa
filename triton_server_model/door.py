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
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

MOST_DOORS = 64
"""Of one model: each of its instances has one, while a version takes over from another those of both."""
_CLOSE_SECONDS = 5
"""How long another model may take to hear the last of it."""


def address(model: str, number: int) -> bytes:
    """Of a door of this server's `model`. Abstract, so that no file stays behind."""
    server = os.stat("/proc/self/ns/pid").st_ino, os.getppid()  # the parent of all its stubs
    return b"\0paged-backend-" + hashlib.sha256(repr((server, model, number)).encode()).hexdigest().encode()


class Door:
    """Hands requests that come through to `execute`, as Triton does, and hands their responses back.

    In come `{"id", "inputs": {name: text}, "parameters", "timeout", "request_id", "trace"}` and `{"id", "cancel": 1}`;
    out go `{"id", "final", "outputs": {name: list}}` and `{"id", "final": true, "error", "code"}`, and, when no more
    requests may come this way, `{"closing": 1}`.
    """

    def __init__(self, model: str, execute: Callable[[list[Any]], None]) -> None:
        self.execute = execute
        self._closing, self._open, self._ended = False, 0, threading.Condition()
        self._visitors = weakref.WeakSet[_Visitor]()  # which live as long as their threads and requests
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        for number in range(MOST_DOORS):
            with contextlib.suppress(OSError):  # another one has this address
                self._listener.bind(address(model, number))
                break
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, name="paged-door", daemon=True)
        self._thread.start()

    def enter(self) -> bool:
        """Count one more open request; False if the door is closing."""
        with self._ended:
            self._open += not self._closing
            return not self._closing

    def leave(self) -> None:
        """Count one less."""
        with self._ended:
            self._open -= 1
            self._ended.notify_all()

    def close(self) -> None:
        """Refuse more requests, and wait for the end of those that are open, as Triton does with its own."""
        with self._ended:
            self._closing = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        visitors = list(self._visitors)
        for visitor in visitors:
            visitor.send({"closing": 1})
        with self._ended:
            self._ended.wait_for(lambda: not self._open)
        for visitor in visitors:
            visitor.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                self._visitors.add(_Visitor(self, Connection(self._listener.accept()[0].detach())))


class _Visitor:
    """A connection of another model."""

    def __init__(self, door: Door, connection: Connection) -> None:
        self._door, self._connection = door, connection
        self._requests: dict[int, _Request] = {}
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="paged-visitor", daemon=True).start()
        self._writer = threading.Thread(target=self._write, name="paged-visitor-out", daemon=True)
        self._writer.start()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; never blocks."""
        self._messages.put(message)

    def answer(self, message: dict[str, Any]) -> None:
        """Send a response."""
        self.send(message)
        if message["final"]:
            del self._requests[message["id"]]
            self._door.leave()

    def close(self) -> None:
        """Hang up, after what is still to be sent."""
        self._messages.put(None)
        self._writer.join(_CLOSE_SECONDS)

    def _read(self) -> None:
        try:
            with contextlib.suppress(EOFError, OSError):  # the other model has gone
                while True:
                    self._take(json.loads(self._connection.recv_bytes()))
        finally:
            for request in tuple(self._requests.values()):
                request.cancelled = True
            self._messages.put(None)

    def _take(self, message: dict[str, Any]) -> None:
        if "cancel" in message:
            if (request := self._requests.get(message["id"])) is not None:
                request.cancelled = True
        elif self._door.enter():
            self._requests[message["id"]] = request = _Request(message, self.answer)
            self._door.execute([request])
        else:
            self.send(
                {"id": message["id"], "final": True, "error": "the model is being unloaded", "code": "UNAVAILABLE"}
            )

    def _write(self) -> None:
        with contextlib.suppress(OSError), self._connection:
            while (message := self._messages.get()) is not None:
                self._connection.send_bytes(json.dumps(message).encode())


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

    def trace(self) -> _Request:
        """Itself."""
        return self

    def get_context(self) -> str | None:
        """Of Triton's trace, if it makes one of this request."""
        context: str | None = self._message["trace"]
        return context

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
