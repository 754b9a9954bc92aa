"""The engine's metrics, and what is made of them for Triton's metrics port."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from paged_backend import Engine, EngineConfig, SamplingParams
from paged_backend.errors import InvalidArgument
from triton_server_model.metric_families import distributions, is_wanted, observations, with_known_names


@pytest.fixture
def engine(tiny_llama_dir: Path) -> Engine:
    return Engine(EngineConfig(model=str(tiny_llama_dir), device="cpu", dtype="float32", num_blocks=64, block_size=4))


def samples(engine: Engine) -> dict[str, float]:
    """Every sample by name, with the labels but for `le` after it."""
    found = {}
    for family in with_known_names(engine.metrics.registry.collect()):
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            labels = [value for name, value in sample.labels.items() if name != "le"]
            found["/".join([sample.name, *labels])] = sample.value  # of a histogram's buckets, the last
    return found


def greedy(max_tokens: int, **fields: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **fields)


def test_counts_are_those_of_the_requests(engine: Engine) -> None:
    shown = samples(engine)
    assert {name for name, value in shown.items() if value} == {
        "paged_backend_kv_blocks_total",
        "paged_backend_kv_block_tokens",
        *(f"nv_trt_llm_kv_cache_block_metrics/{kind}" for kind in ("max", "free", "tokens_per")),
    }
    assert {name.split("/")[1] for name in shown if "requests_ended_total" in name} == {
        "stop",
        "length",
        "abort",
        "error",
    }
    prompts = [list(range(3, 3 + length)) for length in (10, 11, 30)]
    engine.generate(prompts, [greedy(1), greedy(8), greedy(5, n=3)])
    running = engine.add_request(prompts[0], greedy(50))
    while not sum(output.num_output_tokens == 4 for output in engine.step()):
        pass
    shown = samples(engine)
    assert shown["vllm:num_requests_running"] == 1
    assert shown["vllm:kv_cache_usage_perc"] == shown["paged_backend_kv_blocks_used"] / 64 > 0
    assert shown["nv_trt_llm_kv_cache_block_metrics/free"] == 64 - shown["paged_backend_kv_blocks_used"]
    assert shown["nv_trt_llm_kv_cache_block_metrics/reused"] == engine.stats().cached_tokens / 4 > 0
    engine.abort(running)
    engine.step()
    shown = samples(engine)
    assert shown["paged_backend_requests_ended_total/length"] == 5  # the outputs of n=3 are counted one by one
    assert shown["paged_backend_requests_ended_total/abort"] == 1
    assert shown["paged_backend_prompt_tokens_total"] == 61
    assert shown["vllm:prompt_tokens_total"] == 61
    tokens = 1 + 8 + 3 * 5 + 4
    assert shown["vllm:generation_tokens_total"] == tokens
    for names, count, total in (
        (("paged_backend_request_prompt_tokens", "vllm:request_prompt_tokens"), 4, 61),
        (("paged_backend_request_output_tokens", "vllm:request_generation_tokens"), 6, tokens),
        (("paged_backend_request_n", "vllm:request_params_n"), 4, 6),
        (("paged_backend_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"), 6, None),
        (("paged_backend_queue_seconds", "paged_backend_prefill_seconds"), 6, None),
        (("paged_backend_request_seconds", "vllm:e2e_request_latency_seconds"), 6, None),
        (("paged_backend_inter_token_seconds", "vllm:time_per_output_token_seconds"), tokens - 6, None),
        (("paged_backend_time_per_output_token_seconds",), 5, None),
    ):
        for name in names:
            assert shown[f"{name}_bucket"] == shown[f"{name}_count"] == count, name
            assert total is None or shown[f"{name}_sum"] == total
    assert shown["paged_backend_queried_tokens_total"] == 10 + 11 + 3 * 30 + 10
    assert shown["paged_backend_cached_tokens_total"] == engine.stats().cached_tokens


def test_times_between_tokens_add_up(engine: Engine) -> None:
    """Each request's gaps are the time from its first token to its last, whoever shares its steps."""
    outputs = engine.generate([[5, 6, 7], [8, 9] * 20, [4]], [greedy(20), greedy(7), greedy(1)])
    shown = samples(engine)
    whole = sum(output.end_time - output.first_token_time for output in outputs)
    assert shown["paged_backend_inter_token_seconds_sum"] == pytest.approx(whole, rel=0.1, abs=0.01)
    assert shown["paged_backend_inter_token_seconds_count"] == 19 + 6
    phases = [shown[f"paged_backend_{name}_seconds_sum"] for name in ("queue", "prefill", "time_to_first_token")]
    assert phases[0] + phases[1] == pytest.approx(phases[2])
    for output in outputs:
        assert output.arrival_time <= output.scheduled_time <= output.first_token_time <= output.end_time


