"""The one thread that answers requests and notices clients that have gone."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from paged_backend.engine_process import EngineProcess
from paged_backend.errors import EngineDead
from paged_backend.pacing import num_cores
from paged_backend.request import RequestOptions, RequestOutput, SamplingParams
from triton_server_model.reply import Reply

if TYPE_CHECKING:
    from paged_backend.intake import Prompt

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.001
"""After each round of responses: without any pause they overrun the server's HTTP front end."""
_POLL_SECONDS = 0.025
"""At least, between two times that some requests are asked about."""
_POLL_CORE_SECONDS = 0.1
"""For each of them, of the time of all cores: `is_cancelled` is a call to another process, of 10 us if cores are free,
but where none is, asking takes the engine much longer."""
_POLLS = 4 * num_cores()
"""Requests asked about each time at most."""
_IDLE_SECONDS = 0.1


class Sender:
    """Sends the outputs of all requests from one thread, and polls all open requests for cancellation.

    A send blocks for tens of microseconds. Outputs that come meanwhile for one request leave as one response, so a slow
    server costs responses, never steps of the engine. The thread ends with the engine, when every request is answered.
    """

    def __init__(self, engine: EngineProcess, on_end: Callable[[], None]) -> None:
        """`on_end` is the last thing that the thread calls."""
        self._engine, self._on_end = engine, on_end
        self._names = itertools.count()
        self._replies: dict[str, Reply] = {}
        self._next_poll, self._polled = 0.0, 0
        self._cancelled: set[str] = set()
        """Those that the engine was told about, and that have not ended."""
        self._thread = threading.Thread(target=self._run, name="paged-sender", daemon=True)
        self._thread.start()

    def submit(self, reply: Reply, prompt: Prompt, params: SamplingParams, options: RequestOptions) -> None:
        """Run a request that `reply` answers. Raises `EngineDead`, with nothing accepted."""
        request_id = f"request-{next(self._names)}"
        self._replies[request_id] = reply  # before its first output comes
        try:
            self._engine.submit(request_id, prompt, params, options)
        except BaseException:
            if self._replies.pop(request_id, None) is not None:  # else the thread has failed it
                raise

    def join(self) -> None:
        """Wait for the end of the thread, after that of the engine."""
        self._thread.join()

    def _run(self) -> None:
        while self._engine.error is None:
            try:
                self._round()
            except Exception as error:  # nobody knows which outputs are lost
                logger.exception("requests cannot be answered; the engine is ended")
                while self._replies:
                    with contextlib.suppress(Exception):  # one that cannot be told does not keep it from others
                        self._replies.popitem()[1].fail(EngineDead(f"the engine's outputs cannot be sent: {error}"))
                self._engine.process.kill()
        self._on_end()

    def _round(self) -> None:
        pending: dict[str, list[RequestOutput]] = {}
        wait = min(max(0.0, self._next_poll - time.monotonic()), _IDLE_SECONDS) if self._replies else _IDLE_SECONDS
        for output in self._engine.receive(wait):
            pending.setdefault(output.request_id, []).append(output)
        for request_id, outputs in pending.items():
            self._answer(request_id, outputs)
        if (now := time.monotonic()) >= self._next_poll:
            self._next_poll = now + self._poll()
        if pending:
            time.sleep(_PAUSE_SECONDS)

    def _answer(self, request_id: str, outputs: list[RequestOutput]) -> None:
        reply, last = self._replies.get(request_id), outputs[-1]
        if reply is None:
            return  # it has been failed
        if last.finished:
            del self._replies[request_id]
            self._cancelled.discard(request_id)
        try:
            reply.add(outputs)
            if not (reply.open or last.finished):  # one of several outputs has failed
                self._engine.abort(request_id)
        except Exception as error:  # ends this request alone, never the thread
            extra = {"request_id": reply.request_id}
            logger.exception("%s cannot be answered; it is aborted", request_id, extra=extra)
            self._engine.abort(request_id)
            with contextlib.suppress(Exception):
                reply.fail(error)

    def _poll(self) -> float:
        """Ask about the next requests, and after the last of them about the first again; returns seconds until more.

        These are none if one was cancelled: a client that goes away may leave many.
        """
        replies = tuple(self._replies.items())
        waiting = [(one, reply) for one, reply in replies if reply.open and one not in self._cancelled]
        begin = self._polled if self._polled < len(waiting) else 0
        self._polled = begin + _POLLS
        asked, before = waiting[begin : self._polled], len(self._cancelled)
        for request_id, reply in asked:
            try:
                cancelled = reply.responses.is_cancelled()
            except Exception:
                logger.exception("%s cannot be asked about; it is aborted", request_id)
                cancelled = True
            if cancelled:
                self._cancelled.add(request_id)
                self._engine.abort(request_id)  # its last output, "abort", ends the reply
        if found := len(self._cancelled) - before:
            self._polled -= found  # they wait no more
            return 0.0
        return max(_POLL_SECONDS, len(asked) * _POLL_CORE_SECONDS / num_cores())
