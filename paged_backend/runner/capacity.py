"""How many blocks the device has room for."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from paged_backend.config import EngineConfig
from paged_backend.errors import InvalidArgument

_CPU_DEFAULT = 4 * 1024**3


def choose_num_blocks(
    config: EngineConfig,
    each: int,
    device: torch.device,
    measure_step: Callable[[], int],
) -> int:
    """Blocks of `each` bytes the cache gets.

    `measure_step` runs the largest step and returns its peak bytes beyond the weights. Raises `InvalidArgument` when
    more is asked than the device has, or when not one block fits.
    """
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    else:
        free = psutil.virtual_memory().available
    if config.num_blocks is not None:
        if config.num_blocks * each > free:
            raise InvalidArgument(
                "num_blocks",
                config.num_blocks,
                f"at most {free // each} blocks of {each} bytes fit in free memory",
            )
        return config.num_blocks
    budget = config.kv_cache_bytes
    if budget is not None and budget > free:
        raise InvalidArgument("kv_cache_bytes", budget, f"at most the {free} bytes of free memory on {device}")
    if budget is None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        budget = free - int((1 - config.gpu_memory_utilization) * total) - measure_step()
    elif budget is None:
        budget = min(free // 4, _CPU_DEFAULT)
    if budget < each:
        field = "gpu_memory_utilization" if config.kv_cache_bytes is None else "kv_cache_bytes"
        raise InvalidArgument(field, getattr(config, field), f"leaves {budget} bytes; one block takes {each}")
    return budget // each


def choose_num_host_blocks(config: EngineConfig, each: int) -> int:
    """Blocks of `each` bytes in `swap_space_bytes`. Raises `InvalidArgument` when it is more than is free."""
    free = psutil.virtual_memory().available
    if not each <= config.swap_space_bytes <= free:
        raise InvalidArgument(
            "swap_space_bytes", config.swap_space_bytes, f"0, or from {each} (one block) to {free} bytes (free memory)"
        )
    return config.swap_space_bytes // each
