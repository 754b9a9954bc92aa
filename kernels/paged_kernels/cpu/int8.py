"""Linear layers of int8 weights, with a scale an output, and activations of two int8 each, with a scale a token.

A language model's activations have outliers, beside which 255 steps are too few for the others: in SmolLM2-135M
they would cost more than twice the accuracy that int8 weights do. The second int8 of each needs no memory traffic.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_kernels.cpu import library
from paged_kernels.cpu.call import call

Kind = Literal["avx2", "vnni", "tiles"]
KINDS: tuple[Kind, ...] = ("avx2", "vnni", "tiles")  # as in int8.cpp
_BLOCK, _TILE, _DEPTH = 32, 16, 64
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Weight(NamedTuple):
    """A quantised weight of a linear layer."""

    packed: Tensor
    """int8 `[outputs / 32, inputs / 64, 2, 16, 16, 4]`, both rounded up: see int8.cpp."""
    scales: Tensor
    """float32 `[outputs]`, rounded up: the weight is about the integers times these."""
    outputs: int


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127 `[outputs, inputs]`, as int8, and float32 scales `[outputs]` of a weight."""
    scales = weight.abs().amax(1).float() / 127
    integers = torch.round(weight.float() / scales.clamp(min=1e-30)[:, None])
    return integers.to(torch.int8), scales


def pack(integers: Tensor, scales: Tensor) -> Weight:
    """What `linear` takes, of what `quantize` gives."""
    outputs, inputs = integers.shape
    integers = F.pad(integers, (0, -inputs % _DEPTH, 0, -outputs % _BLOCK))
    tiles = integers.view(-1, 2, _TILE, integers.shape[1] // _DEPTH, _TILE, 4)
    packed = tiles.permute(0, 3, 1, 4, 2, 5).contiguous()
    return Weight(packed, F.pad(scales, (0, -outputs % _BLOCK)), outputs)


def linear(x: Tensor, weight: Weight, bias: Tensor | None, kind: Kind | None = None) -> Tensor:
    """As `F.linear` with the weight that `weight` stands for, of `x` `[tokens, inputs]` rounded to 1 / 32258 of
    the largest of a token.

    `x` is float32 or bfloat16, and so are `bias` and what is returned. A token's result does not depend on the others.
    `kind` says which instructions to use: `best` unless given, or some before it.
    """
    x = x.contiguous()
    tokens, inputs = x.shape
    out = x.new_empty(tokens, weight.outputs)
    shape = 2 * -(-tokens // _TILE) * _TILE, weight.packed.shape[1] * _DEPTH  # tiles are read as a whole
    quantized = torch.empty(shape, dtype=torch.int8)
    factors = torch.empty(tokens, dtype=torch.float32)
    sizes = tokens, inputs, weight.outputs, KINDS.index(kind or best())
    call(f"paged_int8_linear_{_NAMES[x.dtype]}", x, weight.packed, weight.scales, bias, out, quantized, factors, *sizes)
    return out


@functools.cache
def best() -> Kind:
    """The fastest of what this CPU has."""
    kernels, features = library.load(), library.features()
    assert kernels is not None
    if features >= {"amx_tile", "amx_int8"} and kernels.paged_may_use_tiles():
        return "tiles"
    return "vnni" if features >= {"avx512f", "avx512bw", "avx512_vnni"} else "avx2"
