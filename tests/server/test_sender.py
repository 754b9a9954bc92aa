"""The thread that answers requests, with an engine and a server that are none."""

from __future__ import annotations

import queue
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from paged_backend.errors import EngineDead, Overloaded
from paged_backend.outputs import failed
from paged_backend.request import RequestOutput


class FakeEngine:
    """Refuses all requests but those whose prompt is "run", of which nothing comes."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.aborted = threading.Event()
        self._refused: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

    def submit(self, request_id: str, prompt: str, params: None, options: None) -> None:
        if prompt != "run":
            self._refused.put(failed(request_id, Overloaded("too many")))

    def receive(self, timeout: float) -> list[RequestOutput]:
        if self._refused.empty():
            time.sleep(timeout)
        return [self._refused.get() for _ in range(self._refused.qsize())]

    def abort(self, request_id: str) -> None:
        self.aborted.set()


class FakeReply:
    def __init__(self) -> None:
        self.open, self.cancelled = True, False
        self.responses = SimpleNamespace(is_cancelled=lambda: self.cancelled)

    def add(self, outputs: Any) -> None:
        self.open = False


def test_a_cancellation_is_seen_after_many_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 are asked about at once, each so often: with 5,000 that were refused among them, it would take a minute."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace())
    from triton_server_model.sender import Sender

    engine: Any = FakeEngine()
    sender = Sender(engine, lambda: None)
    replies: list[Any] = [FakeReply() for _ in range(5000)]
    for reply in replies:
        sender.submit(reply, "refuse", None, None)
    running: Any = [FakeReply() for _ in range(65)]
    for reply in running:
        sender.submit(reply, "run", None, None)
    running[-1].cancelled = True
    assert engine.aborted.wait(10)
    assert not any(reply.open for reply in replies)
    engine.error = EngineDead("")
    sender.join()
