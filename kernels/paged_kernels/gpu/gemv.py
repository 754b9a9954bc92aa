"""Linear layers for one row, with the norm before them and the activation or the residual sum behind.

With one row a linear layer takes as long as reading its weights, and between two kernels the memory idles. So one
kernel does its neighbours' work on the way, and asks for its first weights while the kernel before it drains. The scale
of an RMS norm is one number: it multiplies the sums at the end, and the loop that needs the inputs anyway gathers their
squares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paged_kernels.gpu.activation import activated
from paged_kernels.gpu.dependent_launch import supports_dependent_launch


@triton.jit
def _gemv(
    x,
    weight,
    bias,
    norm_weight,
    residual,
    out,
    n_total,
    k_total,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program makes BLOCK_N sums; with an activation, half of them are gates: rows of gate and up alternate."""
    GATED: tl.constexpr = ACTIVATION is not None
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    if PDL:
        gdc_launch_dependents()
    outputs = n_total // 2 if GATED else n_total
    at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), n_total - 1)
    if GATED:
        row = row // 2 + row % 2 * outputs
    weight += row.to(tl.int64)[:, None] * k_total
    k = tl.arange(0, BLOCK_K)[None, :]
    w = tl.load(weight + k, mask=k < k_total, other=0.0)
    if norm_weight is not None:
        scale = tl.load(norm_weight + k, mask=k < k_total, other=0.0)
    if bias is not None:
        shift = tl.load(bias + at, mask=at < outputs, other=0.0)
    if PDL:
        gdc_wait()
    if residual is not None:
        before = tl.load(residual + at, mask=at < outputs, other=0.0)

    squares = tl.zeros([1, BLOCK_K], tl.float32)
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, k_total, BLOCK_K, num_stages=1):
        a = tl.load(x + start + k, mask=start + k < k_total, other=0.0).to(tl.float32)
        following = start + BLOCK_K + k
        next_w = tl.load(weight + following, mask=following < k_total, other=0.0)
        if norm_weight is not None:
            squares += a * a
            a *= scale.to(tl.float32)
            scale = tl.load(norm_weight + following, mask=following < k_total, other=0.0)
        products += w.to(tl.float32) * a
        w = next_w
    acc = tl.sum(products, 1)

    if norm_weight is not None:
        acc *= tl.rsqrt(tl.sum(squares) / k_total + eps)
    if GATED:
        gate, acc = acc.reshape(OUTPUTS, 2).split()
        acc *= activated(gate, ACTIVATION)
    if bias is not None:
        acc += shift.to(tl.float32)
    if residual is not None:
        acc += before.to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < outputs)


def _launch_gemv(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    if x.shape[0] != 1:
        raise ValueError(f"{x.shape[0]} rows; this kernel takes one")
    n, k = weight.shape
    # Small programs, so that enough of them run at once to keep the memory busy; larger ones where there are few.
    block_n, block_k = (4, 1024) if residual is None else (8, 4096 if k > 8192 else 1024)
    block_k = max(256, min(block_k, triton.next_power_of_2(k)))
    pdl = supports_dependent_launch(x.device)
    _gemv[(triton.cdiv(n, block_n),)](
        x,
        weight,
        bias,
        norm_weight,
        residual,
        out,
        n,
        k,
        eps,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        ACTIVATION=activation,
        PDL=pdl,
        num_warps=min(16, block_n * block_k // 1024),
        launch_pdl=pdl,
    )
    return out


def norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, eps: float) -> Tensor:
    """`rms_norm(x) @ weight.T + bias`, or without the norm where `norm_weight` is None.

    `x` is `[1, K]`, `weight` `[N, K]`, `bias` `[N]`, `norm_weight` `[K]`; all contiguous, `x` and `weight` of one
    dtype. Returns `[1, N]` in it; all arithmetic is float32. More rows are a ValueError.
    """
    return _launch_gemv(x, weight, x.new_empty(1, weight.shape[0]), bias, norm_weight, eps)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`residual += x @ weight.T + bias`, in place; returns `residual`.

    `residual` is `[1, N]`, contiguous, and shares no memory with `x`; the others are as in `norm_linear`.
    """
    return _launch_gemv(x, weight, residual, bias, residual=residual)


def norm_gate_up(x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float, activation: str) -> Tensor:
    """`act(rms_norm(x) @ gate.T) * (rms_norm(x) @ up.T)` (GLU variants, Shazeer, 2020), `[1, I]`.

    `weight` is `[2 * I, K]`, the gate's rows first; `activation` is "silu" or "gelu_tanh"; the others are as in
    `norm_linear`.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(_ACTIVATIONS)}")
    out = x.new_empty(1, weight.shape[0] // 2)
    return _launch_gemv(x, weight, out, norm_weight=norm_weight, eps=eps, activation=activation)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def _norm_linear32(x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, eps: float) -> Tensor:
    y = x.float() if norm_weight is None else F.rms_norm(x.float(), x.shape[-1:], norm_weight.float(), eps)
    return F.linear(y, weight.float(), None if bias is None else bias.float())


def norm_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, eps: float
) -> Tensor:
    """`norm_linear` in plain PyTorch."""
    return _norm_linear32(x, weight, bias, norm_weight, eps).to(x.dtype)


def linear_add_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`linear_add` in plain PyTorch."""
    return residual.copy_(residual.float() + _norm_linear32(x, weight, bias, None, 0.0))


def norm_gate_up_reference(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float, activation: str
) -> Tensor:
    """`norm_gate_up` in plain PyTorch."""
    gate, up = _norm_linear32(x, weight, None, norm_weight, eps).chunk(2, dim=-1)
    return (_ACTIVATIONS[activation](gate) * up).to(x.dtype)
