"""The linear layers for one row against plain PyTorch, on shapes at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paged_kernels.gpu.gemv import (
    linear_add,
    linear_add_reference,
    norm_gate_up,
    norm_gate_up_reference,
    norm_linear,
    norm_linear_reference,
)
from torch import Tensor

from tests.kernels import RUNS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(24, 64), (37, 1100), (96, 256), (70, 200), (32, 4100), (130, 2048), (40, 18), (11, 8210)]


def random(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return random(1, dtype, rows, k), random(2, dtype, n, k) / k**0.5, 1 + random(3, dtype, k) / 4


def check(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], *arguments: Any) -> None:
    first, *more, want = (
        f(*(a.clone() if isinstance(a, Tensor) else a for a in arguments)) for f in [kernel] * RUNS + [reference]
    )
    assert all(torch.equal(first, again) for again in more)
    assert first.dtype == want.dtype
    torch.testing.assert_close(first, want, atol=TOLERANCE[want.dtype], rtol=TOLERANCE[want.dtype])


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels allocate holds NaN, so that whatever they leave unwritten shows."""

    def poisoned(self: Tensor, *shape: int, **options: Any) -> Tensor:
        floating = options.get("dtype", self.dtype).is_floating_point
        return Tensor.new_full(self, shape, float("nan") if floating else 7, **options)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_norm_linear(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, norm_weight = inputs(1, n, k, dtype)
    bias = random(4, dtype, n)
    for arguments in [
        (bias, norm_weight, 1e-5),
        (None, norm_weight.float(), 0.1),
        (bias, None, 0.0),
        (None, None, 0.0),
    ]:
        check(norm_linear, norm_linear_reference, x, weight, *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_add(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, _ = inputs(1, n, k, dtype)
    residual, bias = random(4, dtype, 1, n), random(5, dtype, n)
    for b in (None, bias):
        check(linear_add, linear_add_reference, x, weight, b, residual)
    assert linear_add(x, weight, bias, residual) is residual


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [shape for shape in SHAPES if shape[0] % 2 == 0])
def test_norm_gate_up(n: int, k: int, dtype: torch.dtype, activation: str) -> None:
    x, weight, norm_weight = inputs(1, n, k, dtype)
    for norm in (norm_weight, None):
        check(norm_gate_up, norm_gate_up_reference, x, weight, norm, 1e-6, activation)


def test_refused() -> None:
    x, weight, norm_weight = inputs(2, 32, 64, torch.float32)
    with pytest.raises(ValueError, match="2 rows"):
        norm_linear(x, weight, None, norm_weight, 1e-6)
    with pytest.raises(ValueError, match="relu"):
        norm_gate_up(x[:1], weight, norm_weight, 1e-6, "relu")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA graphs and dependent launches")
def test_dependent_launches_in_a_graph() -> None:
    """A chain whose kernels start early, replayed, gives the bits of the same kernels one after another."""
    x, up, norm_weight = inputs(1, 4096, 1024, torch.bfloat16)
    down = random(4, torch.bfloat16, 1024, 2048) / 2048**0.5
    hidden = torch.zeros_like(x)

    def chain(after_each: Callable[[], object]) -> None:
        torch.mul(x, 1, out=hidden)
        for _ in range(8):
            inner = norm_gate_up(hidden, up, norm_weight, 1e-6, "silu")
            after_each()
            linear_add(inner, down, None, hidden)
            after_each()

    chain(torch.cuda.synchronize)
    want = hidden.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for _ in range(5):
        hidden.fill_(float("nan"))
        graph.replay()
        assert torch.equal(hidden, want)
