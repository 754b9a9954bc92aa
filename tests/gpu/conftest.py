"""Tests that need a CUDA device; without one they are skipped."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # A marker of pytest-timeout, which not every machine has.
    config.addinivalue_line("markers", "timeout(seconds): for how long a test may run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _memory_given_back() -> Iterator[None]:
    """Engines that were closed are in reference cycles, and their caches are large."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
