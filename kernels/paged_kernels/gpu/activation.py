"""Gated activations (Shazeer, "GLU Variants Improve Transformer", 2020)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paged_kernels.gpu.dependent_launch import supports_dependent_launch


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Of float32; "silu", "gelu_tanh" or "gelu"."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    if ACTIVATION == "gelu_tanh":  # (1 + tanh(y)) / 2 is the logistic function of 2y
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gated(gate_up, out, INNER: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < INNER
    at = gate_up + token * (2 * INNER) + column
    gate = tl.load(at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(at + INNER, mask=real, other=0.0).to(tl.float32)
    tl.store(out + token * INNER + column, (activated(gate, ACTIVATION) * up).to(out.dtype.element_ty), mask=real)


def _tiles(tokens: int) -> tuple[int, int]:
    """Values and warps of a program. Small ones spread few tokens over all multiprocessors."""
    if tokens <= 16:
        return 256, 1
    if tokens <= 64:
        return 1024, 4
    return (2048, 8) if tokens <= 1024 else (8192, 16)


def gated(gate_up: Tensor, activation: Literal["silu", "gelu_tanh", "gelu"]) -> Tensor:
    """`activation(gate) * up`, `[tokens, inner]`, in float32 arithmetic.

    `gate_up` is `[tokens, 2 * inner]`, contiguous: the gates of a token, then what they scale. "gelu" is the exact
    function, "gelu_tanh" its approximation.
    """
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, inner)
    block, warps = _tiles(tokens)
    pdl = supports_dependent_launch(gate_up.device)
    _gated[(tokens, triton.cdiv(inner, block))](
        gate_up, out, INNER=inner, BLOCK=block, ACTIVATION=activation, PDL=pdl, num_warps=warps, launch_pdl=pdl
    )
    return out


def gated_reference(gate_up: Tensor, activation: Literal["silu", "gelu_tanh", "gelu"]) -> Tensor:
    """The same in plain PyTorch."""
    gate, up = gate_up.float().chunk(2, -1)
    if activation == "silu":
        gate = F.silu(gate)
    else:
        gate = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (gate * up).to(gate_up.dtype)
