"""Gated activations against plain PyTorch."""

from __future__ import annotations

from typing import Any, Literal
from unittest import mock

import pytest
import torch
from paged_kernels.gpu.activation import gated, gated_reference
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


new_empty = Tensor.new_empty


def poisoned(*args: Any, **kwargs: Any) -> Tensor:
    return new_empty(*args, **kwargs).fill_(float("nan"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("tokens", "inner"), [(1, 64), (1, 1536), (3, 1000), (17, 2048), (70, 72)])
def test_shapes(tokens: int, inner: int, activation: Literal["silu", "gelu_tanh", "gelu"], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens * inner)
    gate_up = (torch.randn(tokens, 2 * inner, generator=generator) * 3).to(DEVICE, dtype)
    kept = gate_up.clone()
    with mock.patch.object(Tensor, "new_empty", poisoned):
        out, again = gated(gate_up, activation), gated(gate_up, activation)
    assert out.dtype == dtype
    assert torch.equal(out, again)
    assert torch.equal(gate_up, kept)
    torch.testing.assert_close(out, gated_reference(gate_up, activation), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_large_gates_saturate(activation: Literal["silu", "gelu_tanh", "gelu"]) -> None:
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, 0.0]], device=DEVICE)
    gate_up = torch.cat((gate, torch.ones_like(gate)), 1)
    torch.testing.assert_close(gated(gate_up, activation), gate.clamp(min=0))
