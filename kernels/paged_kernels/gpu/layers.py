"""What layers are made of on a GPU, beside attention: linear layers by the number of rows, norms, activations."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_kernels.gpu.activation import gated
from paged_kernels.gpu.few_rows import (
    MAX_FEW_ROWS,
    MAX_GATE_UP_ROWS,
    NUM_COUNTERS,
    few_rows_gate_up,
    few_rows_linear,
)
from paged_kernels.gpu.gemv import linear_add, norm_gate_up, norm_linear
from paged_kernels.gpu.norm import add_norm

__all__ = ["Linears", "add_norm", "linear_add", "norm_gate_up", "norm_linear"]


class Linears:
    """Linear layers, for few rows by our own kernels where they are the fastest: see `few_rows`."""

    def __init__(self, device: torch.device) -> None:
        self.own = False
        """Whether our own kernels are used at all; that they are not compiled one by one, they need `compile_ahead`."""
        self._counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `F.linear`."""
        if self.own and _is_few(x, MAX_FEW_ROWS):
            return few_rows_linear(x, weight, bias, self._counters)
        return F.linear(x, weight, bias)

    def forget(self) -> None:
        """Weights have changed; nothing is kept of them."""

    def gate_up(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Literal["silu", "gelu_tanh", "gelu"]
    ) -> Tensor:
        """`activation(gate) * up` of the two halves of the linear layer."""
        if self.own and _is_few(x, MAX_GATE_UP_ROWS) and activation != "gelu" and bias is None:
            return few_rows_gate_up(x, weight, activation)
        return gated(self(x, weight, bias), activation)


def _is_few(x: Tensor, most: int) -> bool:
    return 0 < len(x) <= most and x.shape[1] % 16 == 0
