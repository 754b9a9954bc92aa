"""Spans made of outputs, received by a real collector. Those of a real server are in tests/server."""

from __future__ import annotations

import json
import logging
import socket
import sys
import time
from typing import Any

import pytest

from paged_backend.errors import DeadlineExceeded
from paged_backend.outputs import failed
from paged_backend.request import RequestOutput, SamplingParams
from tests.collector import collector
from triton_server_model.tracing import Tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traced:
    """What Triton hands to `execute`, as far as it is asked for a trace."""

    def __init__(self, flags: str | None = "01") -> None:
        self._context = None if flags is None else json.dumps({"traceparent": f"00-{TRACE}-{PARENT}-{flags}"})

    def trace(self) -> Any:
        return self

    def get_context(self) -> str | None:
        return self._context


def output(index: int, **fields: Any) -> RequestOutput:
    return RequestOutput("r", "", [5], 7, 3 + index, index=index, arrival_time=100.0, scheduled_time=101.0, **fields)


def test_spans_of_several_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        output(0, first_token_time=103.0),
        output(1, first_token_time=102.5, end_time=104.0, finish_reason="stop"),
        output(0, first_token_time=103.0, end_time=105.0, finish_reason="length", finished=True),
    ]
    with collector() as collected:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collected.url)
        tracer = Tracer("m")
        follow = tracer.follow(Traced(), SamplingParams(n=2, stop="x", seed=3, max_tokens=9))
        follow(parts[:1])
        follow(parts[1:])
        not_sampled = tracer.follow(Traced("00"), SamplingParams())
        not_sampled(parts)
        assert tracer.follow(Traced(None), SamplingParams()) is None
        assert tracer.follow(object(), SamplingParams()) is None  # of a server that knows no traces
        tracer.close()
    (span,) = collected.named("text_completion m")
    assert (span.trace, span.parent, span.error) == (TRACE, PARENT, None)
    assert span.attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "paged_backend",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stop_sequences": ["x"],
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": "r",
        "gen_ai.response.finish_reasons": ["length", "stop"],
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 7,
    }
    phases = collected.children(span)
    assert len(collected.spans) == 4
    moments = [phases["queue"].start, phases["prefill"].start, phases["decode"].start, phases["decode"].end]
    assert [moment - span.start for moment in moments] == [0, 1_000_000_000, 2_500_000_000, 5_000_000_000]
    assert phases["queue"].end == phases["prefill"].start
    assert phases["prefill"].end == phases["decode"].start
    assert span.end == moments[-1]
    now = time.time() - time.monotonic() + 105.0
    assert span.end / 1e9 == pytest.approx(now, abs=1)


def test_spans_of_failed_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as collected:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collected.url}/traces")
        tracer = Tracer("m")
        late = RequestOutput(
            "late", "", [], 7, 0, "error", DeadlineExceeded("late"), True, arrival_time=1.0, end_time=3.0
        )
        for last in (late, failed("lost", RuntimeError("the device is gone"))):
            tracer.follow(Traced(), SamplingParams())([last])
        tracer.close()
    late, lost = collected.named("text_completion m")
    assert (late.error, late.attributes["error.type"], late.end - late.start) == ("late", "DeadlineExceeded", 2 * 10**9)
    assert list(collected.children(late)) == ["queue"]
    assert (lost.error, lost.attributes["error.type"]) == ("the device is gone", "RuntimeError")
    assert lost.end / 1e9 == pytest.approx(time.time(), abs=5)


def test_without_an_endpoint_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    tracer = Tracer("m")
    assert tracer.follow(Traced(), SamplingParams()) is None
    tracer.close()


def test_without_opentelemetry_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    tracer = Tracer("m")
    assert tracer.follow(Traced(), SamplingParams()) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "pip install 'paged-backend[otel]'" in caplog.text
    tracer.close()


def test_a_silent_collector_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_server_model.tracing._CLOSE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracer = Tracer("m")
        tracer.follow(Traced(), SamplingParams())([failed("r", RuntimeError("x"))])
        began = time.monotonic()
        tracer.close()
        assert time.monotonic() - began < 3
