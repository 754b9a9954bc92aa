from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
import torch
from paged_kernels.memory import Arena, zeros

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


def test_copies_share_a_region() -> None:
    arena, made = Arena(), []
    for number, dtype in enumerate(20 * [torch.float32, torch.bfloat16, torch.int8]):
        wanted = torch.randint(-100, 100, (number, 37, 3)).to(dtype)
        copied = arena.copy(wanted.transpose(0, 1))
        assert copied.is_contiguous()
        assert copied.data_ptr() % 64 == 0 or not number
        made.append((copied, wanted.transpose(0, 1)))
    places = sorted(copied.data_ptr() for copied, _ in made if copied.numel())
    assert places[-1] - places[0] < 1 << 20
    assert all(torch.equal(copied, wanted) and copied.dtype == wanted.dtype for copied, wanted in made)


def test_what_fits_no_region_has_one_of_its_own() -> None:
    arena = Arena()
    small, large = arena.copy(torch.ones(3)), arena.copy(torch.arange(70 << 20, dtype=torch.uint8))
    assert torch.equal(small, torch.ones(3))
    assert torch.equal(large, torch.arange(70 << 20, dtype=torch.uint8))


def _huge_bytes() -> int:
    return 1024 * int(re.findall(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps_rollup").read_text())[0])
