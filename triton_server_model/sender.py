"""The one thread that answers requests and notices clients that have gone."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from paged_backend.request import RequestOutput
from triton_server_model.reply import Reply

logger = logging.getLogger(__name__)

_GATHER_SECONDS = 0.001
"""Pause before each round: the outputs of one step arrive together. Bursts overrun the server's HTTP front end."""
_POLL_SECONDS = 0.025
_POLLS = 64
"""Requests asked about each time at most: `is_cancelled` is a 10 us call to another process."""


class Sender:
    """Sends the outputs of all requests from one thread, and polls all open requests for cancellation.

    A send blocks for tens of microseconds. Outputs that come meanwhile for one request leave as one response, so a slow
    server costs responses, never steps of the engine.
    """

    def __init__(self, abort: Callable[[str], None]) -> None:
        self._abort = abort
        self._queue: queue.SimpleQueue[tuple[Reply, RequestOutput | str] | None] = queue.SimpleQueue()
        self._watched: deque[tuple[Reply, str]] = deque()
        self._next_poll = 0.0
        self._thread = threading.Thread(target=self._run, name="paged-sender", daemon=True)
        self._thread.start()

    def put(self, reply: Reply, output: RequestOutput) -> None:
        """Hand over an output to send; never blocks."""
        self._queue.put((reply, output))

    def watch(self, reply: Reply, request_id: str) -> None:
        """Abort `request_id` when its client cancels."""
        self._queue.put((reply, request_id))

    def close(self) -> None:
        """Send what was put and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        running = True
        while running:
            pending: dict[Reply, list[RequestOutput]] = {}
            for item in self._take():
                match item:
                    case None:
                        running = False
                    case reply, str(request_id):
                        self._watched.append((reply, request_id))
                    case reply, output:
                        pending.setdefault(reply, []).append(output)
            for reply, outputs in pending.items():
                self._try(Reply.add, reply, outputs, outputs[-1].request_id)
            if time.monotonic() >= self._next_poll:
                for reply, request_id in [self._watched.popleft() for _ in range(min(_POLLS, len(self._watched)))]:
                    self._try(self._poll, reply, request_id, request_id)
                self._next_poll = time.monotonic() + _POLL_SECONDS

    def _try(self, action: Callable[[Reply, Any], None], reply: Reply, argument: object, request_id: str) -> None:
        try:
            action(reply, argument)
        except Exception:  # ends this request alone, never the thread
            extra = {"request_id": reply.request_id}
            logger.exception("request %s cannot be answered; it is aborted", request_id, extra=extra)
            self._abort(request_id)

    def _take(self) -> list[tuple[Reply, RequestOutput | str] | None]:
        try:
            items = [self._queue.get(timeout=_POLL_SECONDS if self._watched else None)]
        except queue.Empty:
            return []
        time.sleep(_GATHER_SECONDS)
        return items + [self._queue.get_nowait() for _ in range(self._queue.qsize())]

    def _poll(self, reply: Reply, request_id: str) -> None:
        if not reply.open:
            return
        if reply.responses.is_cancelled():
            self._abort(request_id)  # its last output, "abort", ends the reply
        else:
            self._watched.append((reply, request_id))
