"""Which metrics go to Triton's metrics port: those of the engine, and some again under names that tools already know.

Pure; knows nothing of Triton's Python API.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import Metric

from paged_backend.errors import InvalidArgument

_RENAMED = {
    # Triton's vLLM backend has these eight ...
    "vllm:prompt_tokens": "paged_backend_prompt_tokens",
    "vllm:generation_tokens": "paged_backend_output_tokens",
    "vllm:time_to_first_token_seconds": "paged_backend_time_to_first_token_seconds",
    "vllm:time_per_output_token_seconds": "paged_backend_inter_token_seconds",
    "vllm:e2e_request_latency_seconds": "paged_backend_request_seconds",
    "vllm:request_prompt_tokens": "paged_backend_request_prompt_tokens",
    "vllm:request_generation_tokens": "paged_backend_request_output_tokens",
    "vllm:request_params_n": "paged_backend_request_n",
    # ... and vLLM's own server has these.
    "vllm:num_requests_running": "paged_backend_requests_running",
    "vllm:num_requests_waiting": "paged_backend_requests_waiting",
}
_KV_BLOCKS = "nv_trt_llm_kv_cache_block_metrics"
"""Of Triton's TensorRT-LLM backend. Triton makes the ORCA header `endpoint-load-metrics` of its responses from it."""
_USED, _TOTAL, _SIZE, _CACHED = (
    f"paged_backend_{name}" for name in ("kv_blocks_used", "kv_blocks_total", "kv_block_tokens", "cached_tokens")
)
_COMPUTED: tuple[tuple[str, dict[str, str], Callable[[Mapping[str, float]], float]], ...] = (
    ("vllm:kv_cache_usage_perc", {}, lambda value: value[_USED] / (value[_TOTAL] or 1)),
    (_KV_BLOCKS, {"kv_cache_block_type": "max"}, lambda value: value[_TOTAL]),
    (_KV_BLOCKS, {"kv_cache_block_type": "free"}, lambda value: value[_TOTAL] - value[_USED]),
    (_KV_BLOCKS, {"kv_cache_block_type": "used"}, lambda value: value[_USED]),
    (_KV_BLOCKS, {"kv_cache_block_type": "fraction"}, lambda value: value[_USED] / (value[_TOTAL] or 1)),
    (_KV_BLOCKS, {"kv_cache_block_type": "tokens_per"}, lambda value: value[_SIZE]),
    (_KV_BLOCKS, {"kv_cache_block_type": "reused"}, lambda value: value[_CACHED] / (value[_SIZE] or 1)),
)
"""Gauges: name, labels, and the value from those of the engine."""

PER_TOKEN = frozenset({"paged_backend_inter_token_seconds", "vllm:time_per_output_token_seconds"})
"""Histograms with an observation for every token."""


def is_wanted(model_config: str) -> bool:
    """Whether the parameter REPORT_CUSTOM_METRICS of this config.pbtxt (as JSON) leaves the metrics on, as they are
    without it. Raises `InvalidArgument`."""
    parameter = json.loads(model_config).get("parameters", {}).get("REPORT_CUSTOM_METRICS", {})
    value = parameter.get("string_value", "true")
    if value.lower() not in ("true", "false"):
        raise InvalidArgument("REPORT_CUSTOM_METRICS", value, "must be true or false")
    return bool(value.lower() == "true")


def with_known_names(families: Iterable[Metric]) -> Iterator[Metric]:
    """The families, and those that are made of the engine's, if there is an engine's among them."""
    found = {family.name: family for family in families}
    yield from found.values()
    if _TOTAL not in found:
        return
    for name, ours in _RENAMED.items():
        family = Metric(name, found[ours].documentation, found[ours].type)
        for sample in found[ours].samples:
            family.samples.append(sample._replace(name=sample.name.replace(ours, name)))
        yield family
    values = {name: found[name].samples[0].value for name in (_USED, _TOTAL, _SIZE, _CACHED)}
    for name, labels, value in _COMPUTED:
        family = Metric(name, "KV cache", "gauge")
        family.add_sample(name, labels, value(values))
        yield family


def distributions(family: Metric) -> Iterator[tuple[dict[str, str], tuple[float, ...], list[float], float]]:
    """What a histogram family holds: labels, upper bounds of the buckets, their counts (each its own) and the sum."""
    buckets: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    sums: dict[tuple[tuple[str, str], ...], float] = {}
    for sample in family.samples:
        labels = tuple(item for item in sample.labels.items() if item[0] != "le")
        if sample.name.endswith("_bucket"):
            buckets.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_sum"):
            sums[labels] = sample.value
    for labels, cumulative in buckets.items():
        bounds, counts = zip(*cumulative, strict=True)
        own = [count - before for before, count in itertools.pairwise((0.0, *counts))]
        yield dict(labels), bounds, own, sums[labels]


def observations(bounds: Sequence[float], counts: Sequence[float], total: float) -> list[float]:
    """Values that change a histogram as those did that are known only by their buckets and their sum.

    `bounds` are the upper ones of the buckets, ascending, the last one infinite; `counts` says how many values each
    bucket got, and `total` what all add up to. None is negative. A histogram keeps nothing else of what it observes, so
    that it cannot be told from one that observed the originals. Whole numbers stay whole, for sums without a rest.
    """
    whole = float(total).is_integer() and all(bound.is_integer() for bound in bounds[:-1])
    values: list[tuple[float, float]] = []
    below = -math.inf
    for bound, count in zip(bounds, counts, strict=True):
        least = 0.0 if below < 0 else below + 1 if whole else math.nextafter(below, math.inf)
        values += [(least, bound)] * int(count)
        below = bound
    spare = total - math.fsum(least for least, _ in values)
    result = []
    for least, most in values:
        more = max(0.0, min(most - least, spare))
        result.append(least + more)
        spare -= more
    return result
