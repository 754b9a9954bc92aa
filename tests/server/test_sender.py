"""The thread that answers requests, with an engine and a server that are none."""

from __future__ import annotations

import queue
import sys
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
        self.aborted: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._refused: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

    def submit(self, request_id: str, prompt: str, params: None, options: None) -> None:
        if prompt != "run":
            self._refused.put(failed(request_id, Overloaded("too many")))

    def receive(self, timeout: float) -> list[RequestOutput]:
        if self._refused.empty():
            time.sleep(timeout)
        return [self._refused.get() for _ in range(self._refused.qsize())]

    def abort(self, request_id: str) -> None:
        self.aborted.put(request_id)


class FakeReply:
    def __init__(self) -> None:
        self.open, self.cancelled = True, False
        self.responses = SimpleNamespace(is_cancelled=lambda: self.cancelled)

    def add(self, outputs: Any) -> None:
        self.open = False


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace())
    from triton_server_model import sender

    return sender


def test_a_cancellation_is_seen_after_many_refusals(module: Any) -> None:
    """Some are asked about at once, each so often: with 5,000 that were refused among them, it would take minutes."""
    engine = FakeEngine()
    sender = module.Sender(engine, lambda: None)
    replies = [FakeReply() for _ in range(5000)]
    for reply in replies:
        sender.submit(reply, "refuse", None, None)
    running = [FakeReply() for _ in range(65)]
    for reply in running:
        sender.submit(reply, "run", None, None)
    running[-1].cancelled = True
    assert engine.aborted.get(timeout=30) == "request-5064"
    assert not any(reply.open for reply in replies)
    engine.error = EngineDead("")
    sender.join()


def test_many_that_are_cancelled_together(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once one is found, the others are not waited for; and the engine is told once about each."""
    monkeypatch.setattr(module, "_POLL_CORE_SECONDS", 1000)
    engine = FakeEngine()
    sender = module.Sender(engine, lambda: None)
    for _ in range(1000):
        reply = FakeReply()
        reply.cancelled = True
        sender.submit(reply, "run", None, None)
    assert {engine.aborted.get(timeout=30) for _ in range(1000)} == {f"request-{number}" for number in range(1000)}
    engine.error = EngineDead("")
    sender.join()
    assert engine.aborted.empty()
