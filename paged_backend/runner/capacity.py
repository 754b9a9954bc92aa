"""How many blocks the device has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import psutil
import torch
from paged_kernels.attention import LayerSpec

from paged_backend.config import EngineConfig
from paged_backend.errors import InvalidArgument

_CPU_DEFAULT = 4 * 1024**3


def block_bytes(specs: Sequence[LayerSpec], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers together."""
    return sum(spec.num_kv_heads * (spec.key_dim + spec.value_dim) for spec in specs) * block_size * dtype.itemsize


def choose_num_blocks(
    config: EngineConfig,
    specs: Sequence[LayerSpec],
    dtype: torch.dtype,
    device: torch.device,
    measure_step: Callable[[], int],
) -> int:
    """Blocks the cache gets. `measure_step` runs the largest step and returns its peak bytes beyond the weights.

    Raises `InvalidArgument` when more is asked than the device has, or when not one block fits.
    """
    each = block_bytes(specs, config.block_size, dtype)
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
