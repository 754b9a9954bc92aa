from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
import torch
from paged_kernels.memory import zeros

SIZE = 1 << 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3, 5, 7), (4096, 3), (0, 2)])
def test_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = zeros(shape, dtype, torch.device("cpu"))
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
    assert made.is_contiguous()
    assert made.data_ptr() % 64 == 0 or not made.numel()
    made += 1
    assert torch.equal(made, torch.ones(shape, dtype=dtype))


def test_memory_is_taken_when_it_is_written_in_huge_pages() -> None:
    before = psutil.Process().memory_info().rss
    made = zeros((SIZE,), torch.uint8, torch.device("cpu"))
    assert psutil.Process().memory_info().rss - before < SIZE / 10
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        return
    kilobytes = re.compile(r"AnonHugePages: +(\d+)")
    before = sum(map(int, kilobytes.findall(Path("/proc/self/smaps_rollup").read_text())))
    made[: SIZE // 8] = 1
    huge = sum(map(int, kilobytes.findall(Path("/proc/self/smaps_rollup").read_text()))) - before
    assert huge * 1024 > SIZE / 8 / 2
