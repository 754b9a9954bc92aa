"""Linear layers of int8 weights against plain PyTorch, with each kind of instructions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from paged_kernels.cpu import int8, layers, library
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 64, 32), (1, 576, 960), (5, 70, 33), (16, 200, 100), (17, 64, 31), (40, 96, 64), (300, 130, 48)]
BEST = int8.best() if library.load() is not None else None

pytestmark = pytest.mark.skipif(BEST is None, reason="the CPU kernels are not built")


@pytest.fixture(params=["avx2", "vnni", "tiles"])
def kind(request: pytest.FixtureRequest) -> int8.Kind:
    kinds: list[int8.Kind] = ["avx2", "vnni", "tiles"]
    if BEST is not None and kinds.index(request.param) > kinds.index(BEST):
        pytest.skip("this CPU has no such instructions")
    return request.param


def make(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Activations whose tokens differ in size, a weight and a bias."""
    torch.manual_seed(tokens + inputs + outputs)
    x = torch.randn(tokens, inputs) * torch.logspace(-2, 2, tokens)[:, None]
    return x.to(dtype), torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_is_within_half_a_step(dtype: torch.dtype) -> None:
    weight = make(1, 96, 50, dtype)[1]
    weight[7] = 0
    integers, scales = int8.quantize(weight)
    assert integers.dtype == torch.int8
    assert integers.abs().amax(1).tolist() == [127 if row != 7 else 0 for row in range(50)]
    error = (integers.double() * scales.double()[:, None] - weight.double()).abs()
    assert (error <= scales.double()[:, None] * 0.5001).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(kind: int8.Kind, shape: tuple[int, int, int], has_bias: bool, dtype: torch.dtype) -> None:
    x, weight, bias = make(*shape, dtype)
    integers, scales = int8.quantize(weight)
    got = int8.linear(x, int8.pack(integers, scales), bias if has_bias else None, kind)
    dequantised = integers.double() * scales.double()[:, None]
    want = F.linear(x.double(), dequantised, bias.double() if has_bias else None)
    assert got.dtype == dtype
    # Each activation is within half a step of 1 / (127 * 254); sums of products are exact. What is left are a few
    # roundings to float32 of what the products and the bias are, and one to the dtype.
    step = x.double().abs().amax(1, keepdim=True) / (127 * 254)
    allowed = step / 2 * dequantised.abs().sum(1) * 1.01
    allowed += 2.0**-21 * (x.double().abs() @ dequantised.abs().T + bias.double().abs())
    allowed += 2.0**-8 * want.abs() if dtype == torch.bfloat16 else 0
    assert ((got.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_quantised_layer_is_as_near_to_the_true_one_as_its_steps(
    kind: int8.Kind, shape: tuple[int, int, int]
) -> None:
    x, weight, bias = make(*shape, torch.float32)
    integers, scales = int8.quantize(weight)
    got = int8.linear(x, int8.pack(integers, scales), bias, kind)
    want = F.linear(x.double(), weight.double(), bias.double())
    # Half a step of each weight meets the activations, and half a small one of each activation the rounded weights.
    rounded = integers.double().abs() * scales[:, None]
    steps = x.double().abs().amax(1, keepdim=True) / (127 * 254)
    allowed = steps / 2 * rounded.sum(1) + x.double().abs().sum(1, keepdim=True) * scales / 2
    assert ((got - want).abs() <= allowed * 1.001 + 1e-4).all()


def test_nothing_saturates(kind: int8.Kind) -> None:
    x, weight = torch.ones(3, 1536), torch.ones(64, 1536)
    x[1], weight[1::2] = -1, -1
    got = int8.linear(x, int8.pack(*int8.quantize(weight)), None, kind)
    torch.testing.assert_close(got, x @ weight.T, rtol=1e-6, atol=0)


def test_a_token_does_not_depend_on_the_others_nor_on_the_instructions(kind: int8.Kind) -> None:
    x, weight, bias = make(70, 96, 80, torch.bfloat16)
    packed = int8.pack(*int8.quantize(weight))
    together = int8.linear(x, packed, bias, kind)
    assert torch.equal(together, int8.linear(x, packed, bias, "avx2"))
    for token in (0, 33, 69):
        assert torch.equal(int8.linear(x[token : token + 1], packed, bias, kind)[0], together[token])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_token(dtype: torch.dtype, bad: float) -> None:
    x, weight, bias = make(3, 70, 40, dtype)
    x[1, 69] = bad
    x[2] = 0
    out = int8.linear(x, int8.pack(*int8.quantize(weight)), bias)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert torch.equal(out[2], bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linears_quantise_when_told_and_anew_after_a_change(dtype: torch.dtype) -> None:
    x, weight, bias = make(4, 96, 80, dtype)
    linears = layers.Linears(torch.device("cpu"))
    before = linears(x, weight, bias)
    torch.testing.assert_close(before, F.linear(x, weight, bias), rtol=0.02, atol=0.1)
    linears.quantize()
    for _ in range(2):
        got = linears(x, weight, bias)
        assert torch.equal(got, int8.linear(x, int8.pack(*int8.quantize(weight)), bias))
        assert not torch.equal(got, before)
        weight.mul_(-2)
        linears.forget()


def test_no_token_and_tokens_that_are_not_contiguous() -> None:
    x, weight, _ = make(6, 64, 40, torch.float32)
    packed = int8.pack(*int8.quantize(weight))
    assert int8.linear(x[:0], packed, None).shape == (0, 40)
    assert torch.equal(int8.linear(x[::2], packed, None), int8.linear(x, packed, None)[::2])
