"""`paged-backend top` on a real server, and the arithmetic behind it."""

from __future__ import annotations

import contextlib
import http.server
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from tests.server.client import Client, eventually
from triton_server_model.launcher import free_ports
from triton_server_model.top import Totals, parse

SCRIPT = str(Path(sys.executable).parent / "paged-backend")


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, "top", *arguments], capture_output=True, text=True, timeout=60, check=False)


def cells(table: str) -> list[str]:
    (row,) = [line for line in table.splitlines() if line.startswith("paged_llm:1")]
    return row.split()


def test_once(client: Client) -> None:
    client.settle()
    before = client.metric("output_tokens_total")
    prompt = "all that begins alike is computed once"
    for _ in range(3):
        assert client.stream(prompt, sampling={"max_tokens": 20, "temperature": 0, "ignore_eos": True}).finish()
    client.await_metric("output_tokens_total", before + 60)
    done = top("--once", "--interval", "0.1", "--metrics", f"http://{client.server.address('metrics')}/metrics")
    assert (done.returncode, done.stderr) == (0, "")
    assert "latencies and cache hits since the model was loaded" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    _, run, wait, _, used, tokens_in, tokens_out, *latencies, hits, preempted = cells(done.stdout)
    assert [run, wait, used, tokens_in, tokens_out] == ["0", "0", "0%", "0", "0"]
    assert preempted == f"{client.metric('preemptions_total'):.0f}"
    rate = client.metric("cached_tokens_total") / client.metric("queried_tokens_total")
    assert hits == f"{rate:.0%}"
    assert len(latencies) == 4
    assert all(value.endswith("s") for value in latencies)


def test_live(client: Client) -> None:
    """Rates and load appear while a request runs; Ctrl-C is an ordinary end."""
    url = f"http://{client.server.address('metrics')}/metrics"
    ours, theirs = pty.openpty()
    command = [SCRIPT, "top", "--interval", "0.2", "--metrics", url]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        command,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
        # Shells start background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    screen: list[str] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the other side has closed
            while chunk := os.read(ours, 4096):
                screen.append(chunk.decode(errors="replace"))

    reader = threading.Thread(target=read)
    reader.start()

    def seen() -> list[list[str]]:
        return [line.split() for line in "".join(screen).splitlines() if "paged_llm:1" in line and "%" in line]

    eventually(lambda: seen(), lambda: "".join(screen))
    streams = []

    def busy() -> bool:
        streams.append(client.stream("the fox", sampling={"max_tokens": 400, "temperature": 0, "ignore_eos": True}))
        streams[-1].finish()
        return any(row[1] == "1" and row[6] not in ("0", "-") for row in seen())

    eventually(busy, lambda: "".join(screen))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    reader.join()
    os.close(ours)
    assert (process.returncode, error) == (0, b"")


def test_no_server_is_one_line() -> None:
    (port,) = free_ports(1)
    done = top("--metrics", f"http://127.0.0.1:{port}/metrics")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: no metrics from http://127.0.0.1:{port}/metrics: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("code", "page"), [(404, b""), (200, b"<html><body>Hello, operator</body></html>")])
def test_what_is_not_metrics_is_one_line(code: int, page: bytes) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *message: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = top("--once", "--metrics", f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: no metrics from http://127.0.0.1:{server.server_port}/: ")
    assert done.stderr.count("\n") == 1


def scraped(registry: CollectorRegistry) -> Totals:
    return parse(generate_latest(registry).decode())["", ""]


def test_quantiles_are_of_what_was_observed_since() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("paged_backend_x", "help", buckets=(1, 2, 4), registry=registry)
    empty = scraped(registry)
    assert empty.quantile("x", 0.5) is None
    assert empty.quantile("y", 0.5) is None
    for value in (0.5, 1.5, 1.6, 3):
        histogram.observe(value)
    first = scraped(registry)
    assert [first.quantile("x", share) for share in (0.25, 0.5, 0.75, 1)] == [1, 1.5, 2, 4]
    for value in (3, 9):
        histogram.observe(value)
    second = scraped(registry)
    assert second.since(first).quantile("x", 0.5) == 4
    assert second.since(first).quantile("x", 0.99) == 4  # the last finite bound
    assert second.since(first).values["x_count"] == 2


def test_instances_of_a_model_are_summed() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("paged_backend_x", "help", ["instance"], buckets=(1, 2), registry=registry)
    for instance, value in (("a", 0.5), ("b", 1.5), ("b", 9)):
        histogram.labels(instance).observe(value)
    assert scraped(registry).buckets["x"] == {1: 1, 2: 2, float("inf"): 3}


def test_a_model_that_was_loaded_again_counts_from_zero() -> None:
    before = parse(
        "# TYPE paged_backend_steps_total counter\npaged_backend_steps_total{model='m'} 9\n".replace("'", '"')
    )
    after = parse(
        "# TYPE paged_backend_steps_total counter\npaged_backend_steps_total{model='m'} 4\n".replace("'", '"')
    )
    assert after["m", ""].since(before["m", ""]).values["steps_total"] == 4
    assert before["m", ""].since(after["m", ""]).values["steps_total"] == 5
