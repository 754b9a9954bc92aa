"""Traces and log of a real server whose metrics are turned off."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from tests.collector import Collector, collector
from tests.server.client import ENGINE, Client, eventually
from triton_server_model.launcher import MODEL_NAME, TritonServer, free_ports, packaged_repository

QUOTA = """
from paged_backend.plugins import hookimpl

@hookimpl
def paged_request_filter(request):
    if request.params.seed == 13:
        raise RuntimeError("the quota service is down\\nfor a while")
"""


@dataclass
class Traced:
    client: Client
    collector: Collector
    log: Path

    def logged(self, text: str) -> list[str]:
        return [line for line in self.log.read_text(errors="replace").splitlines() if text in line]


@pytest.fixture(scope="module")
def traced(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """Triton appends a model's version directory to its path: a plug-in may lie there."""
    root = tmp_path_factory.mktemp("traced")
    model = root / "repository" / MODEL_NAME
    shutil.copytree(packaged_repository() / MODEL_NAME, model)
    with (model / "config.pbtxt").open("a") as config:
        config.write('parameters { key: "REPORT_CUSTOM_METRICS" value { string_value: "false" } }\n')
    (model / "1" / "engine.json").write_text(json.dumps(ENGINE | {"model": str(tiny_llama_dir), "num_blocks": 8}))
    (model / "1" / "quota.py").write_text(QUOTA)
    plugin = model / "1" / "quota-1.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: quota\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[paged_backend]\nquota = quota\n")
    http_port, grpc_port, metrics_port = free_ports(3)
    log = root / "server.log"
    with collector() as collected, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collected.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        settings = ("mode=opentelemetry", "rate=1", "level=TIMESTAMPS", f"opentelemetry,url={collected.url}/v1/traces")
        arguments = [f"--trace-config={setting}" for setting in (*settings, "opentelemetry,bsp_schedule_delay=100")]
        server = TritonServer(
            model.parent,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            arguments=[*arguments, f"--log-file={log}"],
        )
        with server:
            client = Client(server)
            yield Traced(client, collected, log)
            client.http.close()
        assert server.process.returncode == 0


def test_spans_are_part_of_the_clients_trace(traced: Traced, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    trace, prompt = "0af7651916cd43dd8448eb211c80319c", "the quick brown fox"
    parameters = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    began = time.time_ns()
    answer = traced.client.http.post(
        f"/v2/models/{MODEL_NAME}/generate",
        json={"text_input": prompt, "parameters": parameters},
        headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"},
    )
    assert answer.status_code == 200
    ended = time.time_ns()
    name = f"text_completion {MODEL_NAME}"
    eventually(lambda: traced.collector.named(name) and traced.collector.named(MODEL_NAME))
    (span,), (tritons,) = traced.collector.named(name), traced.collector.named(MODEL_NAME)
    assert (span.trace, span.parent, span.error) == (trace, tritons.id, None)
    assert tritons.trace == trace
    expected = {
        "gen_ai.request.model": MODEL_NAME,
        "gen_ai.request.max_tokens": 24,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.usage.input_tokens": len(byte_tokenizer(prompt).input_ids),
        "gen_ai.usage.output_tokens": 24,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert expected.items() <= span.attributes.items()
    eventually(lambda: len(traced.collector.children(span)) == 3)
    phases = traced.collector.children(span)
    moments = [span.start, *(phases[name].start for name in ("prefill", "decode")), span.end]
    assert [phases["queue"].start, phases["queue"].end, phases["decode"].end] == [*moments[:2], moments[3]]
    assert moments == sorted(moments)
    assert began < span.start < span.end < ended
    assert phases["decode"].end - phases["decode"].start > (span.end - span.start) / 2


def test_log(traced: Traced) -> None:
    """Our records are lines of the server's log, with the client's id of the request."""
    eventually(lambda: traced.logged("limited by the KV cache"))
    (warning,) = traced.logged("limited by the KV cache")
    assert warning.startswith("W")
    assert f'"{MODEL_NAME}: paged_backend.runner.cache: max_model_len is 128, limited by' in warning
    refused = traced.client.generate({"id": "order-66", "text_input": "the fox", "parameters": {"seed": 13}})
    assert "the quota service is down" in refused.json()["error"]
    eventually(lambda: traced.logged("order-66"))
    (error,) = traced.logged("order-66")
    assert error.startswith("E")
    assert f'"[request id: order-66] {MODEL_NAME}: triton_server_model.reply: the request failed' in error
    assert "RuntimeError: the quota service is down" in error
    assert traced.client.generate({"text_input": "the fox"}).status_code == 200


def test_no_metrics_of_ours(traced: Traced) -> None:
    text = httpx.get(f"http://{traced.client.server.address('metrics')}/metrics", trust_env=False).text
    assert "nv_inference_request_success" in text
    assert not [line for line in text.splitlines() if "paged_backend" in line or "vllm:" in line or "nv_trt" in line]
