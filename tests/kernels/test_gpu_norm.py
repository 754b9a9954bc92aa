"""Norms with the residual addition against plain PyTorch."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from paged_kernels.gpu.norm import add_norm, add_norm_reference
from torch import Tensor

from tests.kernels import RUNS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def poisoned(like: Tensor) -> Tensor:
    return torch.full(like.shape, float("nan"), dtype=like.dtype, device=like.device)


def check(tokens: int, hidden: int, dtype: torch.dtype, weights: torch.dtype, plain: bool, sandwich: bool) -> None:
    generator = torch.Generator().manual_seed(tokens * hidden)
    x, residual = (torch.randn(tokens, hidden, generator=generator).to(DEVICE, dtype) for _ in range(2))
    weight, post_weight = ((torch.rand(hidden, generator=generator) + 0.5).to(DEVICE, weights) for _ in range(2))
    results = []
    for function in [add_norm] * RUNS + [add_norm_reference]:
        total = residual.clone()
        with mock.patch("torch.empty_like", poisoned):
            out = function(None if plain else x, total, weight, 1e-6, post_weight if sandwich else None)
        results.append((out, total))
    (out, total), *more, (want, want_total) = results
    assert all(torch.equal(out, again[0]) and torch.equal(total, again[1]) for again in more)
    assert out.dtype == total.dtype == dtype
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(total, want_total, **tolerance)
    torch.testing.assert_close(out, want, **tolerance)
    if not sandwich:  # one addition and one rounding: no freedom
        assert torch.equal(total, residual if plain else (residual.float() + x.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("plain", "sandwich"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (3, 576), (70, 96), (1, 5120), (2, 16384), (200, 40)])
def test_shapes(tokens: int, hidden: int, plain: bool, sandwich: bool, dtype: torch.dtype) -> None:
    check(tokens, hidden, dtype, dtype, plain, sandwich)


@pytest.mark.parametrize("sandwich", [False, True])
def test_float32_weights(sandwich: bool) -> None:
    check(5, 320, DTYPES[-1], torch.float32, False, sandwich)


def test_agrees_with_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(576, eps=1e-5).to(DEVICE)
    with torch.no_grad():
        module.weight.uniform_(0.5, 1.5)
        x, residual = (torch.randn(7, 576, device=DEVICE) for _ in range(2))
        want = module(x + residual)
        torch.testing.assert_close(add_norm(x, residual, module.weight, 1e-5), want, atol=1e-5, rtol=1e-5)
