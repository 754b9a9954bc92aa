"""The linear layers for few rows against plain PyTorch, on shapes at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paged_kernels.gpu import few_rows
from paged_kernels.gpu.few_rows import (
    MAX_FEW_ROWS,
    MAX_GATE_UP_ROWS,
    NUM_COUNTERS,
    few_rows_gate_up,
    few_rows_gate_up_reference,
    few_rows_linear,
    few_rows_linear_reference,
)
from paged_kernels.gpu.norm import add_norm
from torch import Tensor

from tests.kernels.test_gpu_gemv import DEVICE, DTYPES, _poisoned_memory, check, inputs, random  # noqa: F401

SHAPES = [
    (1, 24, 64),
    (2, 37, 1100),
    (5, 70, 200),
    (16, 130, 512),
    (17, 258, 96),
    (29, 130, 512),
    (3, 40, 18),
    (33, 102, 1028),
    (MAX_FEW_ROWS, 66, 328),
]


def counters() -> Tensor:
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_few_rows_linear(rows: int, n: int, k: int, biased: bool, dtype: torch.dtype) -> None:
    x, weight, _ = inputs(rows, n, k, dtype)
    check(few_rows_linear, few_rows_linear_reference, x, weight, random(4, dtype, n) if biased else None)


@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else [torch.float16])
@pytest.mark.parametrize(("rows", "n", "k"), [(2, 2040, 2066), (20, 4100, 1026), (64, 2048, 2050)])
def test_programs_that_divide_the_inputs(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, _ = inputs(rows, n, k, dtype)
    zeros = counters()
    check(lambda *args: few_rows_linear(*args, zeros), few_rows_linear_reference, x, weight, random(4, dtype, n))
    assert not zeros.any()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [*SHAPES[2:], (MAX_GATE_UP_ROWS - 1, 66, 328)])
def test_few_rows_gate_up(rows: int, n: int, k: int, dtype: torch.dtype, activation: str) -> None:
    check(few_rows_gate_up, few_rows_gate_up_reference, *inputs(rows, n, k, dtype)[:2], activation)


@pytest.mark.parametrize("tiles", [(16, 256, 3, 2, 4), (64, 64, 2, 4, 5), (32, 128, 4, 4, 3), (128, 64, 8, 8, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles(dtype: torch.dtype, tiles: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind, over shapes that they do not divide."""
    zeros = counters()
    for rows in (7, 24, 50):
        x, weight, _ = inputs(rows, 158, 392, dtype)
        monkeypatch.setattr(few_rows, "_tiles", lambda *_: few_rows._Tiles(*tiles))
        check(lambda *args: few_rows_linear(*args, zeros), few_rows_linear_reference, x, weight, None)
        monkeypatch.setattr(few_rows, "_tiles", lambda *_: few_rows._Tiles(*tiles)._replace(split=1))
        check(few_rows_gate_up, few_rows_gate_up_reference, x, weight, "silu")


def test_refused() -> None:
    x, weight, _ = inputs(MAX_GATE_UP_ROWS + 1, 32, 64, torch.float32)
    for rows in (x[: MAX_FEW_ROWS + 1], x[:0]):
        with pytest.raises(ValueError, match=f"{len(rows)} rows"):
            few_rows_linear(rows, weight, None)
    for rows in (x, x[:0]):
        with pytest.raises(ValueError, match=f"{len(rows)} rows"):
            few_rows_gate_up(rows, weight, "silu")
    with pytest.raises(ValueError, match="relu"):
        few_rows_gate_up(x[:2], weight, "relu")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA graphs and dependent launches")
@pytest.mark.parametrize("rows", [2, 20, MAX_FEW_ROWS])
def test_dependent_launches_in_a_graph(rows: int) -> None:
    """A chain whose kernels start early, replayed, gives the bits of the same kernels one after another."""
    x, up, norm_weight = inputs(rows, 4096, 1024, torch.bfloat16)
    down = random(4, torch.bfloat16, 1024, 2048) / 2048**0.5
    hidden, zeros = torch.zeros_like(x), counters()

    def chain(after_each: Callable[[], object]) -> None:
        torch.mul(x, 1, out=hidden)
        update: Any = None
        for _ in range(8):
            normed = add_norm(update, hidden, norm_weight, 1e-6)
            after_each()
            inner = few_rows_gate_up(normed, up, "silu")
            after_each()
            update = few_rows_linear(inner, down, None, zeros)
            after_each()

    chain(torch.cuda.synchronize)
    torch.cuda.synchronize()
    want = hidden.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(hidden, want)
