"""An OTLP/HTTP collector that keeps what it gets."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class Span:
    name: str
    trace: str
    id: str
    parent: str
    start: int
    """Nanoseconds since the epoch."""
    end: int
    attributes: dict[str, Any]
    error: str | None


class Collector:
    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Span] = []

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def children(self, parent: Span) -> dict[str, Span]:
        return {span.name: span for span in self.spans if span.parent == parent.id}

    def add(self, kind: str, body: bytes) -> None:
        if kind == "application/json":  # Triton's own; only what links it with ours
            for resource in json.loads(body)["resourceSpans"]:
                for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
                    times = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
                    ids = span["traceId"], span["spanId"], span.get("parentSpanId", "")
                    self.spans.append(Span(span["name"], *ids, *times, {}, None))
            return
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
                attributes = {item.key: _value(item.value) for item in span.attributes}
                error = span.status.message if span.status.code == span.status.STATUS_CODE_ERROR else None
                times = span.start_time_unix_nano, span.end_time_unix_nano
                self.spans.append(Span(span.name, *ids, *times, attributes, error))


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@contextmanager
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.collector.add(self.headers["Content-Type"], body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *message: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.collector = Collector(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.collector
        server.shutdown()
