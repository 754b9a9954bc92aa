"""The compiled norms and activations against their reference, and packed linear layers against torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from paged_kernels.cpu import layers, library, linear

pytest.importorskip("triton")  # the references lie beside kernels for GPUs
from paged_kernels.gpu.activation import gated_reference
from paged_kernels.gpu.norm import add_norm_reference

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 0.02, "atol": 0.02}}
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 576), (7, 64), (40, 100)])
@pytest.mark.parametrize("kind", ["norm", "add", "sandwich"])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=str)
def test_add_norm(dtype: torch.dtype, tokens: int, hidden: int, kind: str, weight_dtype: torch.dtype | None) -> None:
    torch.manual_seed(tokens)
    x, residual = (torch.randn(2, tokens, hidden) * 3).to(dtype)
    weight, post = torch.randn(2, hidden).to(weight_dtype or dtype)
    results = []
    for add_norm in (layers.add_norm, add_norm_reference):
        sums = residual.clone()
        out = add_norm(None if kind == "norm" else x, sums, weight, 1e-5, post if kind == "sandwich" else None)
        results.append((out, sums))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("tokens", "inner"), [(1, 64), (40, 100)])
def test_gate_up(dtype: torch.dtype, activation: str, tokens: int, inner: int) -> None:
    torch.manual_seed(inner)
    x, weight, bias = torch.randn(tokens, 48).to(dtype), torch.randn(2 * inner, 48).to(dtype), None
    x[0, :4] = 40.0  # where exponentials saturate
    got = layers.Linears(CPU).gate_up(x, weight, bias, activation)
    want = gated_reference(F.linear(x, weight, bias), activation)
    torch.testing.assert_close(got, want, rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=0.05)


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_weights_are_made_anew_after_a_change(tokens: int, has_bias: bool) -> None:
    torch.manual_seed(tokens)
    x, weight = torch.randn(tokens, 96).bfloat16(), torch.randn(80, 96).bfloat16()
    bias = torch.randn(80).bfloat16() if has_bias else None
    linears = layers.Linears(CPU)
    for _ in range(2):
        torch.testing.assert_close(linears(x, weight, bias), F.linear(x, weight, bias), rtol=0.02, atol=0.1)
        weight.mul_(-2)
        linears.forget()


@pytest.fixture(params=[name for name, needs in library.VARIANTS.items() if library.features().issuperset(needs)])
def _variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = library.load(request.param)
    monkeypatch.setattr(library, "load", lambda: kernels)


@pytest.mark.usefixtures("_variant")
@pytest.mark.parametrize(("width", "depth"), [(1, 2), (48, 64), (97, 130), (143, 20), (200, 46)])
def test_packed_for_pairs(width: int, depth: int) -> None:
    def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear.linear(x, linear.pack(weight), width, bias)

    for rows in (1, 2, 3, 5, 8, 9, 15, 137, 300):
        check_linear(packed_linear, rows, width, depth)


def check_linear(function: Callable[..., torch.Tensor], rows: int, width: int, depth: int) -> None:
    """With a bias and without, on more threads than one."""
    torch.manual_seed(rows * depth)
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((rows, depth), (width, depth), width))
    torch.set_num_threads(2)
    try:
        for added in (None, bias):
            want = F.linear(x.double(), weight.double(), None if added is None else added.double())
            torch.testing.assert_close(function(x, weight, added).double(), want, rtol=2**-8, atol=1e-4)
    finally:
        torch.set_num_threads(1)
