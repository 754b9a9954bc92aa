"""What the cost of a step depends on: the shapes of models and devices."""

from __future__ import annotations

from pydantic import Field

from paged_backend.errors import CheckedModel


class ModelShape(CheckedModel):
    """What the cost of a model depends on."""

    name: str
    body_params: float = Field(gt=0)
    """Parameters of the layers, all of which every token uses."""
    head_params: float = Field(gt=0)
    """Parameters of the output layer."""
    embedding_params: float = Field(0, ge=0)
    """Parameters of the input embedding, which are held and hardly read; 0 when it is the output layer's."""
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    dtype_bytes: float = Field(2, gt=0)
    """Of a weight, and of an element of K and V."""
    max_model_len: int = Field(131072, ge=2)
    """Tokens that the model was trained for."""

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of all layers."""
        return int(2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes)

    @property
    def weight_bytes(self) -> float:
        """Held on the device."""
        return (self.body_params + self.head_params + self.embedding_params) * self.dtype_bytes


class Device(CheckedModel):
    """What a device reaches, not what its data sheet says."""

    name: str
    bytes_per_second: float = Field(gt=0)
    flops_per_second: float = Field(gt=0)
    memory_bytes: float = Field(gt=0)
    host_bytes_per_second: float = Field(25e9, gt=0)
    """Of copies to and from host memory, for swapping."""
    overhead_seconds: float = Field(1e-3, ge=0)
    """Added to every step."""


MODELS = {
    "1b": ModelShape(name="1b", body_params=0.973e9, head_params=0.263e9, layers=16, heads=32, kv_heads=8, head_dim=64),
    "8b": ModelShape(
        name="8b",
        body_params=6.98e9,
        head_params=0.525e9,
        embedding_params=0.525e9,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
    ),
}
"""Shapes of Llama 3.2 1B and Llama 3.1 8B in bfloat16."""

DEVICES = {"h100": Device(name="h100", bytes_per_second=3.0e12, flops_per_second=798e12, memory_bytes=80e9)}
"""An H100 SXM: what a copy and a large matrix product were measured to reach. One millisecond of overhead is what vLLM
adds to the roofline of one decoded token there."""
