"""References compute with plain matrix products: what libraries choose for attention fails under compute-sanitizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield
