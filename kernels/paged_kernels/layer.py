"""A decoder layer as fused kernels see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor, nn

from paged_kernels.attention import LayerSpec
from paged_kernels.rope import Rope

Activation = Literal["silu", "gelu_tanh", "gelu"]


class Linear(NamedTuple):
    """Arguments of `F.linear`; several projections of one input are packed into one."""

    weight: Tensor
    bias: Tensor | None


class GLU(NamedTuple):
    """A gated MLP, `down(activation(gate) * up)` (Shazeer, 2020)."""

    gate_up: Linear
    down: Linear
    activation: Activation


@dataclass(slots=True)
class FusedLayer:
    """One decoder layer. Norm weights are what multiplies the normed values: float32 `1 + weight` for Gemma."""

    spec: LayerSpec
    qkv: Linear
    out: Linear
    mlp: GLU | nn.Module
    """A module is called as it is, such as a mixture of experts."""
    input_norm: Tensor
    attention_norm: Tensor | None
    """Of what attention adds to the residual stream."""
    mlp_norm: Tensor
    mlp_out_norm: Tensor | None
    """Of what the MLP adds."""
    q_norm: Tensor | None
    """`[dim]`, of every query head before the rotary embedding."""
    k_norm: Tensor | None
    norm_eps: float
    """Of the norms of heads."""
    rope: Rope | None = field(default=None, init=False)
    sinks: Tensor | None = field(default=None, init=False)
    """`[heads]` extra attention logits (GPT-OSS)."""

    @property
    def plain(self) -> bool:
        """Whether the kernels for one row have all that the layer needs."""
        return (
            isinstance(self.mlp, GLU)
            and self.mlp.activation in ("silu", "gelu_tanh")
            and self.mlp.gate_up.bias is None
            and self.attention_norm is None
            and self.mlp_out_norm is None
        )
