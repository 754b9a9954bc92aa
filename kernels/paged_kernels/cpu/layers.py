"""What layers are made of on a CPU, beside attention: linear layers over packed weights, norms, activations."""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_kernels.cpu import int8, linear, structures
from paged_kernels.cpu.call import call
from paged_kernels.memory import Arena

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_FEW = 32  # rows that packing is made for; more use the same packed weights


class Linears:
    """Linear layers over copies of the weights, made at their first use.

    In bfloat16 they are packed for our own product, or else for oneDNN's. Once quantised, they are int8.
    """

    def __init__(self, device: torch.device) -> None:
        self.own = False
        """There is no other way to compute one row."""
        self.quantized, self._in_panels = False, linear.is_fastest()
        self._arena = Arena()
        self._packed: dict[int, Tensor] = {}
        """By address of the weight."""
        self._integers: dict[int, int8.Weight] = {}
        self.version = 0
        """Changes whenever weights are to be packed anew."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `F.linear`."""
        if self.quantized:
            return int8.linear(x, self._integers_of(weight), bias)
        if weight.dtype != torch.bfloat16:
            return F.linear(x, weight, bias)
        if self.is_in_panels(weight):
            return linear.linear(x, self._pack(weight), len(weight), bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._pack(weight), bias, "none", [], "")
        return out

    def is_in_panels(self, weight: Tensor) -> bool:
        """Whether our own product computes the layer, as long as it is not quantised."""
        return self._in_panels and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0

    def _pack(self, weight: Tensor) -> Tensor:
        packed = self._packed.get(weight.data_ptr())
        if packed is None:
            if self.is_in_panels(weight):
                packed = self._arena.copy(linear.pack(weight))
            else:
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, _FEW)
            self._packed[weight.data_ptr()] = packed
        return packed

    def _integers_of(self, weight: Tensor) -> int8.Weight:
        integers = self._integers.get(weight.data_ptr())
        if integers is None:
            integers = int8.pack(*int8.quantize(weight))
            integers = self._integers[weight.data_ptr()] = integers._replace(packed=self._arena.copy(integers.packed))
        return integers

    def structure(self, weight: Tensor, bias: Tensor | None) -> structures.Linear:
        """A layer that is in panels or quantised, as compiled kernels take it, until weights are to be packed anew."""
        width, depth = weight.shape
        layer = structures.Linear(bias=None if bias is None else bias.data_ptr(), width=width, depth=depth)
        if self.quantized:
            integers = self._integers_of(weight)
            layer.weight, layer.scales = integers.packed.data_ptr(), integers.scales.data_ptr()
        else:
            layer.weight = self._pack(weight).data_ptr()
        return layer

    def quantize(self) -> None:
        """From now on, use int8 weights."""
        self.quantized = True
        self.forget()

    def forget(self) -> None:
        """Weights have changed: pack them anew."""
        self.version += 1
        self._packed.clear()
        self._integers.clear()
        self._arena = Arena()

    def gate_up(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Literal["silu", "gelu_tanh", "gelu"]
    ) -> Tensor:
        """`activation(gate) * up` of the two halves of the linear layer."""
        gate_up = self(x, weight, bias)
        if activation == "gelu":
            gate, up = gate_up.float().chunk(2, -1)
            return (F.gelu(gate) * up).to(x.dtype)
        tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(tokens, inner)
        call(f"paged_gated_{_NAMES[x.dtype]}", gate_up, out, tokens, inner, activation == "gelu_tanh")
        return out


def add_norm(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, post_weight: Tensor | None = None
) -> Tensor:
    """Add `x` to `residual` in place, and return the RMS norm of the sum times `weight`.

    `x` and `residual` are `[tokens, hidden]`, contiguous; without `x`, the residual is only normalised. `weight` and
    `post_weight` are `[hidden]`, in the same dtype or float32. With `post_weight`, what is added is the RMS norm of `x`
    times `post_weight`. The sum is rounded to the dtype of the residual before it is normalised, as eager models do.
    """
    out = torch.empty_like(residual)
    name = f"paged_add_norm_{_NAMES[residual.dtype]}_{_NAMES[weight.dtype]}"
    call(name, x, residual, weight, post_weight, out, *residual.shape, ctypes.c_float(eps))
    return out
