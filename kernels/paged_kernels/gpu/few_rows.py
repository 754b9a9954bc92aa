"""Linear layers for few rows: as fast as their weights can be read.

To a tensor core, a few rows are as good as one. Every program reads all of the rows, out of the L2 cache, and some of
the weights: wide tiles save such reads, small ones let more programs run. Where there are fewer outputs than fill the
device with wide tiles, programs divide the inputs among them, too (split-K); of those with the same outputs, the one
that ends last adds up. The weights are the left operand of the products: 64 of them at once are what a warp group
multiplies, so that a few rows need no padding to as many. First weights are asked for while the kernel before drains.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

from paged_kernels.gpu.activation import activated
from paged_kernels.gpu.dependent_launch import supports_dependent_launch
from paged_kernels.gpu.gemv import norm_gate_up_reference, norm_linear_reference

MAX_FEW_ROWS = 64
"""Rows that `few_rows_linear` takes."""
MAX_GATE_UP_ROWS = 128
"""Rows that `few_rows_gate_up` takes: it saves a kernel."""
NUM_COUNTERS = 128
"""int32 zeros that `few_rows_linear` needs."""
_ACTIVATIONS = ("silu", "gelu_tanh")


@triton.jit
def _prefetch(pointers, size):
    """Ask for `size` bytes, a multiple of 16, at each of the pointers, which are aligned to 16 bytes, into L2."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0",
        "=r,l,r",
        [pointers.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    x,
    weight,
    bias,
    partials,
    counters,
    out,
    rows,
    n_total,
    k_total,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program makes BLOCK_N of `n_total` outputs of each row; with an activation, from as many gates and ups."""
    GATED: tl.constexpr = ACTIVATION is not None
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    output = tl.minimum(n, n_total - 1)
    each = tl.cdiv(k_total, SPLIT * BLOCK_K) * BLOCK_K
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, k_total)
    if GATED:
        up_weight = weight + (output + n_total).to(tl.int64)[:, None] * k_total
    weight += output.to(tl.int64)[:, None] * k_total
    if PDL:
        if PREFETCH > 0:
            size = tl.maximum(tl.minimum(PREFETCH, end - begin), 0) * weight.dtype.element_ty.primitive_bitwidth // 8
            _prefetch(weight + begin, size)
            if GATED:
                _prefetch(up_weight + begin, size)
        gdc_wait()
    row = tl.arange(0, ROWS)[:, None]
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    up = acc
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(x + row * k_total + k, mask=(row < rows) & (k < end), other=0.0)
        w = tl.load(weight + k, mask=k < end, other=0.0)
        acc = tl.dot(w, a.T, acc, input_precision=PRECISION)
        if GATED:
            w = tl.load(up_weight + k, mask=k < end, other=0.0)
            up = tl.dot(w, a.T, up, input_precision=PRECISION)
    if SPLIT > 1:
        SIZE: tl.constexpr = BLOCK_N * ROWS
        inside = tl.arange(0, BLOCK_N)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        partials += tile.to(tl.int64) * (SPLIT * SIZE) + inside
        tl.store(partials + tl.program_id(1) * SIZE, acc)
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") < SPLIT - 1:
            return
        tl.store(counters + tile, 0)
        acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
        for part in tl.static_range(SPLIT):  # in their order whoever came last: the same bits every time
            # Past the L1 cache, which does not see what other multiprocessors wrote.
            acc += tl.load(partials + part * SIZE, cache_modifier=".cg")
    if GATED:
        acc = activated(acc, ACTIVATION) * up
    if bias is not None:
        acc += tl.load(bias + output).to(tl.float32)[:, None]
    place = row.to(tl.int64) * n_total + n[None, :]
    tl.store(out + place, acc.T.to(out.dtype.element_ty), mask=(row < rows) & (n < n_total)[None, :])


class _Tiles(NamedTuple):
    """How the programs of `_few_rows` divide the weights."""

    block_n: int
    """Outputs of a program."""
    block_k: int
    """Inputs per step, if they have 16 bits."""
    split: int
    """Programs that share the inputs of the same outputs."""
    warps: int
    stages: int


def _tiles(row_block: int, outputs: int, inputs: int, gated: bool) -> _Tiles:
    if gated:
        if row_block == 64:
            return _Tiles(64, 64, 1, 4, 6)
        return _Tiles(64, 128, 1, 4, 4) if row_block <= 32 else _Tiles(64, 128, 1, 8, 3)
    # Programs for most of the 132 multiprocessors of an H100, or else as few as possible; sums of more rows take longer
    # to exchange.
    tiles, split = -(-outputs // 64), 1
    for more in (2, 4):
        if 100 <= tiles * more <= 132 and inputs >= 512 * more:
            split = more
    if row_block > 32:
        split = max(1, split // 2)
    return _Tiles(64, 128, split, 4, 6)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    if device.type != "cuda":
        return 1 << 16
    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, counters: Tensor | None, activation: str | None = None
) -> Tensor:
    (rows, k), gated, size = x.shape, activation is not None, x.element_size()
    most = MAX_GATE_UP_ROWS if gated else MAX_FEW_ROWS
    if not 1 <= rows <= most:
        raise ValueError(f"{rows} rows; this kernel takes 1 to {most}")
    outputs = weight.shape[0] // (2 if gated else 1)
    row_block = max(16, triton.next_power_of_2(rows))
    block_n, block_k, split, warps, stages = _tiles(row_block, outputs, k, gated)
    if counters is None:
        split = 1
    tiles = triton.cdiv(outputs, block_n)
    out, partials = x.new_empty(rows, outputs), None
    if split > 1:
        partials = x.new_empty(tiles * split * block_n * row_block, dtype=torch.float32)
    bytes_a_stage = (block_n * (2 if gated else 1) + row_block) * block_k * 2
    aligned = (weight.data_ptr() | k * size) % 16 == 0
    pdl = supports_dependent_launch(x.device)
    _few_rows[(tiles, split)](
        x,
        weight,
        bias,
        partials,
        None if split == 1 else counters,
        out,
        rows,
        outputs,
        k,
        ROWS=row_block,
        BLOCK_N=block_n,
        BLOCK_K=block_k * 2 // size,
        SPLIT=split,
        PREFETCH=512 // size if aligned else 0,
        ACTIVATION=activation,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        PDL=pdl,
        num_warps=warps,
        num_stages=max(1, min(stages, _shared_memory(x.device) // bytes_a_stage)),
        launch_pdl=pdl,
    )
    return out


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counters: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`.

    `x` is `[M, K]` with 1 <= M <= `MAX_FEW_ROWS`, or a ValueError is raised; `weight` is `[N, K]`, `bias` `[N]`. All
    are contiguous and of one dtype. Returns `[M, N]` in it, summed in float32. `counters` are `[NUM_COUNTERS]` int32
    zeros, and zeros again after each kernel; without them, few outputs take longer.
    """
    return _launch(x, weight, bias, counters)


def few_rows_gate_up(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    """`act(x @ gate.T) * (x @ up.T)` (GLU variants, Shazeer, 2020), `[M, I]`.

    `x` is `[M, K]` with 1 <= M <= `MAX_GATE_UP_ROWS`, `weight` `[2 * I, K]`, the gate's rows first; `activation` is
    "silu" or "gelu_tanh"; others are a ValueError. The rest is as in `few_rows_linear`.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(_ACTIVATIONS)}")
    return _launch(x, weight, None, None, activation)


def few_rows_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, counters: Tensor | None = None) -> Tensor:
    """`few_rows_linear` in plain PyTorch."""
    return norm_linear_reference(x, weight, bias, None, 0.0)


def few_rows_gate_up_reference(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    """`few_rows_gate_up` in plain PyTorch."""
    return norm_gate_up_reference(x, weight, None, 0.0, activation)
