"""The KV cache of an engine: how large, and its parts on the device, on the host, and in the books."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from paged_backend.config import EngineConfig
from paged_backend.errors import InvalidArgument
from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.eviction import EvictionPolicy
from paged_backend.kv_cache.groups import blocks_needed
from paged_backend.kv_cache.host_tier import HostTier
from paged_backend.kv_cache.storage import block_bytes
from paged_backend.kv_cache.swap import SwapSpace
from paged_backend.runner.capacity import choose_num_blocks, choose_num_host_blocks
from paged_backend.runner.check import peak_step_bytes
from paged_backend.runner.model import PagedModel
from paged_backend.runner.remembered import remembered
from paged_backend.scheduler.preemption import PreemptionCosts
from paged_backend.versions import package_versions

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class KVCache:
    """What `make_cache` made."""

    tables: BlockTables
    max_model_len: int
    """Tokens of one request, at most."""
    host: HostTier | None
    swap: SwapSpace | None
    costs: PreemptionCosts


def make_cache(
    config: EngineConfig, paged: PagedModel, max_model_len: int, make_eviction: Callable[[], EvictionPolicy]
) -> KVCache:
    """The cache of a model, as large as is useful and fits. Raises `InvalidArgument` for one that cannot be."""
    each = block_bytes([layer.spec for layer in paged.layers], paged.groups, config.block_size, paged.dtype)

    def needed(num_tokens: int) -> int:
        return blocks_needed(paged.groups, num_tokens, config.block_size, config.step_tokens)

    def measure_step() -> int:
        return remembered(
            "peak step bytes",
            {
                "model": paged.model.config.to_json_string(use_diff=False),
                "dtype": str(paged.dtype),
                "fused": paged.fused is not None,
                "backend": type(paged.backend).__name__,
                "config": [config.block_size, config.step_tokens, config.max_num_seqs, config.cuda_graphs],
                "max_model_len": max_model_len,
                "device": torch.cuda.get_device_name(paged.device),
                "versions": package_versions(),
            },
            lambda: peak_step_bytes(paged, config, max_model_len),
        )

    num_blocks = choose_num_blocks(config, each, paged.device, measure_step)
    num_blocks = min(num_blocks, config.max_num_seqs * needed(max_model_len))
    room = bisect.bisect_right(range(1, max_model_len + 1), num_blocks, key=needed)
    if config.max_model_len is not None and config.max_model_len > room:
        raise InvalidArgument(
            "max_model_len",
            config.max_model_len,
            f"the KV cache holds {room} tokens; raise kv_cache_bytes or num_blocks",
        )
    if room < 2:
        raise InvalidArgument("num_blocks", num_blocks, f"of {config.block_size} tokens; a request needs room for 2")
    if max_model_len > room:
        logger.warning("max_model_len is %d, limited by the KV cache; the model can do %d", room, max_model_len)
    storage = paged.allocate(num_blocks, config.block_size)
    costs = PreemptionCosts(bytes_per_token=each * len(paged.groups) // config.block_size)
    host = swap = None
    if config.swap_space_bytes:
        host = HostTier(choose_num_host_blocks(config, each), make_eviction())
        swap = SwapSpace(storage, host.pool.num_blocks)
        costs.bytes_per_second = swap.measure()
    tables = BlockTables(
        BlockPool(num_blocks, eviction=make_eviction()),
        block_size=config.block_size,
        num_slots=config.max_num_seqs,
        max_model_len=room,
        groups=paged.groups,
    )
    return KVCache(tables, room, host, swap, costs)
