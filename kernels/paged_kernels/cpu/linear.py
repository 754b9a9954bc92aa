"""Linear layers in bfloat16 over packed weights, where a CPU multiplies pairs of bfloat16, by vectors or by AMX tiles.

oneDNN's own reach half of what such CPUs can do at 32 rows, and three quarters where a layer has many outputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from paged_kernels.cpu import library
from paged_kernels.cpu.call import call

_COLUMNS = 48


def is_fastest() -> bool:
    """Whether this CPU should compute linear layers so. They need an even number of inputs."""
    return "avx512_bf16" in library.features()


def pack(weight: Tensor) -> Tensor:
    """`[width, depth]` as panels of 48 outputs, filled up with zeros: `[panels, depth / 2, 48, 2]`."""
    width, depth = weight.shape
    if width % _COLUMNS:
        weight = F.pad(weight, (0, 0, 0, -width % _COLUMNS))
    return weight.view(-1, _COLUMNS, depth // 2, 2).transpose(1, 2).contiguous()


def linear(x: Tensor, packed: Tensor, width: int, bias: Tensor | None) -> Tensor:
    """As `F.linear` of bfloat16 `x` `[rows, depth]` and the weight `[width, depth]` that was packed."""
    x = x.contiguous()
    out = x.new_empty(len(x), width)
    call("paged_linear", x, packed, bias, out, len(x), width, x.shape[1])
    return out
