"""RMS norm (Zhang and Sennrich, 2019) together with the residual addition before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paged_kernels.gpu.dependent_launch import supports_dependent_launch


@triton.jit
def _add_norm(x, residual, weight, post_weight, out, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    real = column < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + column
    # All loads come before the first reduction, since none would be moved across its barrier.
    scale = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    if post_weight is not None:
        post_scale = tl.load(post_weight + column, mask=real, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    total = tl.load(residual + at, mask=real, other=0.0)
    if x is not None:
        branch = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
        if post_weight is not None:
            branch *= tl.rsqrt(tl.sum(branch * branch) / HIDDEN + eps) * post_scale
        total = (total.to(tl.float32) + branch).to(residual.dtype.element_ty)
        tl.store(residual + at, total, mask=real)
    value = total.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / HIDDEN + eps) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=real)


def add_norm(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, post_weight: Tensor | None = None
) -> Tensor:
    """Add `x` to `residual` in place, and return the RMS norm of the sum times `weight`.

    `x` and `residual` are `[tokens, hidden]`, contiguous; without `x`, the residual is only normalised. `weight` and
    `post_weight` are `[hidden]`, in any floating dtype. With `post_weight`, what is added is the RMS norm of `x` times
    `post_weight` (the sandwich norm of Gemma 2). All arithmetic is float32; the sum is rounded to the dtype of the
    residual before it is normalised, as eager models do.
    """
    tokens, hidden = residual.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(hidden)
    # Eight values a thread are one access of 16 bytes: all of a row is in flight at once. Where there are more rows
    # than multiprocessors, half the threads with twice as much each reduce faster.
    per_warp = 256 if tokens <= 128 else 512
    pdl = supports_dependent_launch(residual.device)
    _add_norm[(tokens,)](
        x,
        residual,
        weight,
        post_weight,
        out,
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        PDL=pdl,
        num_warps=min(32, max(1, block // per_warp)),
        launch_pdl=pdl,
    )
    return out


def add_norm_reference(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, post_weight: Tensor | None = None
) -> Tensor:
    """The same in plain PyTorch."""

    def rms_norm(value: Tensor, scale: Tensor) -> Tensor:
        value = value.float()
        return value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * scale.float()

    if x is not None:
        residual.copy_(residual.float() + (x.float() if post_weight is None else rms_norm(x, post_weight)))
    return rms_norm(residual, weight).to(residual.dtype)
