"""vLLM's engine arguments, `1/model.json` in models of its Triton backend, as fields of `EngineConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paged_backend.config import EngineConfig
from paged_backend.errors import InvalidArgument

_RENAMED = {"num_gpu_blocks_override": "num_blocks", "kv_cache_memory_bytes": "kv_cache_bytes"}
_DTYPES = {"half": "float16", "float": "float32"}
_ONLY: dict[str, object] = {
    **{"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "cpu_offload_gb": 0},
    **{"enable_lora": False, "enable_sleep_mode": False, "skip_tokenizer_init": False},
    **{"kv_cache_dtype": "auto", "load_format": "auto", "tokenizer_mode": "auto"},
}
"""The one value that the engine can do."""
_IGNORED = (
    *("disable_log_stats", "disable_log_requests", "enable_log_requests", "max_log_len", "served_model_name"),
    *("disable_custom_all_reduce", "distributed_executor_backend", "max_parallel_loading_workers", "seed"),
    *("enable_chunked_prefill", "use_v2_block_manager", "max_seq_len_to_capture", "compilation_config"),
    *("async_scheduling", "disable_async_output_proc"),
)
"""How vLLM itself runs; no answer depends on it. (`seed` is not that of requests.)"""


def engine_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What `arguments` come to. Raises `InvalidArgument` for one that asks for what the engine does not do."""
    fields: dict[str, Any] = {}
    for name, value in arguments.items():
        field = _RENAMED.get(name, name)
        if value is None or name in _IGNORED:
            continue
        if name == "enforce_eager":
            fields["cuda_graphs"] = not value
        elif name == "swap_space":
            fields["swap_space_bytes"] = f"{value}GiB"
        elif name == "dtype":
            fields[name] = _DTYPES.get(value, value)
        elif name == "tokenizer" and value == arguments.get("model"):
            continue
        elif field in EngineConfig.model_fields:
            fields[field] = value
        elif value != _ONLY.get(name):
            allowed = f"only {_ONLY[name]!r}" if name in _ONLY else "no such argument of vLLM's"
            raise InvalidArgument(name, value, f"{allowed} is supported")
    return fields
