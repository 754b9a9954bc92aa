from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
import torch
from paged_kernels.memory import zeros

SIZE = 1 << 30
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3, 5, 7), (4096, 3), (0, 2)])
def test_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = zeros(shape, dtype, torch.device("cpu"))
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
    assert made.is_contiguous()
    assert made.data_ptr() % 64 == 0 or not made.numel()
    made += 1
    assert torch.equal(made, torch.ones(shape, dtype=dtype))


def test_memory_is_taken_when_it_is_written() -> None:
    before = psutil.Process().memory_info().rss
    made = zeros((SIZE,), torch.uint8, torch.device("cpu"))
    assert psutil.Process().memory_info().rss - before < SIZE / 10
    made[: SIZE // 8] = 1
    assert SIZE / 10 < psutil.Process().memory_info().rss - before < SIZE / 5


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this system gives no huge pages to processes"
)
def test_pages_are_huge() -> None:
    before = _huge_bytes()
    made = zeros((SIZE,), torch.uint8, torch.device("cpu"))
    made[: SIZE // 8] = 1
    assert _huge_bytes() - before > SIZE / 8 / 2


def _huge_bytes() -> int:
    return 1024 * int(re.findall(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps_rollup").read_text())[0])
