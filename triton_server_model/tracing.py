"""Requests as OpenTelemetry spans, beneath the span that Triton makes of each."""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from paged_backend.request import RequestOutput, SamplingParams

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_CLOSE_SECONDS = 5
"""How long an exporter may take to send what it has left."""
_PARAMETERS = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "stop": "gen_ai.request.stop_sequences",
    "n": "gen_ai.request.choice.count",
}


class Tracer:
    """Exports a span of each request that Triton traces, over OTLP/HTTP, with the phases queue, prefill and decode.

    Active if the server's environment has OTEL_EXPORTER_OTLP_ENDPOINT (or its TRACES variant), the extra `otel` is
    installed, and Triton runs with `--trace-config=mode=opentelemetry`. Spans follow OpenTelemetry's conventions for
    generative AI, and are made after the request, by a thread of their own.
    """

    def __init__(self, model: str) -> None:
        """`model` is the name that clients ask for."""
        self._model, self._provider = model, None
        self._thread = ThreadPoolExecutor(1, "paged-tracing")
        if not any(map(os.environ.get, _ENDPOINTS)):
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            logger.warning("no traces: %s; pip install 'paged-backend[otel]'", error)
            return
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("paged_backend")

    def follow(self, request: Any, params: SamplingParams) -> Callable[[Sequence[RequestOutput]], None] | None:
        """What to tell all outputs of Triton's `request`; None if it is not traced."""
        if self._provider is None or not (context := trace_context(request)):
            return None
        last: dict[int, RequestOutput] = {}

        def observe(outputs: Sequence[RequestOutput]) -> None:
            last.update((output.index, output) for output in outputs)
            if outputs[-1].finished:
                self._thread.submit(self._record, context, params, list(last.values()))

        return observe

    def close(self) -> None:
        """Send what there is, for a few seconds at most."""
        self._thread.shutdown()
        if self._provider is not None:
            ending = threading.Thread(target=self._provider.shutdown, daemon=True)  # 30 s without a collector
            ending.start()
            ending.join(_CLOSE_SECONDS)

    def _record(self, context: str, params: SamplingParams, outputs: Sequence[RequestOutput]) -> None:
        try:
            self._make_spans(json.loads(context), params, outputs)
        except Exception:
            logger.exception("request %s could not be traced", outputs[0].request_id)

    def _make_spans(self, carrier: dict[str, str], params: SamplingParams, outputs: Sequence[RequestOutput]) -> None:
        from opentelemetry.trace import StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        since_epoch = time.time_ns() - time.monotonic_ns()
        phases = [(name, int(seconds * 1e9) + since_epoch) for name, seconds in _phases(outputs)]
        name, parent = f"text_completion {self._model}", TraceContextTextMapPropagator().extract(carrier)
        attributes = self._attributes(params, outputs)
        span = self._tracer.start_span(name, parent, attributes=attributes, start_time=phases[0][1])
        for (phase, start), (_, end) in itertools.pairwise(phases):
            self._tracer.start_span(phase, set_span_in_context(span), start_time=start).end(end)
        if error := next((output.error for output in outputs if output.error is not None), None):
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(StatusCode.ERROR, str(error))
        span.end(phases[-1][1])

    def _attributes(self, params: SamplingParams, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        given = {attribute: getattr(params, field) for field, attribute in _PARAMETERS.items()}
        return {attribute: value for attribute, value in given.items() if value not in (None, ())} | {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "paged_backend",
            "gen_ai.request.model": self._model,
            "gen_ai.response.id": outputs[0].request_id,
            "gen_ai.response.finish_reasons": [output.finish_reason or "" for output in outputs],
            "gen_ai.usage.input_tokens": outputs[0].num_prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": outputs[0].num_cached_tokens,
            "gen_ai.usage.output_tokens": sum(output.num_output_tokens for output in outputs),
        }


def _phases(outputs: Sequence[RequestOutput]) -> list[tuple[str, float]]:
    """Phases and when each began, the end of all last; in seconds of `time.monotonic`."""
    end = max(output.end_time or time.monotonic() for output in outputs)
    phases = [("queue", outputs[0].arrival_time or end)]
    for name, times in (
        ("prefill", [output.scheduled_time for output in outputs]),
        ("decode", [output.first_token_time for output in outputs]),
    ):
        if known := [seconds for seconds in times if seconds is not None]:
            phases.append((name, min(known)))
    return [*phases, ("", end)]


def trace_context(request: Any) -> str | None:
    """JSON of W3C's headers, if Triton traces this request; servers before 24.04 do not tell."""
    trace = getattr(request.trace(), "get_context", None) if hasattr(request, "trace") else None
    return trace() if trace is not None else None