@given(
    values=st.lists(st.floats(0, 1e6) | st.sampled_from([0.0, 1.0, 4.0, 5.0]), max_size=50),
    bounds=st.lists(st.floats(1e-3, 1e4) | st.integers(1, 100).map(float), min_size=1, max_size=8, unique=True),
)
def test_observations_have_the_same_effect(values: list[float], bounds: list[float]) -> None:
    bounds = [*sorted(bounds), math.inf]
    counts = [0] * len(bounds)
    for value in values:
        counts[bisect_left(bounds, value)] += 1
    made = observations(bounds, counts, math.fsum(values))
    again = [0] * len(bounds)
    for value in made:
        again[bisect_left(bounds, value)] += 1
    assert again == counts
    assert math.fsum(made) == pytest.approx(math.fsum(values), rel=1e-12)


@given(values=st.lists(st.integers(0, 200), max_size=50))
def test_observations_of_whole_numbers_have_the_same_sum(values: list[int]) -> None:
    bounds = [1.0, 2.0, 4.0, 8.0, 100.0, math.inf]
    counts = [0] * len(bounds)
    for value in values:
        counts[bisect_left(bounds, value)] += 1
    assert sum(observations(bounds, counts, sum(values))) == sum(values)


def test_a_sum_ahead_of_its_buckets_is_not_negative_or_lost() -> None:
    assert observations([1.0, math.inf], [0, 0], 7.5) == []
    assert observations([1.0, math.inf], [2, 0], 7.5) == [1.0, 1.0]
    assert observations([1.0, math.inf], [0, 1], 0.25) == [math.nextafter(1.0, 2.0)]


def test_distributions_are_apart_by_label() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("h", "help", ["kind"], buckets=(1, 2), registry=registry)
    for kind, values in {"a": (0.5, 1.5, 9), "b": (2,)}.items():
        for value in values:
            histogram.labels(kind).observe(value)
    (family,) = registry.collect()
    assert [twin.name for twin in with_known_names([family])] == ["h"]  # without an engine's there is nothing to make
    assert list(distributions(family)) == [
        ({"kind": "a"}, (1.0, 2.0, math.inf), [1, 1, 1], 11.0),
        ({"kind": "b"}, (1.0, 2.0, math.inf), [0, 1, 0], 2.0),
    ]


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [({}, True), (None, True), ({"REPORT_CUSTOM_METRICS": {"string_value": "True"}}, True)]
    + [({"REPORT_CUSTOM_METRICS": {"string_value": value}}, False) for value in ("false", "False")],
)
def test_metrics_can_be_turned_off(parameters: dict | None, wanted: bool) -> None:
    config = {"name": "m"} if parameters is None else {"name": "m", "parameters": parameters}
    assert is_wanted(json.dumps(config)) is wanted


def test_a_switch_is_true_or_false() -> None:
    with pytest.raises(InvalidArgument, match="REPORT_CUSTOM_METRICS='yes': must be true or false"):
        is_wanted('{"parameters": {"REPORT_CUSTOM_METRICS": {"string_value": "yes"}}}')
