"""The metrics port of the real server, against what its clients count."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from tests.server.client import Client, eventually
from triton_server_model.launcher import MODEL_NAME

OURS = ("paged_backend_", "vllm:", "nv_trt_llm_")
LABELS = {"model": MODEL_NAME, "version": "1"}


def page(client: Client) -> str:
    return httpx.get(f"http://{client.server.address('metrics')}/metrics", trust_env=False).text


def samples(client: Client) -> dict[str, float]:
    """Our samples as Prometheus keeps them, by name and labels other than those of the model: `name{le="1"}`."""
    found = {}
    for name, inside, value in re.findall(r"^([a-z0-9_:]+)\{(.*)\} (\S+)$", page(client), re.MULTILINE):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', inside))
        if name.startswith(OURS):
            assert LABELS.items() <= labels.items()
            rest = ",".join(f'{label}="{text}"' for label, text in labels.items() if label not in LABELS)
            found[f"{name}{{{rest}}}" if rest else name] = float(value)
    return found


def await_samples(client: Client, expected: dict[str, float]) -> None:
    def wrong() -> dict[str, tuple[float | None, float]]:
        shown = samples(client)
        return {name: (shown.get(name), value) for name, value in expected.items() if shown.get(name) != value}

    eventually(lambda: not wrong(), lambda: str(wrong()))


def test_metrics_are_what_clients_count(client: Client, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """They go with the model, start from zero with it, and then are exact."""
    assert client.stream("the fox", sampling={"max_tokens": 4, "ignore_eos": True}).finish()
    eventually(lambda: samples(client)["vllm:request_generation_tokens_sum"])
    client.http.post(f"/v2/repository/models/{MODEL_NAME}/unload").raise_for_status()
    eventually(lambda: not samples(client))
    client.http.post(f"/v2/repository/models/{MODEL_NAME}/load").raise_for_status()
    await_samples(client, {"paged_backend_steps_total": 0, "vllm:request_generation_tokens_sum": 0})
    assert not [name for name, value in samples(client).items() if value and "kv_" not in name]

    prompts = [f"{'the quick brown fox ' * (number % 4)}jumps {number}" for number in range(12)]
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 7, 7, 7]
    streams = []
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        sampling = {"max_tokens": length, "temperature": 0, "ignore_eos": True}
        streams.append(client.stream(prompt, sampling=sampling, stream=number % 3 > 0))
    every_token = {"max_tokens": 9, "temperature": 0, "stop_token_ids": list(range(3, 259))}
    streams.append(client.stream("stop", sampling=every_token))
    refused = client.stream("the fox", sampling={"top_p": 2})
    for stream in [*streams, refused]:
        stream.finish()
    assert [stream.error for stream in streams] == [None] * 13
    assert refused.error is not None

    prompt_tokens = [len(byte_tokenizer(prompt).input_ids) for prompt in [*prompts, "stop"]]
    output_tokens = [*lengths, 1]
    gaps = sum(output_tokens) - 13
    expected = {
        'paged_backend_requests_ended_total{reason="length"}': 12,
        'paged_backend_requests_ended_total{reason="stop"}': 1,
        'paged_backend_requests_ended_total{reason="abort"}': 0,
        'paged_backend_requests_ended_total{reason="error"}': 0,
        'paged_backend_error_responses_total{code="INVALID_ARG"}': 1,
        'paged_backend_error_responses_total{code="INTERNAL"}': 0,
        "paged_backend_queried_tokens_total": sum(prompt_tokens),
        "paged_backend_requests_running": 0,
        "paged_backend_requests_waiting": 0,
        "paged_backend_kv_blocks_used": 0,
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm:kv_cache_usage_perc": 0,
        "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"used\"}": 0,
        "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"fraction\"}": 0,
        "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"free\"}": 512,
        "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"max\"}": 512,
        "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"tokens_per\"}": 16,
    }  # fmt: skip
    for theirs, ours, value in (
        ("prompt_tokens", "prompt_tokens", sum(prompt_tokens)),
        ("generation_tokens", "output_tokens", sum(output_tokens)),
    ):
        expected |= {f"vllm:{theirs}_total": value, f"paged_backend_{ours}_total": value}
    tokens = [2**power for power in range(18)]
    for theirs, ours, values in (
        ("request_prompt_tokens", "request_prompt_tokens", prompt_tokens),
        ("request_generation_tokens", "request_output_tokens", output_tokens),
    ):
        for name in (f"vllm:{theirs}", f"paged_backend_{ours}"):
            expected |= {f"{name}_sum": sum(values), f"{name}_count": 13, f'{name}_bucket{{le="+Inf"}}': 13}
            expected |= {f'{name}_bucket{{le="{le}"}}': sum(value <= le for value in values) for le in tokens}
    for name, count in {
        "vllm:request_params_n": 13,
        "paged_backend_request_n": 13,
        "vllm:time_to_first_token_seconds": 13,
        "paged_backend_time_to_first_token_seconds": 13,
        "vllm:e2e_request_latency_seconds": 13,
        "paged_backend_request_seconds": 13,
        "paged_backend_queue_seconds": 13,
        "paged_backend_prefill_seconds": 13,
        "paged_backend_time_per_output_token_seconds": sum(length > 1 for length in output_tokens),
        "vllm:time_per_output_token_seconds": gaps,
        "paged_backend_inter_token_seconds": gaps,
    }.items():
        expected |= {f"{name}_count": count, f'{name}_bucket{{le="+Inf"}}': count}
    await_samples(client, expected)

    cancelled = client.stream("the fox", sampling={"max_tokens": 500, "ignore_eos": True, "n": 16})
    cancelled.wait_for(lambda: cancelled.chunks)
    cancelled.cancel()
    await_samples(client, {'paged_backend_requests_ended_total{reason="abort"}': 16, "vllm:num_requests_running": 0})
    shown = samples(client)
    for theirs, ours in (
        ("time_to_first_token_seconds", "time_to_first_token_seconds"),
        ("time_per_output_token_seconds", "inter_token_seconds"),
        ("e2e_request_latency_seconds", "request_seconds"),
    ):
        assert shown[f"vllm:{theirs}_sum"] == pytest.approx(shown[f"paged_backend_{ours}_sum"], rel=1e-9)
        assert 0 < shown[f"vllm:{theirs}_sum"] < 60
    reused = 'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="reused"}'
    assert shown[reused] == shown["paged_backend_cached_tokens_total"] / 16 > 0


def test_the_page_is_well_formed(client: Client) -> None:
    """Types are what they say, and histograms read as such by the parser of Prometheus' own client."""
    kinds = defaultdict(set)
    for family in text_string_to_metric_families(page(client)):
        kinds[family.type] |= {family.name}
        if family.name.startswith(OURS) and family.type == "histogram":
            buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
            assert buckets == sorted(buckets)
            assert buckets[-1] == family.samples[0].value
    assert kinds["histogram"] == {
        *(f"vllm:{name}" for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds")),
        *(f"vllm:request_{name}" for name in ("prompt_tokens", "generation_tokens", "params_n")),
        *(f"paged_backend_{name}_seconds" for name in ("queue", "prefill", "time_to_first_token", "request")),
        *(f"paged_backend_request_{name}" for name in ("prompt_tokens", "output_tokens", "n")),
        "paged_backend_time_per_output_token_seconds",
    }
    assert {name for name in kinds["gauge"] if name.startswith(OURS)} == {
        *(f"vllm:{name}" for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")),
        *(f"paged_backend_{name}" for name in ("requests_running", "requests_waiting", "kv_block_tokens")),
        *(f"paged_backend_kv_blocks_{name}" for name in ("used", "cached", "total")),
        "nv_trt_llm_kv_cache_block_metrics",
    }
    assert {"vllm:prompt_tokens", "vllm:generation_tokens"} <= kinds["counter"]
    assert {f"vllm:time_per_output_token_seconds_{part}" for part in ("bucket", "sum", "count")} <= kinds["counter"]


def test_the_dashboard_asks_for_what_is_there(client: Client) -> None:
    dashboard = json.loads((Path(__file__).parents[2] / "deploy/grafana/paged-backend.json").read_text())
    assert {"uid", "title", "schemaVersion", "time", "refresh"} <= dashboard.keys()
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["model"]["query"]["query"] == "label_values(paged_backend_requests_running, model)"
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    tiles: set[tuple[int, int]] = set()
    for panel in panels:
        x, y, width, height = (panel["gridPos"][name] for name in "xywh")
        assert x + width <= 24
        covered = {(column, line) for column in range(x, x + width) for line in range(y, y + height)}
        assert not covered & tiles, panel["title"]
        tiles |= covered
    targets = [(panel["title"], target) for panel in panels for target in panel["targets"]]
    assert all(target["datasource"]["uid"] == "${datasource}" for _, target in targets)
    assert all(panel["title"] and panel["targets"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels)
    shown = {name.partition("{")[0] for name in samples(client)}
    asked = set()
    for title, target in targets:
        selected = re.findall(r"([a-z_:]+)(\{[^}]*\})", target["expr"])
        assert selected, title
        assert all('model=~"$model"' in labels for _, labels in selected), title
        assert len(re.findall("paged_backend_|nv_|vllm:", target["expr"])) == len(selected), title
        assert ("histogram_quantile" in target["expr"]) == ("by (le" in target["expr"]) == ("_bucket" in target["expr"])
        for name, _ in selected:
            assert name in shown, title
            assert name.endswith(("_total", "_bucket")) == ("rate(" in target["expr"]) or "kv_blocks_total" in name
            asked.add(name)
    ours = {name for name in shown if name.startswith("paged_backend_") and not name.endswith(("_sum", "_count"))}
    assert ours - asked == {"paged_backend_kv_block_tokens", "paged_backend_request_n_bucket"}
